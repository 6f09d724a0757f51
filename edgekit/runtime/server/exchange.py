"""One HTTP request and its response, as the routes see them. Knows ASGI's dictionaries; knows no route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    Scope = Mapping[str, Any]
    Receive = Callable[[], Awaitable[Mapping[str, Any]]]
    Send = Callable[[Mapping[str, Any]], Awaitable[None]]

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


class Disconnected(Exception):
    """The client went away before its request was complete: nobody waits for an answer."""


@dataclass(frozen=True)
class Request:
    """A request whose body has arrived whole."""

    method: str
    path: tuple[str, ...]
    headers: Mapping[bytes, bytes]
    body: bytes
    disconnected: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Response:
    """A status, a body (or a stream of pieces), its type, and further headers."""

    body: bytes | AsyncIterator[bytes]
    status: int = 200
    kind: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


def as_json(document: object, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Response:
    """Return a response that holds a document."""
    return Response(msgspec.json.encode(document), status, headers=headers)


async def read_request(scope: Scope, receive: Receive, limit: int) -> Request:
    """Collect a request's body.

    Raises:
        HttpError: 413 where the body is, or claims to be, longer than ``limit`` bytes; 415 where it is compressed.
        Disconnected: the client left in between.
    """
    headers = dict(scope["headers"])
    claimed = headers.get(b"content-length", b"0")
    if not claimed.isdigit() or int(claimed) > limit:
        raise HttpError(413, f"the body has {claimed.decode('latin-1')} bytes, at most {limit} are taken")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise HttpError(415, "compressed bodies are not taken: send it as it is")
    body = await _read_body(receive, limit)

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    path = tuple(part for part in scope["path"].split("/") if part)
    return Request(scope["method"], path, headers, body, disconnected)


async def _read_body(receive: Receive, limit: int) -> bytes:
    event = await receive()
    if event["type"] == "http.request" and not event.get("more_body"):
        whole: bytes = event.get("body", b"")
        if len(whole) <= limit:
            return whole
    pieces: list[bytes] = []
    size = 0
    while True:
        if event["type"] == "http.disconnect":
            raise Disconnected
        pieces.append(event.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            raise HttpError(413, f"the body is longer than {limit} bytes")
        if not event.get("more_body"):
            return b"".join(pieces)
        event = await receive()


async def send_response(send: Send, response: Response) -> None:
    """Write a response, piece by piece where it is a stream."""
    headers = [(b"content-type", response.kind), *response.headers]
    if isinstance(response.body, bytes):
        headers.append((b"content-length", str(len(response.body)).encode()))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})
        return
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    async for piece in response.body:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
