"""What is known of a hardware class: one TOML file each, the file name is the class's name.

Lists, loads and detects. Knows no engine and no exporter: `options` are read by the exporter of the format.
"""

from __future__ import annotations

import platform
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgekit.errors import UnknownName, UsageError


class Detection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Signs by which a machine shows that it belongs to the class; every given one has to match."""

    machine: str = ""
    device_tree: str = ""
    tegra: bool = False


class RuntimeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the engines of a class run, read on the device. What is missing there is left for the processor, and told.

    ``providers``: ONNX Runtime's execution providers in the order in which they are tried, before the processor; an
    empty list is the processor alone, none at all those that are installed on purpose. ``arena``: whether ONNX
    Runtime keeps its working memory between runs. ``delegate``: LiteRT's. ``compute_units``: Core ML's. ``batch``: so
    many samples are computed together at most, 0 for one by one; a batch waits ``batch_window_ms`` at most.
    """

    providers: tuple[Literal["tensorrt", "cuda", "openvino", "coreml", "xnnpack"], ...] | None = None
    arena: bool = True
    delegate: Literal["", "gpu", "edgetpu"] = ""
    compute_units: Literal["all", "cpu-and-ne", "cpu-and-gpu", "cpu-only"] = "all"
    batch: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    batch_window_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 5.0


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One hardware class: its formats in order of preference, how to lower a plan for it, and how its engines run.

    ``threads`` is what an engine takes where nobody says how many, and there are so many cores.
    ``emulate`` names the processor that stands for the class where its files are checked on a better one.
    """

    name: str
    title: str
    summary: str
    arch: Literal["x86_64", "aarch64", "armv7", "any"]
    isa: tuple[str, ...] = ()
    memory_mb: int
    threads: int
    formats: tuple[str, ...]
    options: dict[str, str | int | bool] = {}
    runtime: RuntimeSettings = RuntimeSettings()
    emulate: str = ""
    detect: Detection | None = None
    source: str

    @property
    def format(self) -> str:
        """The preferred format."""
        return self.formats[0]


def _files() -> dict[str, Path]:
    folder = Path(str(resources.files(__name__)))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def names() -> list[str]:
    """List the hardware classes edgekit knows."""
    return list(_files())


def load(name: str) -> DeviceProfile:
    """Read the profile of a hardware class by its name, or from a ``.toml`` file of the user's own.

    Raises:
        UnknownName: no such class.
        UsageError: the file is not a valid profile; says which field.
    """
    path = Path(name) if name.endswith(".toml") else _files().get(name)
    if path is None:
        raise UnknownName("target", name, names())
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert({"name": path.stem, **fields}, DeviceProfile)
    except FileNotFoundError as error:
        raise UsageError(f"there is no profile at {path}", "edgekit devices list shows the known ones") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is no device profile: {error}", "compare it with: edgekit devices show x86-64"
        ) from error


def of_format(name: str) -> DeviceProfile:
    """Return a profile of no hardware in particular for a file format; its variant is called as the format."""
    return DeviceProfile(
        name=name,
        title=f"any machine that runs {name}",
        summary="the format's own defaults",
        arch="any",
        memory_mb=0,
        threads=0,
        formats=(name,),
        source="",
    )


def detect(root: Path = Path("/"), machine: str | None = None) -> DeviceProfile | None:
    """Name the class of the machine whose file system is ``root``; ``None`` where no profile's signs match."""
    machine = machine or platform.machine()
    tree = _read(root / "proc/device-tree/model")
    tegra = (root / "etc/nv_tegra_release").exists()
    for name in names():
        signs = load(name).detect
        if signs and _matches(signs, machine, tree, tegra):
            return load(name)
    return None


def _matches(signs: Detection, machine: str, tree: str, tegra: bool) -> bool:
    return (
        (not signs.machine or signs.machine == machine)
        and signs.device_tree.lower() in tree.lower()
        and signs.tegra == tegra
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
