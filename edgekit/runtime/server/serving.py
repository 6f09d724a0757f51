"""Runs the application on uvicorn: in this thread until a signal, or in a thread of another program.

Listens on loopback unless told otherwise. Knows no route.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from edgekit.errors import HealthError, ResourceError, from_os
from edgekit.plugins import extra
from edgekit.runtime.server import systemd
from edgekit.runtime.server.access import Access
from edgekit.runtime.server.app import App
from edgekit.runtime.server.gate import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.runtime.host import Host

DRAIN_SECONDS = 30
START_SECONDS = 10.0


class Running:
    """A server in a thread of this program. ``url`` is where it answers; `stop` drains it."""

    def __init__(self, url: str, server: Any, thread: threading.Thread) -> None:  # noqa: ANN401  # uvicorn is imported late
        self.url = url
        self._server = server
        self._thread = thread

    def stop(self) -> None:
        """Answer what is in flight, take nothing new, and end the thread. The host stays open."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a server listens, what it takes, and from whom."""

    address: str = "127.0.0.1"
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)


def serve_in_thread(host: Host, port: int = 0, options: Options | None = None) -> Running:
    """Serve ``host`` from a thread of its own; port 0 takes a free one. Returns when it answers.

    Raises:
        ResourceError: the port is taken or may not be used.
        UsageError: the files of TLS do not belong together.
        MissingExtra: uvicorn is not installed.
    """
    options = options or Options()
    server, app = _server(host, options)
    listener = listen(options.address, port)

    def run() -> None:
        server.run(sockets=[listener])
        app.close()
        listener.close()

    thread = threading.Thread(target=run, name="edgekit-server", daemon=True)
    thread.start()
    _await_start(server, thread)
    return Running(_url(listener, options), server, thread)


def serve(
    host: Host, port: int, options: Options | None = None, *, on_ready: Callable[[str], None] = lambda _url: None
) -> None:
    """Serve ``host`` in this thread until SIGINT or SIGTERM, then drain; ``on_ready`` is told the URL.

    Raises:
        ResourceError: the port is taken or may not be used.
        UsageError: the files of TLS do not belong together.
        MissingExtra: uvicorn is not installed.
    """
    options = options or Options()
    server, app = _server(host, options)
    listener = listen(options.address, port)
    with listener:
        on_ready(_url(listener, options))
        try:
            server.run(sockets=[listener])
        finally:
            app.close()
            host.close()


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
        listener.listen(1024)
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


def _server(host: Host, options: Options) -> tuple[Any, App]:
    with extra("device"):
        import uvicorn
    tls = options.access.tls.settings() if options.access.tls else {}
    app = App(host, options.limits, options.access)
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        **tls,
    )
    return _told(uvicorn.Server)(config), app


def _told(server: type[Any]) -> type[Any]:
    """Return uvicorn's server that tells systemd when it is ready, that its loop runs, and that it stops."""

    class Told(server):  # type: ignore[misc]  # uvicorn is imported late
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            systemd.notify("READY=1")
            self._living = asyncio.create_task(_live())

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            systemd.notify("STOPPING=1")
            self._living.cancel()
            await super().shutdown(sockets)

    return Told


async def _live() -> None:
    while (seconds := systemd.watchdog_seconds()) is not None:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(seconds)


def _await_start(server: Any, thread: threading.Thread) -> None:  # noqa: ANN401  # uvicorn is imported late
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise HealthError("the server did not start")
        time.sleep(0.002)
