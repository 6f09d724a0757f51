"""``edgekit ota server``: run the fleet's service, with a broker of its own on loopback unless one is named."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet, _identity


@command(name="server")
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--broker", help="mqtts://HOST:PORT [default: an embedded one, loopback only]")
@click.option("--port", default=1883, show_default=True, type=click.IntRange(0, 65535), help="The embedded broker's.")
@_fleet.broker_files
@_identity.option("broker_ca", "broker_cert", "broker_key")
@_custody.options
def COMMAND(terminal: Terminal, *, fleet: Path, broker: str | None, port: int, **files: Any) -> None:  # noqa: N802, ANN401  # the frame's name; flags
    """Serve the fleet in the folder FLEET until interrupted."""
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
        store = open_store(fleet)
        stack.callback(store.close)
        stopping = stack.enter_context(stop_signal())
        url = broker or stack.enter_context(embedded(port))
        channel = mqtt.connect(url, f"edgekit-server-{store.name}", tls=tls)
        stack.callback(channel.close)
        service = Service(fleet, channel, store, unlock=unlock).start()
        stack.callback(service.stop)
        if broker is None:
            terminal.warn("the embedded broker has no access rules: it listens on this machine only (127.0.0.1)")
        root = fleet / "repository" / "metadata" / "1.root.json"
        terminal.say(f"fleet {store.name} is served over {url}")
        terminal.say(
            f"on a device: edgekit ota agent --state DIR --root {root} --device ID --target CLASS "
            f"--broker {url} --fleet {store.name}"
        )
        terminal.result({"fleet": store.name, "broker": url, "root": root})
        stopping.wait()
        terminal.say("stopping")
