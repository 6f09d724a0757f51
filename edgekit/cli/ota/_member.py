"""What a device of the fleet is made of: serving, what this machine has, whether its clock is set, its last resort."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.cli.ota._serving import HostServing
    from edgekit.ota.device.needs import Capabilities
    from edgekit.ota.device.update import Device
    from edgekit.ota.mqtt import Tls

    Command = TypeVar("Command", bound=Callable[..., Any])

UNSYNCHRONISED = 5
"""What adjtimex(2) answers where nothing keeps the clock (TIME_ERROR of timex.h)."""


def options(command: Command) -> Command:
    """Add the flags that `told` reads."""
    for add in (
        click.option(
            "--unsafe-without-sandbox",
            is_flag=True,
            help="Try models out in a process that may reach all that the agent may: where an accelerator needs that.",
        ),
        click.option("--factory-digest", default="", help="The SHA-256 that it must have; see: edgekit inspect."),
        click.option(
            "--factory",
            type=click.Path(path_type=Path),
            help="Serve this bundle where nothing that was installed is whole.",
        ),
    ):
        command = add(command)
    return command


def told(flags: dict[str, Any], name: str, state: Path, serving: HostServing, *, tls: Tls | None) -> Device:
    """Take the flags out of all flags, and return the device that they and the serving make; ``tls``: the broker's."""
    from edgekit.cli.ota import _conditions
    from edgekit.ota.device.factory import Factory
    from edgekit.ota.device.update import Device

    serving.scratch = state / "try-out"
    serving.is_shut_in = not flags.pop("unsafe_without_sandbox")
    folder, digest = flags.pop("factory"), flags.pop("factory_digest")
    return Device(
        name=name,
        profile=serving.profile,
        state=state,
        serving=serving,
        capabilities=capabilities(),
        clock_is_set=clock_is_set,
        factory=Factory(folder, digest) if folder else None,
        gate=_conditions.gate(flags, state),
        https=_conditions.https(flags, tls),
    )


def capabilities() -> Capabilities:
    """Tell the agent, which knows no engine, what this machine has."""
    from edgekit.ota.device.needs import Capabilities
    from edgekit.runtime import capabilities as here

    found = here.find()
    return Capabilities(found.formats, found.versions, found.instructions)


def clock_is_set() -> bool:
    """Say whether Linux knows its clock to be kept by NTP or the like (adjtimex(2)); elsewhere it is believed."""
    import ctypes
    import sys

    if sys.platform != "linux":
        return True
    nothing_to_change = ctypes.create_string_buffer(512)
    return bool(ctypes.CDLL(None).adjtimex(nothing_to_change) != UNSYNCHRONISED)
