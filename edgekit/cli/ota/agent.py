"""``edgekit ota agent``: keep this device at what its fleet wants, and serve the model that is installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from edgekit.cli import _listening
from edgekit.cli._terminal import Terminal, command, finite


@command(name="agent")
@click.option("--state", required=True, type=click.Path(path_type=Path), help="Where the device keeps its bundles.")
@click.option("--root", type=click.Path(path_type=Path), help="The fleet's 1.root.json; needed at the first start.")
@click.option("--device", required=True, help="The device's name in the fleet.")
@click.option("--target", required=True, help="Its hardware class; see: edgekit devices.")
@click.option("--broker", help="mqtt://HOST:PORT or mqtts://…")
@click.option("--fleet", default="fleet", show_default=True, help="The fleet's name.")
@click.option("--port", type=click.IntRange(0, 65535), help="Serve the model over HTTP here. [default: no server]")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads of the engine; 0: all cores.")
@click.option("--repository", type=click.Path(path_type=Path), help="Update from this folder instead, as a USB stick.")
@click.option("--model", help="With --repository: which model. [default: the only one]")
@click.option("--once", is_flag=True, help="End after the first update; the exit code says how it went.")
@click.option(
    "--timeout",
    default=60.0,
    show_default=True,
    callback=finite,
    help="With --once: wait so many seconds for an update.",
)
@_listening.options
def COMMAND(  # noqa: N802, PLR0913  # the name the frame looks for; one parameter an option
    terminal: Terminal,
    *,
    state: Path,
    root: Path | None,
    device: str,
    target: str,
    broker: str | None,
    fleet: str,
    port: int | None,
    threads: int,
    repository: Path | None,
    model: str | None,
    once: bool,
    timeout: float,
    **listening: Any,  # noqa: ANN401  # as click typed it
) -> None:
    """Keep this device at what its fleet wants, and serve the installed model."""
    from edgekit.cli.ota import _device
    from edgekit.cli.ota._serving import HostServing
    from edgekit.errors import UsageError
    from edgekit.ota.device.update import Device

    if (broker is None) == (repository is None):
        raise UsageError("an agent needs --broker or --repository, one of them", "--broker mqtt://HOST:1883")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _warn_of_class(terminal, target)
    _provision(state, root)
    _check_port(port)
    serving = HostServing(target, port, threads, state / "engines")
    serving.tell = terminal.say
    serving.listening = _listening.told(**listening)
    member = Device(name=device, profile=target, state=state, serving=serving)
    try:
        if repository is not None:
            stick = _device.Stick(repository, model)
            _device.update_from_folder(terminal, member, stick, stay=not once)
        elif broker is not None:
            link = _device.Link(broker, fleet, timeout if once else None)
            _device.obey_broker(terminal, member, link)
    finally:
        serving.close()


def _provision(state: Path, root: Path | None) -> None:
    from edgekit.errors import UsageError
    from edgekit.ota.device import trust

    if root is not None:
        trust.install_root(state, root.read_bytes())
    elif not (state / trust.ROOT).is_file():
        raise UsageError(
            f"{state} has no root of trust", "give it one: --root FLEET/repository/metadata/1.root.json of its fleet"
        )


def _warn_of_class(terminal: Terminal, target: str) -> None:
    """Warn where no profile has that name: a class of the fleet's own is fine, a slip of the pen waits for ever."""
    from edgekit import device_profiles
    from edgekit.errors import UnknownName

    if target not in device_profiles.names():
        error = UnknownName("class", target, device_profiles.names())
        terminal.warn(f"{error.message} ({error.hint}); only releases that name exactly it will come")


def _check_port(port: int | None) -> None:
    """Fail now where the port is taken, not when the first model arrives."""
    from edgekit.runtime.server.serving import listen

    if port:
        listen("127.0.0.1", port).close()
