"""HTTP/1.1 on a socket: reads requests within bounds of size and time, and writes answers in their order.

Parsing is httptools'. Knows no route and no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools

from edgekit.runtime.server.exchange import HttpError, Response
from edgekit.runtime.server.heads import NOTHING, Head, Repeated, refuse_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable

    from edgekit.runtime.server.connections import Connections

log = logging.getLogger(__name__)

HEAD_BYTES = 32 << 10
"""More than the line and all headers of a request have to measure."""
HEAD_SECONDS = 10.0
"""From a request's first byte to the end of its headers."""
IDLE_SECONDS = 75.0
"""A kept connection may be silent for so long; clients that pool connections expect a minute."""
LINGER_SECONDS = 2.0
"""So long is read on what a refused client still sends: a connection closed before would take the answer with it."""
BODIES = 4
"""The bodies of all connections together may measure so many times the longest one."""
PILED = 128
"""So many requests of one connection may wait for those before them."""
JOINED_BYTES = 64 << 10
"""Up to here a body is copied behind its headers: one system call less costs more than the copy."""
FAILED = HttpError(500, "the server failed, its log tells why")
RETRY = ((b"retry-after", b"1"),)
LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Connection(asyncio.BufferedProtocol):
    """One client. Requests are answered one after the other, also those that came in one piece."""

    def __init__(self, everyone: Connections) -> None:
        self.deadline = 0.0
        self.since = 0.0  # when it last began to be idle
        self._everyone = everyone
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._parser = httptools.HttpRequestParser(self)
        self._head = NOTHING
        self._known: Repeated | None = None
        self._in_head = False
        self._waiting: deque[Head] = deque()
        self._task: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._error: HttpError | None = None
        self._is_read_no_more = self._is_paused = self._gone = self._owes_continue = False

    @property
    def is_idle(self) -> bool:
        """Say whether the client neither sends a request nor waits for an answer."""
        return not (self._task or self._waiting or self._writable or self._receives)

    @property
    def _receives(self) -> bool:
        return self._in_head or bool(self._head.method)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = transport
        self._wait(HEAD_SECONDS)
        self.since = self._loop.time()
        if not self._everyone.add(self):
            self._refuse(HttpError(503, f"{len(self._everyone)} clients are connected, more are not taken"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        """End: nobody waits for the answers in work."""
        self._gone = True
        self._everyone.remove(self)
        for head in (self._head, *self._waiting):
            self._forget(head)
        self._waiting.clear()
        for future in (self._lost, self._writable):
            if future and not future.done():
                future.set_result(None)
        if self._task:
            self._task.cancel()

    def pause_writing(self) -> None:
        """Hold answers back: the client does not read."""
        self._writable = self._loop.create_future()
        self._wait(self._everyone.limits.seconds)

    def resume_writing(self) -> None:
        """Go on."""
        writable, self._writable = self._writable, None
        if writable and not writable.done():
            writable.set_result(None)
        if self._task is None:
            self._wait(IDLE_SECONDS)
            self._next()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # asyncio's signature
        """Say where to read into: all connections share it, as each piece is looked at before the next is read."""
        return self._everyone.view

    def buffer_updated(self, nbytes: int) -> None:
        """Take what came, and answer what is complete."""
        if self._is_read_no_more:
            return
        known, everyone = self._known, self._everyone
        if known and nbytes == known.size and not self._receives and everyone.buffer.startswith(known.raw):
            self._take_again(known, bytes(everyone.view[len(known.raw) : nbytes]))
        else:
            self._parse(everyone.view[:nbytes])
        if self._waiting:
            self._next()
            if self._waiting:  # a client that asks on and on must wait, not be remembered
                self._is_paused = True
                self._transport.pause_reading()

    def _take_again(self, known: Repeated, body: bytes) -> None:
        self._head = known.again()
        try:
            self._everyone.app.admit(self._head.path, self._head.headers)
        except HttpError as error:
            self._refuse(error)
            return
        if body:
            self.on_body(body)
        self.on_message_complete()

    def _parse(self, piece: memoryview) -> None:
        was_in_head, was_between, before = self._in_head, not self._receives, len(self._waiting)
        rest: memoryview | bytes = piece
        while rest and not self._is_read_no_more:
            try:
                self._parser.feed_data(rest)
                rest = b""
            except httptools.HttpParserUpgrade as upgrade:
                rest = self._without_upgrade(bytes(rest[upgrade.args[0] :]))
            except httptools.HttpParserError as error:
                self._refuse(HttpError(400, f"this is no HTTP/1.1: {error}"))
        if was_in_head and self._in_head:
            self._measure_head(len(piece))
        if was_between and len(self._waiting) == before + 1 and not self._receives:
            self._known = Repeated.of(piece, self._waiting[-1])

    # What httptools calls, in this order.

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._is_read_no_more:
            self._head = Head()
            self._in_head = True
            self._wait(HEAD_SECONDS)

    def on_url(self, url: bytes) -> None:
        """Take a piece of the path."""
        if self._in_head:
            self._head.url += url
            self._measure_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; the last of one name counts."""
        if self._in_head:  # what comes behind a body in chunks says nothing of its request
            self._head.headers[name.lower()] = value
            self._measure_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Look at the request before its body comes."""
        if self._is_read_no_more:
            return
        head, self._in_head = self._head, False
        head.method = self._parser.get_method().decode("latin-1")
        head.version = self._parser.get_http_version()
        head.keep = self._parser.should_keep_alive()
        if self._parser.should_upgrade():
            return
        head.find_path()
        self._wait(self._everyone.limits.seconds)
        try:
            refuse_body(head.headers, self._everyone.limits.body)
            self._everyone.app.admit(head.path, head.headers)
        except HttpError as error:
            self._refuse(error)
            return
        if head.headers.get(b"expect", b"").lower() == b"100-continue" and head.version != "1.0":
            self._owes_continue = True
            self._continue()

    def on_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        if self._is_read_no_more:
            return
        head, everyone = self._head, self._everyone
        head.pieces.append(piece)
        head.size += len(piece)
        everyone.buffered += len(piece)
        if head.size > everyone.limits.body:
            self._refuse(HttpError(413, f"the body is longer than {everyone.limits.body} bytes"))
        elif everyone.buffered > BODIES * everyone.limits.body:
            self._refuse(HttpError(429, "the memory is full of other requests: come again later", "busy", RETRY))

    def on_message_complete(self) -> None:
        """Let the request wait for its turn."""
        if self._is_read_no_more or self._parser.should_upgrade():
            return
        self._owes_continue = False
        if len(self._waiting) >= PILED:
            self._refuse(HttpError(429, f"{PILED} requests wait on this connection: read the answers first", "busy"))
            return
        self._waiting.append(self._head)
        self._head = NOTHING

    # What `Connections` calls.

    def finish(self) -> None:
        """Close once what has begun is answered."""
        if self.is_idle:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    def expire(self) -> None:
        """Close, because the client took too long; what it waits for itself is bounded elsewhere."""
        if self._is_read_no_more or self._writable or self._transport.is_closing():
            self.abort()
        elif self._task:
            self._wait(IDLE_SECONDS)
        elif self._receives:
            self._refuse(HttpError(408, "the request did not arrive in time"))
        else:
            self._transport.close()

    def _wait(self, seconds: float) -> None:
        self.deadline = self._loop.time() + seconds

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Return a request that offers another protocol, as curl --http2 and Java do, as if it did not, to be read."""
        head = self._head
        if head.method == "CONNECT":
            self._refuse(HttpError(405, "this is no proxy"))
            return b""
        kept = [b"%b: %b\r\n" % pair for pair in head.headers.items() if pair[0] not in (b"connection", b"upgrade")]
        if b"close" in head.headers.get(b"connection", b"").lower() or head.version == "1.0":
            kept.append(b"connection: close\r\n")
        self._parser = httptools.HttpRequestParser(self)
        return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (head.method.encode(), head.url, b"".join(kept), rest)

    def _continue(self) -> None:
        """Let a client send its body that waits for a word, once those before are answered."""
        if self._owes_continue and self._task is None and not self._waiting:
            self._owes_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _measure_head(self, more: int) -> None:
        self._head.head_size += more
        if self._head.head_size > HEAD_BYTES and not self._is_read_no_more:
            self._refuse(HttpError(431, f"the headers have more than {HEAD_BYTES} bytes"))

    def _next(self) -> None:
        """Answer what waits, one after the other, until one takes its time."""
        while self._waiting and self._task is None and self._writable is None and not self._transport.is_closing():
            head = self._waiting.popleft()
            answer: Response | Awaitable[Response] | None = None
            try:
                answer = self._everyone.app.respond(head.request(self._disconnected))
            finally:
                if answer is None:  # asyncio logs what was raised, and closes the connection
                    self._forget(head)
                    self._write(head, self._refusal(head, FAILED))
            if isinstance(answer, Response) and isinstance(answer.body, bytes):
                self._write(head, answer)
                self._answered(head)
            else:
                self._task = self._loop.create_task(self._later(head, answer))
                self._task.add_done_callback(functools.partial(self._ended, head))
        self._continue()
        if self._error and not self._waiting and self._task is None:
            self._tell_error()
        elif self._is_paused and not self._waiting:
            self._is_paused = False
            self._transport.resume_reading()

    async def _later(self, head: Head, answer: Response | Awaitable[Response]) -> None:
        response = answer if isinstance(answer, Response) else await answer
        if isinstance(response.body, bytes):
            self._write(head, response)
        else:
            await self._stream(head, response, response.body)

    def _ended(self, head: Head, task: asyncio.Task[None]) -> None:
        self._task = None
        self._forget(head)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a request failed", exc_info=error)
            head.keep = False
            if head.begun:  # no status can be told any more: an end too soon says it
                self.abort()
            else:
                self._write(head, self._refusal(head, FAILED))
        if not self._gone:
            self._answered(head)
            self._next()

    def _answered(self, head: Head) -> None:
        self._forget(head)
        if not head.keep or self._everyone.closing:
            self._is_read_no_more = True
            self._transport.close()
        elif not self._receives and not self._writable:
            self.since = now = self._loop.time()
            self.deadline = now + IDLE_SECONDS

    def _forget(self, head: Head) -> None:
        if head.pieces:
            self._everyone.buffered -= sum(map(len, head.pieces))
            head.pieces = []

    def _write(self, head: Head, response: Response) -> None:
        body = response.body if isinstance(response.body, bytes) else b""
        lines = self._lines(head, response, b"content-length: %d\r\n" % len(body))
        if head.method == "HEAD":
            self._transport.write(lines)
        elif len(body) <= JOINED_BYTES:
            self._transport.write(lines + body)
        else:
            self._transport.write(lines)
            self._transport.write(body)

    async def _stream(self, head: Head, response: Response, body: AsyncGenerator[bytes, None]) -> None:
        """Write pieces as they come, in chunks; to a client of HTTP/1.0 as they are, until the connection ends."""
        chunked = head.version != "1.0"
        head.keep, head.begun = head.keep and chunked, True
        self._transport.write(self._lines(head, response, b"transfer-encoding: chunked\r\n" if chunked else b""))
        async with contextlib.aclosing(body):
            async for piece in body:
                if not piece:  # it would end the chunks
                    continue
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                if self._writable:
                    await self._writable
        if chunked:
            self._transport.write(b"0\r\n\r\n")

    def _lines(self, head: Head, response: Response, length: bytes) -> bytes:
        more = b"".join([b"%b: %b\r\n" % pair for pair in response.headers]) if response.headers else b""
        if not head.keep or self._everyone.closing:
            more += b"connection: close\r\n"
        elif head.version == "1.0":
            more += b"connection: keep-alive\r\n"
        told = (LINES[response.status], response.kind, length, more, self._everyone.date())
        return b"%bcontent-type: %b\r\n%b%b%b\r\n" % told

    def _refuse(self, error: HttpError) -> None:
        """Read no more requests; answer the one that came in with an error, after those before it."""
        if self._is_read_no_more or self._gone:
            return
        self._is_read_no_more, self._in_head, self._error = True, False, error
        self._forget(self._head)
        if not self._waiting and self._task is None:
            self._tell_error()

    def _tell_error(self) -> None:
        """Answer, and close; what the client still sends is thrown away for a while."""
        error, self._error = self._error, None
        self._head.keep = False
        if error:
            self._write(self._head, self._refusal(self._head, error))
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._loop.call_later(LINGER_SECONDS, self.abort)

    def _refusal(self, head: Head, error: HttpError) -> Response:
        return self._everyone.app.refuse(head.request(self._disconnected), error)

    async def _disconnected(self) -> None:
        if self._gone:
            return
        if self._lost is None:
            self._lost = self._loop.create_future()
        await asyncio.shield(self._lost)
