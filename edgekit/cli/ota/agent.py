"""``edgekit ota agent``: keep this device at what its fleet wants, and serve the model that is installed."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import _isolating, _listening, _watching
from edgekit.cli._terminal import Terminal, command, finite
from edgekit.cli.ota import _conditions, _fleet, _identity, _member

if TYPE_CHECKING:
    from edgekit.runtime.server import Options


@command(name="agent")
@click.option("--state", required=True, type=click.Path(path_type=Path), help="Where the device keeps its bundles.")
@click.option("--root", type=click.Path(path_type=Path), help="The fleet's 1.root.json; needed at the first start.")
@click.option("--device", required=True, help="The device's name in the fleet.")
@click.option("--target", required=True, help="Its hardware class; see: edgekit devices.")
@click.option("--broker", help="mqtts://HOST:PORT; on this machine mqtt:// as well.")
@click.option("--fleet", default="fleet", show_default=True, help="The fleet's name.")
@click.option("--group", "groups", multiple=True, help="Also obey what this group of the fleet is to run; repeatable.")
@click.option("--port", type=click.IntRange(0, 65535), help="Serve the model over HTTP here. [default: no server]")
@click.option("--threads", default=0, type=click.IntRange(0), help="Threads of the engine; 0: all cores.")
@click.option(
    "--repository",
    help="Update from this folder (a USB stick) or https:// URL instead; beside --broker a URL is tried first.",
)
@click.option("--model", help="With --repository: which model. [default: the only one]")
@click.option(
    "--every",
    type=click.FloatRange(1),
    callback=finite,
    help="With --repository: look for a new version every so many seconds. [default: 3600 of a URL, a folder once]",
)
@click.option("--once", is_flag=True, help="End after the first update; the exit code says how it went.")
@click.option(
    "--timeout",
    default=60.0,
    show_default=True,
    callback=finite,
    help="With --once: wait so many seconds for an update.",
)
@_fleet.broker_files
@_member.options
@_conditions.options
@_identity.option("device", "target", "fleet", "groups", "root", "broker", "broker_ca", "broker_cert", "broker_key")
@_isolating.options(default=True)
@_listening.options
@_watching.options
def COMMAND(  # noqa: N802, PLR0913  # the name the frame looks for; one parameter an option
    terminal: Terminal,
    *,
    state: Path,
    root: Path | None,
    device: str,
    target: str,
    broker: str | None,
    fleet: str,
    groups: tuple[str, ...],
    port: int | None,
    threads: int,
    repository: str | None,
    model: str | None,
    every: float | None,
    once: bool,
    timeout: float,
    isolate: bool,
    engine_timeout: float | None,
    **listening: Any,  # noqa: ANN401  # as click typed it
) -> None:
    """Keep this device at what its fleet wants, and serve the installed model."""
    from edgekit.cli.ota import _device
    from edgekit.cli.ota._serving import HostServing
    from edgekit.errors import UsageError

    place = _device.Place(repository, model, every) if repository else None
    if place and not place.is_url and _identity.gave("broker"):
        broker = None
    if not (broker or place) or (broker and place and not place.is_url):
        raise UsageError("an agent needs --broker or --repository, one of them", "--broker mqtts://HOST:8883")
    tls = _fleet.tls(listening, broker)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _warn_of_class(terminal, target)
    serving = HostServing(target, port, threads, state / "engines")
    serving.tell = terminal.say
    member = _member.told(listening, device, state, serving, tls=tls)
    _provision(state, root)  # not before the folder is known to lie on a disk
    if port is not None:  # 2.5 MB of memory that an agent without a port does without
        serving.listening = _listening.told(**listening)
        _check_ports(port, serving.listening)
    elif listening["grpc_port"] is not None:
        raise UsageError("--grpc-port serves beside HTTP", "give --port too")
    serving.isolation = _isolating.told(
        isolate=isolate, engine_timeout=engine_timeout, request_timeout=listening["request_timeout"]
    )
    serving.watch = _watching.told(listening)
    try:
        if broker:
            link = _device.Link(broker, fleet, timeout if once else None, tls, place, groups)
            _device.obey_broker(terminal, member, link)
        elif place:
            _device.update_from_repository(terminal, member, place, stay=not once)
    finally:
        serving.close()
        serving.watch.close()


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


def _check_ports(port: int, listening: Options) -> None:
    """Fail now where a port is taken, or gRPC's package is missing, not when the first model arrives."""
    from edgekit.plugins import extra
    from edgekit.runtime.server.serving import listen

    if listening.grpc_port is not None:
        with extra("grpc"):
            import grpc  # noqa: F401  # looked for only
    with contextlib.ExitStack() as taken:  # together: they may be the same
        for one in filter(None, (port, listening.grpc_port)):
            taken.enter_context(listen(listening.address, one))
