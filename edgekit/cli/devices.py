"""``edgekit devices``: which hardware classes there are, what is known of one, and which one this machine is."""

from __future__ import annotations

import click
import msgspec

from edgekit import device_profiles
from edgekit.cli._terminal import Terminal, command
from edgekit.errors import UsageError


@click.group(name="devices")
def COMMAND() -> None:  # noqa: N802  # the name by which the frame finds a command
    """List, show and detect hardware classes."""


@command(name="list")
def list_devices(terminal: Terminal) -> None:
    """List the hardware classes that --target knows."""
    profiles = [device_profiles.load(name) for name in device_profiles.names()]
    rows = [(p.name, p.title, ", ".join(p.formats), p.arch, f"{p.memory_mb} MB") for p in profiles]
    terminal.table(("name", "hardware", "formats", "arch", "memory"), rows)
    terminal.result({"devices": msgspec.to_builtins(profiles)})


@command(name="show")
@click.argument("name")
def show_device(terminal: Terminal, name: str) -> None:
    """Show what is known of the class NAME, or of a .toml file of your own."""
    profile = device_profiles.load(name)
    fields: dict[str, object] = msgspec.to_builtins(profile)
    terminal.table(("field", "value"), [(key, _text(value)) for key, value in fields.items() if value])
    terminal.result(fields)


@command(name="detect")
def detect_device(terminal: Terminal) -> None:
    """Name the class of this machine."""
    profile = device_profiles.detect()
    if profile is None:
        raise UsageError(
            "this machine matches no hardware class", "name one with --target; edgekit devices list shows them"
        )
    terminal.say(profile.name)
    terminal.result(msgspec.to_builtins(profile))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_text(item)}" for key, item in value.items() if item not in ("", None))
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


for _command in (list_devices, show_device, detect_device):
    COMMAND.add_command(_command)
