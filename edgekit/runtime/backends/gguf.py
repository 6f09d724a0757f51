"""Runs GGUF language models in llama.cpp: through llama-cpp-python where it is installed, else xllamacpp.

Both answer in OpenAI's chunks; this file turns them into pieces of text. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import threading
from typing import TYPE_CHECKING, Any, Literal

from edgekit.errors import HealthError, InputError, UsageError
from edgekit.plugins import extra
from edgekit.runtime.backends import TextPiece, TokenScore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions, Message, Sampling

    Chunk = Mapping[str, Any]
    Ask = Callable[[bool, dict[str, Any]], Iterator[Chunk]]
    Score = Callable[[list[int], int], Mapping[int, float]]


class GgufEngine:
    """A loaded language model. ``ask`` yields OpenAI chunks for a chat (true) or a completion (false).

    ``score`` gives the log probabilities of what comes after some tokens.
    """

    def __init__(self, ask: Ask, engine: str, score: Score | None = None) -> None:
        self.engine = engine
        self._ask: Ask | None = ask
        self._score = score

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[TextPiece]:
        """Answer a conversation through the model's own chat template.

        Raises:
            InputError: llama.cpp refuses the conversation, as when it exceeds the context.
        """
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return pieces(self._open()(True, {"messages": turns, **_request(sampling, is_chat=True)}))  # noqa: FBT003  # Callable takes no keywords

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[TextPiece]:
        """Continue a text as it stands.

        Raises:
            InputError: llama.cpp refuses the prompt, as when it exceeds the context.
        """
        return pieces(self._open()(False, {"prompt": prompt, **_request(sampling, is_chat=False)}))  # noqa: FBT003  # Callable takes no keywords

    def next_scores(self, tokens: Sequence[int], most: int) -> Mapping[int, float]:
        """Return the log probabilities of the ``most`` likely next tokens; llama-cpp-python tells none.

        Raises:
            InputError: llama.cpp refuses the tokens, as when there are more than its context holds.
        """
        return self._score(list(tokens), most) if self._score else {}

    def close(self) -> None:
        """Free the model once the answers in flight are done."""
        self._ask = self._score = None

    def _open(self) -> Ask:
        if self._ask is None:
            raise UsageError("this language model is closed", "load the bundle again")
        return self._ask


class GgufBackend:
    """Opens GGUF files in llama.cpp."""

    extra = "gguf"

    def open(self, main: Path, options: EngineOptions) -> GgufEngine:
        """Load a file.

        Raises:
            MissingExtra: neither llama-cpp-python nor xllamacpp is installed.
            HealthError: llama.cpp refuses the file.
        """
        with main.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise HealthError(f"{main.name} is no GGUF file", "fetch or export the bundle again")
        threads = options.threads or len(os.sched_getaffinity(0))
        try:
            import llama_cpp
        except ModuleNotFoundError:
            return _open_xllamacpp(main, threads, options.context)
        return _open_llama_cpp(llama_cpp, main, threads, options.context)


def pieces(chunks: Iterator[Chunk]) -> Iterator[TextPiece]:
    """Turn OpenAI chunks into pieces of text; the last one carries why it ended and the token counts.

    Raises:
        InputError: a chunk is an error message.
    """
    finish: Literal["stop", "length"] = "stop"
    usage: Mapping[str, int] = {}
    said = 0
    for chunk in chunks:
        if "error" in chunk:
            raise InputError(f"llama.cpp refuses the request: {chunk['error'].get('message', chunk['error'])}")
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices", ()):
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            finish = "length" if choice.get("finish_reason") == "length" else finish
            scores = _scores(choice)
            if text or scores:
                said += 1
                yield TextPiece(text, scores=scores)
    yield TextPiece("", finish, usage.get("prompt_tokens", 0), usage.get("completion_tokens", said))


def _scores(choice: Mapping[str, Any]) -> tuple[TokenScore, ...]:
    told = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(
        TokenScore(
            one["token"],
            one["logprob"],
            tuple(one.get("bytes") or ()),
            tuple((top["token"], top["logprob"], tuple(top.get("bytes") or ())) for top in one.get("top_logprobs", ())),
        )
        for one in told
    )


def _request(sampling: Sampling, *, is_chat: bool) -> dict[str, Any]:
    """Return llama.cpp's own names; what is not said is left to it."""
    request: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stream": True,
    }
    said = {
        name: value
        for name in ("top_k", "min_p", "frequency_penalty", "presence_penalty", "seed")
        if (value := getattr(sampling, name)) is not None
    }
    if sampling.stop:
        said["stop"] = list(sampling.stop)
    if sampling.grammar:
        said["grammar"] = sampling.grammar
    if sampling.schema is not None:
        said["json_schema"] = sampling.schema
    if sampling.alternatives is not None:
        said |= (
            {"logprobs": True, "top_logprobs": sampling.alternatives}
            if is_chat
            else {"logprobs": max(1, sampling.alternatives)}
        )
    return {**request, **said}


def _open_xllamacpp(main: Path, threads: int, context: int) -> GgufEngine:
    with extra("gguf"):
        import xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path = str(main)
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = -1
    settings.warmup = settings.fit_params = settings.ui = settings.endpoint_slots = False
    settings.cache_ram_mib = 0
    # Its server also listens on a free loopback port that we do not use: nobody knows this key.
    settings.api_keys = [secrets.token_hex(16)]
    try:
        server = xllamacpp.Server(settings)
        # Deleting a server whose loop has not begun waits forever (seen in 2026.10): an answer proves that it has.
        server.handle_completions({"prompt": "a", "max_tokens": 1})
    except RuntimeError as error:
        raise HealthError(f"llama.cpp refuses {main.name}: {error}", "the file is damaged or too new") from error

    def ask(is_chat: bool, request: dict[str, Any]) -> Iterator[Chunk]:
        if is_chat:
            request["stream_options"] = {"include_usage": True}
        return _called_back(server.handle_chat_completions if is_chat else server.handle_completions, request)

    def score(tokens: list[int], most: int) -> dict[int, float]:
        asked = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": most, "cache_prompt": False}
        # An end or a half character comes without probabilities, so another token is said; they are those before that.
        answer = server.handle_completions({**asked, "logit_bias": [["a", 1000]]})
        if "error" in answer:
            raise InputError(f"llama.cpp refuses the tokens: {answer['error'].get('message', answer['error'])}")
        told = answer["choices"][0]["logprobs"]
        return {one["id"]: one["logprob"] for one in told["content"][0]["top_logprobs"]} if told else {}

    return GgufEngine(ask, f"xllamacpp {getattr(xllamacpp, '__version__', '')}".strip(), score)


def _called_back(call: Callable[..., object], request: dict[str, Any]) -> Iterator[Chunk]:
    """Turn a function that calls back for each chunk into an iterator; leaving it stops the generation."""
    arrived: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
    left = threading.Event()

    def take(chunk: Chunk) -> bool:
        arrived.put(chunk)
        return left.is_set()

    def work() -> None:
        try:
            call(request, take)
        except (ValueError, RuntimeError, TypeError) as error:
            arrived.put({"error": {"message": str(error)}})
        finally:
            arrived.put(None)

    threading.Thread(target=work, name="llama.cpp", daemon=True).start()
    try:
        while (chunk := arrived.get()) is not None:
            yield chunk
    finally:
        left.set()


def _as_llama_cpp_python(llama_cpp: Any, request: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401  # not typed
    """Make a grammar of what bounds the answer, as that package wants it.

    Raises:
        ValueError: probabilities are asked for, which it tells only where it keeps all logits in memory.
    """
    if "logprobs" in request:
        raise ValueError("llama-cpp-python tells no probabilities here; xllamacpp does")
    if "json_schema" in request:
        schema = json.dumps(request.pop("json_schema") or {"type": "object"})
        request["grammar"] = llama_cpp.LlamaGrammar.from_json_schema(schema, verbose=False)
    elif "grammar" in request:
        request["grammar"] = llama_cpp.LlamaGrammar.from_string(request["grammar"], verbose=False)
    return request


def _open_llama_cpp(llama_cpp: Any, main: Path, threads: int, context: int) -> GgufEngine:  # noqa: ANN401  # not typed
    try:
        model = llama_cpp.Llama(
            model_path=str(main), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise HealthError(f"llama.cpp refuses {main.name}: {error}", "the file is damaged or too new") from error
    lock = threading.Lock()

    def ask(is_chat: bool, request: dict[str, Any]) -> Iterator[Chunk]:
        with lock:
            try:
                request = _as_llama_cpp_python(llama_cpp, request)
                yield from (model.create_chat_completion if is_chat else model.create_completion)(**request)
            except (ValueError, RuntimeError) as error:
                yield {"error": {"message": str(error)}}

    return GgufEngine(ask, f"llama-cpp-python {llama_cpp.__version__}")


PLUGIN: Backend = GgufBackend()
