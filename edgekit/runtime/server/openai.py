"""OpenAI's API for language models: models, chat, completions, whole or as a stream of events, and embeddings.

Knows no engine; `openai_requests` decodes what is asked.
Reference: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import EdgekitError, HealthError, InputError
from edgekit.runtime.backends import WAITING, TextPiece, TokenScore
from edgekit.runtime.server.exchange import HttpError, Request, Response, as_json, refusal
from edgekit.runtime.server.openai_requests import (
    Chat,
    Completion,
    Embeddings,
    messages_of,
    parse,
    prompt_of,
    sampling_of,
)
from edgekit.runtime.session import TextSession

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from edgekit.runtime.host import Host
    from edgekit.runtime.repository import Repository
    from edgekit.runtime.server.gate import Gate


class _Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is written: a chat or a completion, under which id, model and digest."""

    chat: bool
    id: str
    model: str
    digest: str
    created: int

    def piece(self, piece: TextPiece) -> dict[str, Any]:
        """Return one event of a stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": piece.finish or None, "logprobs": None}
        choice |= {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        choice["logprobs"] = self._scored(piece.scores)
        return self._frame("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def opening(self) -> dict[str, Any]:
        """Return the first event of a chat, which names the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": None}
        return self._frame("chat.completion.chunk", [choice])

    def whole(self, text: str, last: TextPiece, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": last.finish, "logprobs": self._scored(scores)}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._frame(kind, [choice]), "usage": _usage(last)}

    def usage(self, last: TextPiece) -> dict[str, Any]:
        """Return the event that carries the token counts."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._frame(kind, []), "usage": _usage(last)}

    def _scored(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not scores:
            return None
        if not self.chat:
            return {
                "tokens": [one.token for one in scores],
                "token_logprobs": [one.logprob for one in scores],
                "top_logprobs": [{token: logprob for token, logprob, _ in one.likely} for one in scores],
                "text_offset": [],
            }
        content = [
            {
                "token": one.token,
                "logprob": one.logprob,
                "bytes": one.bytes,
                "top_logprobs": [{"token": t, "logprob": p, "bytes": b} for t, p, b in one.likely],
            }
            for one in scores
        ]
        return {"content": content, "refusal": None}

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.digest,
            "choices": choices,
        }


def error_document(error: HttpError) -> dict[str, object]:
    """Give an error OpenAI's shape."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code or None}}


def models(served: Repository) -> Response:
    """Answer ``GET /v1/models``."""
    told = {"object": "model", "created": 0, "owned_by": "edgekit"}
    return as_json({"object": "list", "data": [{"id": host.session.contract.name, **told} for host in served]})


async def chat(host: Host, request: Request, gate: Gate) -> Response:
    """Answer ``POST /v1/chat/completions``."""
    asked = parse(request, Chat)
    messages, sampling = messages_of(asked), sampling_of(asked)
    return await _generate(host, (request, asked), lambda s: s.stream(messages, sampling), gate)


async def completions(host: Host, request: Request, gate: Gate) -> Response:
    """Answer ``POST /v1/completions``."""
    asked = parse(request, Completion)
    prompt, sampling = prompt_of(asked), sampling_of(asked)
    return await _generate(host, (request, asked), lambda s: s.complete(prompt, sampling), gate)


def embeddings(host: Host, request: Request) -> Response:
    """Answer ``POST /v1/embeddings``: vectors of texts, as numbers or as base64 of 32-bit floats (little-endian)."""
    asked = parse(request, Embeddings)
    contract = host.session.contract
    _refuse_other_model(asked.model, contract.name)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    vectors, tokens, digest = host.embed(texts)
    if asked.dimensions not in (None, vectors.shape[1]):
        raise HttpError(400, f"{contract.name} gives vectors of {vectors.shape[1]} numbers, not {asked.dimensions}")
    if asked.encoding_format == "base64":
        told: list[Any] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    else:
        told = vectors.tolist()
    listed = [{"object": "embedding", "index": number, "embedding": one} for number, one in enumerate(told)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    document = {"object": "list", "data": listed, "model": contract.name, "usage": usage, "system_fingerprint": digest}
    return as_json(document)


def _refuse_other_model(asked: str, name: str) -> None:
    if asked != name:
        raise HttpError(404, f"the model {asked!r} does not serve here; {name!r} does", "model_not_found")


async def _generate(
    host: Host,
    asked: tuple[Request, Chat | Completion],
    start: Callable[[TextSession], Iterator[TextPiece]],
    gate: Gate,
) -> Response:
    request, wish = asked
    contract = host.session.contract
    _refuse_other_model(wish.model, contract.name)
    generation = _Generating(host, start, (request.body, gate.limits.seconds))
    asyncio.wrap_future(gate.start(generation.work)).add_done_callback(generation.ended)
    leaving = asyncio.create_task(_watch(request, generation))
    with contextlib.ExitStack() as ending:  # however it ends: nobody reads on, and nobody watches the client
        ending.callback(leaving.cancel)
        ending.callback(generation.leave)
        first = await generation.next()
        shape = _Shape(
            chat=isinstance(wish, Chat),
            id=f"{'chatcmpl' if isinstance(wish, Chat) else 'cmpl'}-{uuid.uuid4().hex}",
            model=contract.name,
            digest=generation.digest,
            created=int(time.time()),
        )
        if wish.stream:
            ending.pop_all()
            usage = bool(wish.stream_options and wish.stream_options.include_usage)
            return Response(_events(generation, first, shape, (usage, leaving)), kind=b"text/event-stream")
        text, last, scores = "", first, [*first.scores]
        while not last.finish:
            text += last.text
            last = await generation.next()
            scores += last.scores
        return as_json(shape.whole(text, last, scores))


class _Generating:
    """A generation in a thread, read from the event loop. The lease is held to its end: a swap waits for nobody."""

    def __init__(
        self, host: Host, start: Callable[[TextSession], Iterator[TextPiece]], asked: tuple[bytes, float]
    ) -> None:
        self.digest = ""
        self._body, self._seconds = asked
        self._host = host
        self._start = start
        self._left = False
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[TextPiece | EdgekitError] = asyncio.Queue()

    def work(self) -> None:
        """Generate until the end, or until the client has left."""
        try:
            with self._host.lease() as session:
                self.digest = session.digest
                if not isinstance(session, TextSession):
                    raise InputError(f"{session.contract.name} is no language model", "use /v2/models/…/infer")
                said: list[str] = []
                for piece in self._start(session):
                    said.append(piece.text)
                    left = self._left
                    if piece.finish or left:  # noted before the answer ends: whoever has it may end the server
                        self._host.watch.said(session, self._body, "".join(said))
                    if piece != WAITING:
                        self._tell(piece)
                    if left:
                        self._tell(TextPiece("", "stop"))
                        break
        except EdgekitError as error:
            self._tell(error)

    def ended(self, work: asyncio.Future[None]) -> None:
        """Tell the reader where the thread died of something unforeseen: it would wait forever."""
        error = work.exception()
        if error is not None:
            self._arrived.put_nowait(HealthError(f"the generation failed: {type(error).__name__}: {error}"))

    async def next(self) -> TextPiece:
        """Return the next piece; raise what the generation raised.

        Raises:
            HttpError: 400 where the text is longer than the context; 504 where it takes too long, and then the
                generation ends with the piece in work.
        """
        try:
            async with asyncio.timeout(self._seconds):
                piece = await self._arrived.get()
        except TimeoutError as error:
            self.leave()
            raise HttpError(504, f"no piece of the answer within {self._seconds:g} s", "timeout") from error
        if isinstance(piece, EdgekitError):
            raise piece
        return piece

    def leave(self) -> None:
        """Stop after the piece in work: nobody reads on."""
        self._left = True

    def _tell(self, piece: TextPiece | EdgekitError) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, piece)


async def _watch(request: Request, generation: _Generating) -> None:
    await request.disconnected()
    generation.leave()


async def _events(
    generation: _Generating, piece: TextPiece, shape: _Shape, ending: tuple[bool, asyncio.Task[None]]
) -> AsyncGenerator[bytes, None]:
    with_usage, leaving = ending
    try:
        if shape.chat:
            yield _event(shape.opening())
        while not piece.finish:
            yield _event(shape.piece(piece))
            piece = await generation.next()
        yield _event(shape.piece(TextPiece("", piece.finish)))
        if with_usage:
            yield _event(shape.usage(piece))
        yield b"data: [DONE]\n\n"
    except EdgekitError as error:
        yield _event(error_document(refusal(error)))
    except HttpError as error:
        yield _event(error_document(error))
    finally:
        leaving.cancel()
        generation.leave()


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def _usage(last: TextPiece) -> dict[str, Any]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }
