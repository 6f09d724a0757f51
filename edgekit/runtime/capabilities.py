"""What this machine has that a variant may need: formats with an engine, versions, instructions. Opens no engine."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgekit import plugins
from edgekit.runtime import backends, memory

ENGINES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "ai-edge-litert": ("ai-edge-litert", "tflite-runtime"),
    "executorch": ("executorch",),
    "openvino": ("openvino",),
}
"""By the name in a variant's ``requires``: the packages that do, the first by the version that is asked for."""
BROUGHT = {"onnxruntime": ("opset",), "openvino": ("openvino_ir",)}
"""What comes with an engine, and whose newest version it does not tell: it says so itself when it loads a file."""
SYSTEMS = {"Darwin": "macos"}
SAME = {"asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "fphp": "fp16"}
"""From Linux's words for instructions to those of hardware classes."""


@dataclass(frozen=True)
class Found:
    """Formats, versions by name (empty: here, in a version nobody knows), and instructions."""

    formats: frozenset[str]
    versions: dict[str, str]
    instructions: frozenset[str]


def find(root: Path = Path("/")) -> Found:
    """Look at this machine, whose ``/proc`` lies under ``root``."""
    formats = frozenset(name for name in plugins.names(backends.__name__) if not backends.absence(name))
    versions = {"gguf": "3", "memory_mib": str(memory.of_device() >> 20)}
    for name, packages in ENGINES.items():
        here = {package: version for package in packages if (version := _installed(package))}
        if here:
            versions[name] = here.get(packages[0], "") if name != "onnxruntime" else next(iter(here.values()))
            versions |= dict.fromkeys(BROUGHT.get(name, ()), "")
    if platform.system() in SYSTEMS:
        versions[SYSTEMS[platform.system()]] = platform.mac_ver()[0]
    return Found(formats, versions, _instructions(root))


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _instructions(root: Path) -> frozenset[str]:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    fields = (line.partition(":") for line in lines)
    words = {word for name, _, value in fields if name.strip() in ("flags", "Features") for word in value.split()}
    return frozenset(words | {SAME[word] for word in words if word in SAME})
