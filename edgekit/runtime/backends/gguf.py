"""Runs GGUF language models in llama.cpp: through xllamacpp, or through llama-cpp-python where that alone is installed.

Both answer in OpenAI's chunks; this file turns them into pieces of text. xllamacpp computes several conversations in
one step and keeps earlier ones in memory; llama-cpp-python answers one after the other and keeps the last one only.
Knows nothing of HTTP.
"""

from __future__ import annotations

import functools
import json
import queue
import re
import secrets
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from edgekit import device_profiles
from edgekit.errors import ContextError, HealthError, InputError, MissingExtra, UsageError
from edgekit.plugins import extra
from edgekit.runtime import gguf_header, memory
from edgekit.runtime.backends import WAITING, TextPiece, TokenScore
from edgekit.runtime.company import Company
from edgekit.runtime.conversations import room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions, Message, Sampling
    from edgekit.runtime.company import Turn
    from edgekit.runtime.conversations import Room
    from edgekit.runtime.gguf_header import GgufHeader
    from edgekit.tensors import Array

    Chunk = Mapping[str, Any]
    Ask = Callable[[bool, dict[str, Any]], Iterator[Chunk]]
    Score = Callable[[list[int], int], Mapping[int, float]]
    Embed = Callable[[list[str]], tuple[list[list[float]], int]]

WAITING_SECONDS = 0.25
PIECE = 256
"""Tokens of a prompt that are computed in one step."""
_TOO_LONG = (
    re.compile(r"Requested tokens \((\d+)\) exceed (?:context window|batch size) of (\d+)"),  # llama-cpp-python
    re.compile(r"input \((\d+) tokens\) is too large to process.*current batch size: (\d+)"),  # xllamacpp, of vectors
)


@dataclass(frozen=True)
class _Job:
    """A file, and with how many threads, in how much room it is opened."""

    main: Path
    header: GgufHeader
    threads: int
    room: Room


@dataclass(frozen=True)
class _Calls:
    """What a package does for us; each raises `InputError` for what llama.cpp refuses, but ``ask`` tells it in a chunk.

    ``ask`` yields OpenAI chunks for a chat (true) or a completion (false). ``score`` gives the log probabilities of
    what comes after some tokens. ``embed`` gives vectors, and how many tokens it read.
    """

    ask: Ask
    embed: Embed
    score: Score | None = None


class GgufEngine:
    """A loaded language model."""

    def __init__(self, calls: _Calls, engine: str, job: _Job) -> None:
        self.engine = engine
        self.embeds = job.header.pools
        self.room = job.room
        self._has_template = bool(job.header.template)
        self._calls: _Calls | None = calls

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[TextPiece]:
        """Answer a conversation through the model's own chat template.

        Raises:
            ContextError: the conversation exceeds the context.
            InputError: llama.cpp refuses it, or the file has no chat template: llama.cpp would take another model's.
        """
        if not self._has_template:
            raise InputError("this model has no chat template", "ask it for a completion, or export it with one")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return pieces(self._open().ask(True, {"messages": turns, **_request(sampling, is_chat=True)}))  # noqa: FBT003  # Callable takes no keywords

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[TextPiece]:
        """Continue a text as it stands.

        Raises:
            ContextError: the prompt exceeds the context.
            InputError: llama.cpp refuses it.
        """
        return pieces(self._open().ask(False, {"prompt": prompt, **_request(sampling, is_chat=False)}))  # noqa: FBT003  # Callable takes no keywords

    def next_scores(self, tokens: Sequence[int], most: int) -> Mapping[int, float]:
        """Return the log probabilities of the ``most`` likely next tokens; llama-cpp-python tells none.

        Raises:
            InputError: llama.cpp refuses the tokens, as when there are more than its context holds.
        """
        score = self._open().score
        return score(list(tokens), most) if score else {}

    def embed(self, texts: Sequence[str]) -> tuple[Array, int]:
        """Return a vector of length 1 for each text, float32 [texts, width], and how many tokens were read.

        Raises:
            ContextError: a text exceeds the context.
            InputError: llama.cpp refuses it.
        """
        import numpy as np

        rows, tokens = self._open().embed(list(texts))
        vectors = np.asarray(rows, np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12)), tokens

    def close(self) -> None:
        """Free the model once the answers in flight are done."""
        self._calls = None

    def _open(self) -> _Calls:
        if self._calls is None:
            raise UsageError("this language model is closed", "load the bundle again")
        return self._calls


class GgufBackend:
    """Opens GGUF files in llama.cpp."""

    extra = "gguf"

    def open(self, main: Path, options: EngineOptions) -> GgufEngine:
        """Load a file.

        Raises:
            MissingExtra: neither llama-cpp-python nor xllamacpp is installed.
            HealthError: llama.cpp refuses the file.
        """
        header = gguf_header.read(main)
        threads = options.workers
        profile = device_profiles.detect()
        bytes_here = memory.of_device(profile.memory_mb if profile else 0)
        job = _Job(main, header, threads, room(header, bytes_here, threads=threads, asked=options.context))
        try:
            with extra(self.extra):
                import xllamacpp
        except MissingExtra:
            try:
                import llama_cpp
            except ModuleNotFoundError:
                pass
            else:
                return _open_llama_cpp(llama_cpp, job)
            raise
        return _open_xllamacpp(xllamacpp, job)


def pieces(chunks: Iterator[Chunk]) -> Iterator[TextPiece]:
    """Turn OpenAI chunks into pieces of text; the last one carries why it ended and the token counts.

    Raises:
        InputError: a chunk is an error message.
    """
    finish: Literal["stop", "length"] = "stop"
    usage: Mapping[str, Any] = {}
    said = 0
    for chunk in chunks:
        if not chunk:
            yield WAITING
        if "error" in chunk:
            raise _refusal(chunk["error"])
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices", ()):
            text = _text(choice)
            finish = "length" if choice.get("finish_reason") == "length" else finish
            scores = _scores(choice)
            if text or scores:
                said += 1
                yield TextPiece(text, scores=scores)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    yield TextPiece("", finish, usage.get("prompt_tokens", 0), usage.get("completion_tokens", said), cached)


def _text(choice: Mapping[str, Any]) -> str:
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def _refusal(error: Mapping[str, Any]) -> InputError:
    """Return our error for one of llama.cpp's."""
    if error.get("type") == "exceed_context_size_error":
        return ContextError(error["n_prompt_tokens"], error["n_ctx"])
    message = str(error.get("message", error))
    for too_long in _TOO_LONG:
        if found := too_long.search(message):
            return ContextError(int(found[1]), int(found[2]))
    return InputError(f"llama.cpp refuses the request: {message}")


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


def _open_xllamacpp(xllamacpp: Any, job: _Job) -> GgufEngine:  # noqa: ANN401  # not typed
    try:
        server = xllamacpp.Server(_settings(xllamacpp, job))
        # Deleting a server whose loop has not begun waits forever (seen in 2026.10): an answer proves that it has.
        if job.header.pools:
            server.handle_embeddings({"input": ["a"]})
        else:
            server.handle_completions({"prompt": "a", "max_tokens": 1})
    except RuntimeError as error:
        raise HealthError(f"llama.cpp refuses {job.main.name}: {error}", "the file is damaged or too new") from error

    company = Company(job.room.at_once)

    def ask(is_chat: bool, request: dict[str, Any]) -> Iterator[Chunk]:
        if is_chat:
            request["stream_options"] = {"include_usage": True}
        call = server.handle_chat_completions if is_chat else server.handle_completions
        return _called_back(call, request, company)

    def embed(texts: list[str]) -> tuple[list[list[float]], int]:
        answer = _taken(server.handle_embeddings({"input": texts}))
        return [one["embedding"] for one in answer["data"]], answer["usage"]["prompt_tokens"]

    def score(tokens: list[int], most: int) -> dict[int, float]:
        asked = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": most, "cache_prompt": False}
        # An end or a half character comes without probabilities, so another token is said; they are those before that.
        told = _taken(server.handle_completions({**asked, "logit_bias": [["a", 1000]]}))["choices"][0]["logprobs"]
        return {one["id"]: one["logprob"] for one in told["content"][0]["top_logprobs"]} if told else {}

    version = f"xllamacpp {getattr(xllamacpp, '__version__', '')}".strip()
    return GgufEngine(_Calls(ask, embed, score), version, job)


def _settings(xllamacpp: Any, job: _Job) -> Any:  # noqa: ANN401  # not typed
    settings = xllamacpp.CommonParams()
    settings.model.path = str(job.main)
    # Each conversation has a cache of its own: in a shared one, two long ones would end each other.
    settings.n_ctx = job.room.context * job.room.at_once
    settings.n_parallel = job.room.at_once
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = job.threads
    settings.verbosity = -1
    # Between the pieces of a long prompt the other conversations go on. 512 tokens take 7 MiB more, and no less time.
    settings.n_batch = settings.n_ubatch = PIECE
    settings.warmup = settings.fit_params = settings.ui = settings.endpoint_slots = False
    # What one conversation leaves when another takes its place goes here; the oldest is forgotten first.
    settings.cache_ram_mib = job.room.cache_mib
    settings.cache_idle_slots = False
    if job.header.pools:
        settings.embedding = True
        settings.n_batch = settings.n_ubatch = job.room.context
    # Its server also listens on a free loopback port that we do not use: nobody knows this key.
    settings.api_keys = [secrets.token_hex(16)]
    return settings


def _taken(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer, or raise the error that stands in its place."""
    if "error" in answer:
        raise _refusal(answer["error"])
    return answer


def _called_back(call: Callable[..., object], request: dict[str, Any], company: Company) -> Iterator[Chunk]:
    """Turn a function that calls back for each chunk into an iterator; leaving it stops the generation.

    While others are generated first, empty chunks come: whoever waits can leave between them.
    """
    arrived: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
    left, begun = threading.Event(), threading.Event()

    def take(turn: Turn, chunk: Chunk) -> bool:
        if any(map(_text, chunk.get("choices", ()))):  # a role, an end and counts come in one breath with a text
            turn.piece()
        arrived.put(chunk)
        return left.is_set()

    def work() -> None:
        try:
            with company.turn(left.is_set) as turn:
                begun.set()
                if turn:
                    call(request, functools.partial(take, turn))
        except (ValueError, RuntimeError, TypeError) as error:
            arrived.put({"error": {"message": str(error)}})
        finally:
            begun.set()
            arrived.put(None)

    threading.Thread(target=work, name="llama.cpp", daemon=True).start()
    try:
        while not begun.wait(WAITING_SECONDS):
            yield {}
        while (chunk := arrived.get()) is not None:
            yield chunk
    finally:
        left.set()
        company.look_again()


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


def _open_llama_cpp(llama_cpp: Any, job: _Job) -> GgufEngine:  # noqa: ANN401  # not typed
    job = replace(job, room=replace(job.room, at_once=1, cache_mib=0))
    settings: dict[str, Any] = {"n_ctx": job.room.context, "n_threads": job.threads, "n_threads_batch": job.threads}
    if job.header.pools:
        settings |= {"embedding": True, "n_batch": job.room.context, "n_ubatch": job.room.context}
    try:
        model = _counting(llama_cpp.Llama)(model_path=str(job.main), verbose=False, **settings)
    except (ValueError, RuntimeError, OSError) as error:
        raise HealthError(f"llama.cpp refuses {job.main.name}: {error}", "the file is damaged or too new") from error
    lock = threading.Lock()

    def ask(is_chat: bool, request: dict[str, Any]) -> Iterator[Chunk]:
        with lock:
            try:
                request = _as_llama_cpp_python(llama_cpp, request)
                model.began = None
                yield from (model.create_chat_completion if is_chat else model.create_completion)(**request)
            except (ValueError, RuntimeError) as error:
                yield {"error": {"message": str(error)}}
            else:
                cached, computed = model.began or (0, 0)
                details = {"cached_tokens": cached}
                yield {"usage": {"prompt_tokens": cached + computed, "prompt_tokens_details": details}}

    def embed(texts: list[str]) -> tuple[list[list[float]], int]:
        with lock:
            try:
                vectors, tokens = model.embed(texts, truncate=False, return_count=True)
            except (ValueError, RuntimeError) as error:
                raise _refusal({"message": str(error)}) from error
        return vectors, tokens

    return GgufEngine(_Calls(ask, embed), f"llama-cpp-python {llama_cpp.__version__}", job)


def _counting(kind: type[Any]) -> type[Any]:
    """Return ``Llama`` that notes how much of a prompt it had kept, and how much it computed: it does not tell."""

    class Counting(kind):  # type: ignore[misc]  # llama_cpp is imported late
        began: tuple[int, int] | None = None

        def eval(self, tokens: Sequence[int]) -> None:
            self.began = self.began or (self.n_tokens, len(tokens))
            super().eval(tokens)

    return Counting


PLUGIN: Backend = GgufBackend()
