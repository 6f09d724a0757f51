"""All connections of a server: how many there may be, which are too slow, and when all have ended. Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from edgekit.runtime.server.connection import Connection
    from edgekit.runtime.server.exchange import HttpError, Request, Response
    from edgekit.runtime.server.gate import Limits

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
READ_BYTES = 256 << 10
"""So much of a connection is read at once."""
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Application(Protocol):
    """What answers requests."""

    def admit(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Look at a request whose body has not arrived.

        Raises:
            HttpError: it is refused, and its body is not read.
        """
        ...

    def respond(self, request: Request) -> Response | Awaitable[Response]:
        """Answer a request at once, or later; raises nothing that a client could cause."""
        ...

    def refuse(self, request: Request, error: HttpError) -> Response:
        """Answer a request, whose body may be missing, with an error."""
        ...


class Connections:
    """The connections of one application."""

    def __init__(self, app: Application, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.buffer = bytearray(READ_BYTES)
        self.view = memoryview(self.buffer)  # what asyncio reads into: of a bytearray TLS would fill a copy of the rest
        self.buffered = 0
        self.closing = False
        self._open: set[Connection] = set()
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._sweeping: asyncio.TimerHandle | None = None
        self._date = (0, b"")

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> bool:
        """Take a new connection in; where there are too many, one that is idle ends, or False is returned."""
        if len(self._open) >= self.limits.connections:
            idle = min((one for one in self._open if one.is_idle), key=lambda one: one.since, default=None)
            if idle is None or self.closing:
                return False
            self._open.discard(idle)
            idle.abort()
        self._open.add(connection)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(1.0, self._sweep)
        return True

    def remove(self, connection: Connection) -> None:
        """Forget one that is closed."""
        self._open.discard(connection)
        if self.closing and not self._open:
            self._ended.set()

    def date(self) -> bytes:
        """Return the header that tells the time, made once a second."""
        now = int(time.time())
        if now != self._date[0]:
            t = time.gmtime(now)
            told = f"{DAYS[t.tm_wday]}, {t.tm_mday:02} {MONTHS[t.tm_mon - 1]} {t.tm_year} "
            self._date = now, f"date: {told}{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} GMT\r\n".encode()
        return self._date[1]

    async def drain(self, seconds: float) -> None:
        """Close what is idle, let the others answer what they have begun, and cut off who takes longer."""
        self.closing = True
        for connection in tuple(self._open):
            connection.finish()
        if self._open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), seconds)
        self.cut()
        if self._sweeping:
            self._sweeping.cancel()

    def cut(self) -> None:
        """Close all connections now, whatever they do."""
        for connection in tuple(self._open):
            connection.abort()

    def _sweep(self) -> None:
        now = self._loop.time()
        for connection in tuple(self._open):
            if connection.deadline < now:
                connection.expire()
        self._sweeping = self._loop.call_later(1.0, self._sweep) if self._open else None
