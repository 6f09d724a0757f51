"""``edgekit ota server``: run the fleet's service, with a broker of its own on loopback unless one is named."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet, _identity

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.server.post import Post
    from edgekit.ota.server.store import Store


@command(name="server")
@_fleet.folder
@click.option("--broker", help="mqtts://HOST:PORT [default: an embedded one, loopback only]")
@click.option("--port", default=1883, show_default=True, type=click.IntRange(0, 65535), help="The embedded broker's.")
@click.option("--worker", help="This worker's name among those that share PostgreSQL. [default: HOST-PID]")
@_fleet.broker_files
@_identity.option("broker_ca", "broker_cert", "broker_key")
@_custody.options
def COMMAND(  # noqa: N802  # the name the frame looks for
    terminal: Terminal,
    *,
    fleet: Path,
    broker: str | None,
    port: int,
    worker: str | None,
    **files: Any,  # noqa: ANN401  # flags, as click typed them
) -> None:
    """Serve the fleet in the folder FLEET until interrupted.

    With a database in PostgreSQL several may serve one fleet: they split the reports, and one of them leads.
    """
    from edgekit.cli.ota._fleet import open_store, stop_signal
    from edgekit.errors import UsageError
    from edgekit.ota import mqtt
    from edgekit.ota.server.broker import embedded
    from edgekit.ota.server.service import Service

    tls = _fleet.tls(files, broker)
    unlock = _custody.unlock(files, may_ask=False)
    if tls and broker is None:
        raise UsageError("the embedded broker speaks no TLS", "name a broker: --broker mqtts://HOST:8883")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with ExitStack() as stack:
        store = open_store(fleet, who="")
        stack.callback(store.close)
        stopping = stack.enter_context(stop_signal())
        url = broker or stack.enter_context(embedded(port))
        post = _post(store, worker)
        channel = mqtt.connect(
            url,
            "-".join(["edgekit-server", store.name, *([post.name] if post else [])]),
            tls=tls,
            shares=post is not None,
        )
        stack.callback(channel.close)
        service = Service(fleet, channel, store, unlock=unlock)
        (service.join(post) if post else service).start()
        stack.callback(service.stop)
        if broker is None:
            terminal.warn("the embedded broker has no access rules: it listens on this machine only (127.0.0.1)")
        root = fleet / "repository" / "metadata" / "1.root.json"
        terminal.say(f"fleet {store.name} is served over {url}")
        terminal.say(
            f"on a device: edgekit ota agent --state DIR --root {root} --device ID --target CLASS "
            f"--broker {url} --fleet {store.name}"
        )
        terminal.result({"fleet": store.name, "broker": url, "root": root, "worker": post.name if post else None})
        stopping.wait()
        terminal.say("stopping")


def _post(store: Store, worker: str | None) -> Post | None:
    import os
    import socket

    from edgekit.errors import UsageError
    from edgekit.ota.device.update import require_identifier
    from edgekit.ota.server.post import Post

    if store.path is not None:
        if worker:
            raise UsageError("a fleet in a file has one server", "keep it in PostgreSQL: edgekit ota init --database")
        return None
    if worker:
        require_identifier(worker)
    return Post(store, worker or f"{socket.gethostname().partition('.')[0]}-{os.getpid()}")
