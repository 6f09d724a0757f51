"""``edgekit doctor``: what is installed, what is missing, what that would enable, and the command that installs it.

Reads edgekit's own package metadata, so that no extra is listed twice. Imports none of the packages it looks for.
"""

from __future__ import annotations

import re
import shutil

import msgspec

import edgekit
from edgekit import device_profiles
from edgekit.cli._terminal import Terminal, command
from edgekit.device_profiles import machine

ENABLES = {
    "device": "HTTP server, pictures in, updates over MQTT with TUF",
    "onnx": "run ONNX bundles with ONNX Runtime",
    "tflite": "run LiteRT bundles",
    "gguf": "run language models with llama.cpp",
    "tensorrt": "run TensorRT engines on NVIDIA Jetson and servers",
    "coreml": "read and check Core ML programs",
    "compress": "quantize, prune and distil on the workstation",
    "export": "write ONNX, LiteRT, Core ML and GGUF",
    "fleet": "publish releases, roll them out, embedded broker",
    "all": "everything but TensorRT, which needs NVIDIA's own index",
    "dev": "tests and linters of edgekit itself",
    "bench": "the peers that the benchmarks run beside edgekit",
}
PROGRAMS = {"mosquitto": "a broker for a real fleet, and for the MQTT tests (the embedded one needs nothing)"}


class Package(msgspec.Struct, frozen=True):
    """One package that an extra installs; ``installed`` is empty where it is missing."""

    name: str
    wanted: str
    installed: str

    @property
    def is_good(self) -> bool:
        """Say whether it is there and not older than wanted."""
        least = re.search(r">=([\d.]+)", self.wanted)
        return bool(self.installed) and (least is None or _release(self.installed) >= _release(least[1]))


class Extra(msgspec.Struct, frozen=True):
    """One extra of edgekit, what it enables, and the state of its packages."""

    name: str
    enables: str
    packages: tuple[Package, ...]

    @property
    def lacking(self) -> list[str]:
        """Name the packages that are missing or too old."""
        return [f"{p.name} {p.installed} is too old" if p.installed else p.name for p in self.packages if not p.is_good]

    @property
    def install(self) -> str:
        """The exact command that installs it."""
        return f"pip install 'edgekit[{self.name}]'"


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
    for name, path in programs.items():
        terminal.say(f"\n{name}: {path or 'not found'} ({PROGRAMS[name]})")
    terminal.result(
        {
            "edgekit": edgekit.__version__,
            "machine": msgspec.to_builtins(here) | {"integer_dot_product": here.integer_dot_product},
            "profile": profile.name if profile else None,
            "extras": [_document(extra) for extra in extras],
            "programs": programs,
        }
    )


def find_extras() -> list[Extra]:
    """Read edgekit's extras and look up every package they would install."""
    from importlib import metadata

    try:
        requirements = metadata.requires("edgekit") or []
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return []
    packages: dict[str, list[Package]] = {}
    for line in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name:
            found = packages.setdefault(extra[1], [])
            if name[0] != "edgekit":
                found.append(_look_up(name[0], line[name.end() :].partition(";")[0].strip()))
    nested = _nested(requirements)
    return [
        Extra(name, ENABLES.get(name, ""), tuple(p for part in [name, *nested.get(name, ())] for p in packages[part]))
        for name in sorted(packages, key=_order)
    ]


def _find_program(name: str) -> str:
    # Debian keeps daemons in sbin, which is not on a user's PATH.
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin") or ""


def _order(extra: str) -> int:
    return list(ENABLES).index(extra) if extra in ENABLES else len(ENABLES)


def _nested(requirements: list[str]) -> dict[str, list[str]]:
    """Follow extras that are made of extras, as ``all`` is."""
    direct: dict[str, list[str]] = {}
    for line in requirements:
        found = re.match(r"edgekit\[([\w,-]+)\].*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if found:
            direct[found[2]] = found[1].split(",")
    return {name: _reach(direct, name) for name in direct}


def _reach(direct: dict[str, list[str]], name: str) -> list[str]:
    parts = direct.get(name, [])
    return list(dict.fromkeys([*parts, *(deeper for part in parts for deeper in _reach(direct, part))]))


def _look_up(name: str, wanted: str) -> Package:
    from importlib import metadata

    try:
        return Package(name, wanted, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Package(name, wanted, "")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


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
