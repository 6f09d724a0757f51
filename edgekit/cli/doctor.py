"""``edgekit doctor``: what is installed, what is missing, what that would enable, and the command that installs it.

And for every hardware class whether its files can be written and checked here.
"""

from __future__ import annotations

import shutil

import msgspec

import edgekit
from edgekit import device_profiles
from edgekit.cli._extras import Extra, find_extras
from edgekit.cli._targets import ability, runs_here
from edgekit.cli._terminal import Terminal, command
from edgekit.device_profiles import machine
from edgekit.errors import HealthError

TARGET_FIELDS = ("target", "format", "export", "parity", "engine")
PROGRAMS = {
    "mosquitto": "a broker for a real fleet, and for the MQTT tests (the embedded one needs nothing)",
    "qemu-x86_64-static": "x86 processors without 8-bit dot products, for edgekit verify --isa: qemu-user-static",
    "qemu-system-aarch64": "ARM processors, for edgekit emulator and verify --isa cortex-a76: qemu-system-arm",
}


@command(name="doctor")
def COMMAND(terminal: Terminal) -> None:  # noqa: N802  # the name by which the frame finds a command
    """Say what is installed, what is missing, and the command that installs it."""
    here = machine.describe()
    extras = find_extras()
    profile = device_profiles.detect()
    programs = {name: _find_program(name) for name in PROGRAMS}
    _tell_machine(terminal, here, profile.name if profile else "")
    terminal.say()
    terminal.table(("extra", "state", "enables"), [(e.name, _state(e), e.enables) for e in extras])
    _tell_missing(terminal, extras)
    classes = [device_profiles.load(name) for name in device_profiles.names()]
    targets = [(one.name, one.format, *ability(one), runs_here(one)) for one in classes]
    terminal.say()
    terminal.table(("target", "format", "can be written here", "checked by", "runs here"), targets)
    graphics = _tensorrt()
    terminal.say(f"\nTensorRT: {graphics}")
    for name, path in programs.items():
        terminal.say(f"\n{name}: {path or 'not found'} ({PROGRAMS[name]})")
    terminal.result(
        {
            "edgekit": edgekit.__version__,
            "machine": msgspec.to_builtins(here) | {"integer_dot_product": here.integer_dot_product},
            "profile": profile.name if profile else None,
            "extras": [_document(extra) for extra in extras],
            "targets": [dict(zip(TARGET_FIELDS, row, strict=True)) for row in targets],
            "programs": programs,
            "tensorrt": graphics,
        }
    )


def _tensorrt() -> str:
    """Say what builds and runs TensorRT's engines here, or what is missing."""
    from edgekit.runtime import tensorrt_tools

    try:
        found = tensorrt_tools.find()
    except HealthError as error:
        return f"{error.message}" + (f": {error.hint}" if error.hint else "")
    return f"engines are built by {found.builder} for {found.gpu.name}, {found.gpu.driver}"


def _find_program(name: str) -> str:
    # Debian keeps daemons in sbin, which is not on a user's PATH.
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin") or ""


def _state(extra: Extra) -> str:
    lacking = extra.lacking
    if not lacking:
        return "installed"
    return "missing" if len(lacking) == len(extra.packages) else f"{len(lacking)} of {len(extra.packages)} missing"


def _tell_machine(terminal: Terminal, here: machine.Machine, profile: str) -> None:
    terminal.say(f"edgekit {edgekit.__version__} on Python {here.python}, {here.system}")
    terminal.say(f"{here.cpu}, {here.arch}, {here.cores} cores, {here.memory_mib} MiB")
    dot = here.integer_dot_product
    terminal.say(f"int8: {dot} dot products" if dot else "int8: no dot product instruction; int8 may gain little here")
    terminal.say(f"hardware class: {profile or 'none matches; name one with --target'}")


def _tell_missing(terminal: Terminal, extras: list[Extra]) -> None:
    for extra in extras:
        if extra.lacking:
            terminal.say(f"\n{extra.name} lacks {', '.join(extra.lacking)}:\n    {extra.install}")
    if not extras:
        terminal.warn("edgekit is not installed as a package, so its extras are unknown; install it: pip install -e .")


def _document(extra: Extra) -> dict[str, object]:
    return {
        "name": extra.name,
        "complete": not extra.lacking,
        "enables": extra.enables,
        "lacking": extra.lacking,
        "packages": msgspec.to_builtins(extra.packages),
        "install": extra.install,
    }
