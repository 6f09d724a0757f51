"""Names work by its content: the model that goes in, the pass with its options, the data, the code. Runs nothing."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit import network_files, onnx_io
from edgekit.errors import CompressionError
from edgekit.model import GgufFile, LlamaFolder, OnnxNetwork
from edgekit.plugins import extra
from edgekit.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model

TOOLS = ("edgekit", "torch", "numpy", "onnx", "onnxruntime", "torch-pruning", "transformers", "scipy")
"""The packages whose version may change what a pass computes."""


def of_model(model: Model) -> str:
    """Return the SHA-256 of everything that a pass sees of a model: network, plan, ports and data.

    Raises:
        CompressionError: the network cannot be traced.
    """
    total = hashlib.sha256()
    for part in _network(model):
        total.update(hashlib.sha256(part).digest())
    ports = msgspec.json.encode((model.name, model.task, model.inputs, model.outputs, model.plan), order="sorted")
    total.update(ports)
    total.update(model.data.digest().encode() if model.data else b"")
    return total.hexdigest()


def _network(model: Model) -> Iterator[bytes]:
    """Give what the network is made of; of modules also their code, which trains otherwise than it is traced."""
    network = model.network
    if isinstance(network, OnnxNetwork):
        yield network.content or onnx_io.digest(network.path).encode()
    elif isinstance(network, LlamaFolder | GgufFile):
        raise CompressionError(f"{model.name} is a language model in a file of its own")
    else:
        yield network_files.tensors_to_bytes(network.module.state_dict())
        yield network_files.graph_bytes(trace(model))
        yield repr(network.module).encode()
        yield from _code(network.module)


def _code(module: torch.nn.Module) -> Iterator[bytes]:
    found = {type(part).__module__: sys.modules.get(type(part).__module__) for part in module.modules()}
    for name in sorted(found):
        place = getattr(found[name], "__file__", None)
        if place and not name.startswith("torch.") and Path(place).is_file():
            yield Path(place).read_bytes()


def of_pass(before: str, name: str, step: CompressionPass) -> str:
    """Return the SHA-256 of a pass at work: what went in, its options, the files they name, and all code."""
    options = msgspec.to_builtins(step)
    parts = [before, name, msgspec.json.encode(options, order="sorted").decode(), *_files(options), _source(type(step))]
    return hashlib.sha256("\0".join([*parts, code(), *(f"{k} {v}" for k, v in tools().items())]).encode()).hexdigest()


def _files(options: dict[str, object]) -> Iterator[str]:
    """Give the digest of every file that an option names, as a teacher's code and its checkpoint."""
    for key, value in sorted(options.items()):
        found = of_named(value) if isinstance(value, str) else ""
        if found:
            yield f"{key}={found}"


def of_named(named: str) -> str:
    """Return the SHA-256 of what a text names: a file, a folder, or code as `place_of` finds it; empty for none.

    Of a package that is all its code: what it offers mostly stands in another of its files.
    """
    path = place_of(named)
    if not named or not path.exists():
        return ""
    if path.name == "__init__.py":
        return folder_digest(path.parent, "*.py")
    return folder_digest(path) if path.is_dir() else file_digest(path)


def place_of(named: str) -> Path:
    """Return where that lies which a text names: a path, ``file.py:function``, ``package.module:function``."""
    path = Path(named)
    if path.exists() or ":" not in named:
        return path
    place = named.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return Path(place)
    return Path(found.origin) if found and found.origin else Path(place)


def _source(kind: type) -> str:
    place = inspect.getsourcefile(kind) if kind.__module__ in sys.modules else None
    return file_digest(Path(place)) if place and Path(place).is_file() else kind.__qualname__


@functools.cache
def code() -> str:
    """Return the SHA-256 over edgekit's own code that can change what a pass computes."""
    root = Path(__file__).parents[1]
    files = sorted([*root.glob("*.py"), *(root / "compress").rglob("*.py")])
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(root)}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


@functools.cache
def tools() -> dict[str, str]:
    """Return the version of every installed package that may change a result, and of Python."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Return the SHA-256 over the names and contents of all files below a folder, or of those of a pattern."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine() -> dict[str, str | int]:
    """Describe this machine as far as it may change a result: system, processor, threads."""
    with extra("compress"):
        import torch
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Return the processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "model\t"))]
    return names[0] if names else platform.processor() or platform.machine()
