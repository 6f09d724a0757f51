"""One HTTP request and its response, as the routes see them. Knows no socket and no route."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

import msgspec

from edgekit.errors import ContextError, EdgekitError, EngineCrashed, InputError, MissingExtra, UsageError

JSON = b"application/json"


class HttpError(Exception):
    """A request that is answered with an error status; each protocol gives the message its own shape."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers


class Request(msgspec.Struct, frozen=True):
    """A request whose body has arrived whole. Names of headers are in small letters."""

    method: str
    path: tuple[str, ...]
    headers: Mapping[bytes, bytes]
    body: bytes
    disconnected: Callable[[], Awaitable[None]]


class Response(msgspec.Struct, frozen=True):
    """A status, a body (or a stream of pieces), its type, and further headers."""

    body: bytes | AsyncGenerator[bytes, None]
    status: int = 200
    kind: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


def as_json(document: object, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Response:
    """Return a response that holds a document."""
    return Response(msgspec.json.encode(document), status, headers=headers)


def refusal(error: EdgekitError) -> HttpError:
    """Return the status that an error of the runtime is answered with; one that passes says when to ask again."""
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, InputError):
        return HttpError(400, text, "context_length_exceeded" if isinstance(error, ContextError) else "")
    if isinstance(error, EngineCrashed):
        return HttpError(503, text, "", ((b"retry-after", b"%d" % math.ceil(error.retry_seconds)),))
    return HttpError(503 if isinstance(error, UsageError | MissingExtra) else 500, text)
