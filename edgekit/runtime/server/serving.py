"""Runs the application: in this thread until a signal, or in a thread of another program.

Listens on loopback unless told otherwise. Knows no route and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from edgekit.errors import HealthError, ResourceError, from_os
from edgekit.plugins import extra
from edgekit.runtime.server import systemd
from edgekit.runtime.server.access import Access
from edgekit.runtime.server.app import App
from edgekit.runtime.server.gate import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgekit.runtime.host import Host
    from edgekit.runtime.repository import Repository
    from edgekit.runtime.server.connections import Connections
    from edgekit.runtime.server.grpc_server import GrpcServer

DRAIN_SECONDS = 30
START_SECONDS = 10.0
BACKLOG = 1024


class Running:
    """A server in a thread of this program. ``url`` is where it answers, ``grpc`` where it does over gRPC, else "".

    `stop` drains it.
    """

    def __init__(self, urls: tuple[str, str], stop: Callable[[], None], thread: threading.Thread) -> None:
        self.url, self.grpc = urls
        self._stop = stop
        self._thread = thread

    def stop(self) -> None:
        """Answer what is in flight, take nothing new, and end the thread. The models stay open."""
        self._stop()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a server listens, what it takes, and from whom.

    ``grpc_port`` 0 takes a free one, None serves HTTP alone.
    """

    address: str = "127.0.0.1"
    grpc_port: int | None = None
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)


def serve_in_thread(models: Host | Repository, port: int = 0, options: Options | None = None) -> Running:
    """Serve a model, or several, from a thread of its own; port 0 takes a free one. Returns when it answers.

    Raises:
        ResourceError: the port is taken or may not be used.
        UsageError: the files of TLS do not belong together.
        MissingExtra: httptools is not installed, or grpcio where gRPC is wanted.
    """
    server = _Server(models, options or Options())
    started: Future[Callable[[], None]] = Future()
    with contextlib.ExitStack() as opened:
        opened.callback(server.app.close)
        listener = opened.enter_context(listen(server.options.address, port))
        grpc = opened.enter_context(server.grpc_beside())
        closing = opened.pop_all()

    def run() -> None:
        try:
            with closing:
                asyncio.run(server.run(listener, started.set_result))
        finally:
            if not started.done():
                started.set_exception(HealthError("the server did not start, its thread's trace tells why"))

    thread = threading.Thread(target=run, name="edgekit-server", daemon=True)
    thread.start()
    return Running((_url(listener, server.options), grpc), started.result(START_SECONDS), thread)


def serve(
    models: Host | Repository,
    port: int,
    options: Options | None = None,
    *,
    on_ready: Callable[[str, str], None] = lambda *_urls: None,
) -> None:
    """Serve a model, or several, in this thread until SIGINT or SIGTERM, then drain.

    ``on_ready`` is told the URL, and that of gRPC or "". A second signal ends without waiting for the answers in work.

    Raises:
        ResourceError: the port is taken or may not be used.
        UsageError: the files of TLS do not belong together.
        MissingExtra: httptools is not installed, or grpcio where gRPC is wanted.
    """
    server = _Server(models, options or Options())
    with listen(server.options.address, port) as listener:

        def started(stop: Callable[[], None]) -> None:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop)
            on_ready(_url(listener, server.options), grpc)

        try:
            with server.grpc_beside() as grpc:
                asyncio.run(server.run(listener, started))
        finally:
            server.app.close()
            models.close()


def listen(address: str, port: int) -> socket.socket:
    """Take a port; connections wait in it until the server runs.

    Raises:
        ResourceError: names the address and the port.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # Named as TCP: asyncio switches Nagle's algorithm off only then, which else holds a body back for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except socket.gaierror as error:
        listener.close()
        raise ResourceError(f"there is no address {address!r} here: {error}", "use --host 127.0.0.1") from error
    except OSError as error:
        listener.close()
        raise from_os(error, f"cannot listen on {address} port {port}") from error
    except OverflowError as error:
        listener.close()
        raise ResourceError(f"{port} is no port: {error}", "use 0 to 65535; 0 takes a free one") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    address, port = listener.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _url(listener: socket.socket, options: Options) -> str:
    url = url_of(listener)
    return url if options.access.tls is None else url.replace("http://", "https://", 1)


class _Server:
    """The application, and the loop in which it is asked."""

    def __init__(self, models: Host | Repository, options: Options) -> None:
        with extra("device"):
            from edgekit.runtime.server import connection, connections
        self._grpc: GrpcServer | None = None
        self.options = options
        self.app = App(models, options.limits, options.access)
        self._connection, self._connections = connection, connections
        self._tls = options.access.tls.context() if options.access.tls else None

    @contextlib.contextmanager
    def grpc_beside(self) -> Iterator[str]:
        """Serve gRPC too where it is wanted, and tell its URL; without it not even our own modules are imported."""
        if self.options.grpc_port is None:
            yield ""
            return
        from edgekit.runtime.server.grpc_server import GrpcServer

        self._grpc = GrpcServer(self.app, self.options)
        url = self._grpc.start()
        try:
            yield url
        finally:
            self._grpc.stop()

    async def run(self, listener: socket.socket, started: Callable[[Callable[[], None]], None]) -> None:
        """Answer until the function is called that ``started`` is given, then drain; called again, end at once."""
        loop, ended, now = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def stop() -> None:
            (now if ended.is_set() else ended).set()

        everyone = self._connections.Connections(self.app, self.options.limits)
        server = await loop.create_server(
            lambda: self._connection.Connection(everyone), sock=listener, ssl=self._tls, backlog=BACKLOG
        )
        systemd.notify("READY=1")
        living = loop.create_task(_live())
        started(lambda: _called(loop, stop))
        await ended.wait()
        systemd.notify("STOPPING=1")
        living.cancel()
        server.close()
        impatient = loop.create_task(_cut(now, everyone, self._grpc))
        too = [asyncio.to_thread(self._grpc.stop)] if self._grpc else []
        await asyncio.gather(everyone.drain(DRAIN_SECONDS), *too)
        impatient.cancel()


def _called(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(stop)


async def _cut(now: asyncio.Event, everyone: Connections, grpc: GrpcServer | None) -> None:
    await now.wait()
    everyone.cut()
    if grpc:
        grpc.cut()


async def _live() -> None:
    while (seconds := systemd.watchdog_seconds()) is not None:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(seconds)
