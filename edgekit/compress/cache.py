"""Keeps the result of every pass under a name made of its content, so that a killed run goes on where it was.

An entry is a folder written in one step; its files are checked by hash when it is read, and one that is damaged is
removed and computed again. Several runs may use one cache: a pass that another run works on is waited for. Knows no
pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit import network_files
from edgekit.compress import fingerprint, module_changes
from edgekit.compress.training import resumable
from edgekit.durable import new_folder
from edgekit.errors import CompressionError, EdgekitError
from edgekit.manifest import Step, Task
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.plan import QuantizationPlan
from edgekit.plugins import extra
from edgekit.saving import onnx_bytes
from edgekit.sources import first_line
from edgekit.tensors import TensorSpec
from edgekit.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model
    from edgekit.progress import Progress

LIMIT = 10 << 30
MEASURED = "measured"
LEFT_BEHIND_SECONDS = 24 * 3600
"""How old a scratch folder has to be before it counts as what a kill left."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file ``entry.json``: what a pass made, but for the tensors."""

    version: Literal[1] = 1
    kind: Literal["modules", "graph", "onnx"]
    changes: module_changes.Changes
    steps: tuple[Step, ...]
    plan: QuantizationPlan | None
    task: Task
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, str]


def default_folder() -> Path:
    """Return where a person's cache lies: ``$XDG_CACHE_HOME/edgekit/compress``, else below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edgekit" / "compress"


class Cache:
    """Finished passes in a folder of at most ``limit`` bytes; the one unused for longest leaves first."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder.resolve()
        self.limit = limit
        self.found: list[str] = []
        self.kept: list[str] = []
        self.notes: list[str] = []

    @property
    def measured(self) -> Path:
        """Where small files lie with what was measured once, as milliseconds; they never leave."""
        return self.folder / MEASURED

    def start(self, model: Model, *context: str) -> str | None:
        """Return the key of a model before its first pass, None where the model cannot be named by content.

        ``context`` is what else the results hang on, as the metric that judges them; where it names code, its content
        counts.
        """
        try:
            return "\0".join([fingerprint.of_model(model), *context, *map(fingerprint.of_named, context)])
        except CompressionError as error:
            self.notes.append(f"nothing is kept for a later run: {error.message}")
            return None

    def after(self, before: str | None, name: str, step: CompressionPass) -> str | None:
        """Return the key of what a pass makes of the model with the key ``before``."""
        return None if before is None else fingerprint.of_pass(before, name, step)

    def run(self, key: str | None, parent: Model, work: Callable[[], Model], progress: Progress) -> Model:
        """Return what ``work`` makes of ``parent``: from the cache, else computed and kept under ``key``.

        A training inside goes on from its last epoch (see `training.resumable`).
        """
        if key is None:
            return work()
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.notes.append(f"nothing is kept for a later run: {error.strerror}: {self.folder}")
            return work()
        with self._alone(key, progress):
            found = self.get(key, parent)
            if found is not None:
                self.found.append(key)
                return found
            unfinished = self.folder / f"{key}.training"
            with resumable(unfinished):
                result = work()
            kept = self.put(key, parent, result)
            shutil.rmtree(unfinished, ignore_errors=True)
        return kept

    def get(self, key: str, parent: Model) -> Model | None:
        """Return an entry that is there and whole, as a change of ``parent``; remove one that is damaged."""
        place = self.folder / key
        try:
            model = _restored(place, _checked(place), parent)
            os.utime(place)
        except FileNotFoundError:
            if place.exists():
                self._drop(place, "a file is missing")
            return None
        except (msgspec.DecodeError, ValueError, OSError, AttributeError, RuntimeError, EdgekitError) as error:
            self._drop(place, first_line(error))
            return None
        return model

    def put(self, key: str, parent: Model, result: Model) -> Model:
        """Keep a result, if it can be rebuilt exactly; return it as a later run will find it."""
        place = self.folder / key
        try:
            with new_folder(place) as scratch:
                entry = _write(parent, result, scratch)
                content = msgspec.json.encode(entry)
                (scratch / "entry.json").write_bytes(content)
                (scratch / "entry.sha256").write_text(hashlib.sha256(content).hexdigest())
                again = _restored(scratch, _checked(scratch), parent)
                _refuse_other(result, again)
        except EdgekitError as error:
            self.notes.append(f"{result.lineage[-1].name} is not kept for a later run: {error.message}")
            return result
        except OSError as error:
            self.notes.append(f"{result.lineage[-1].name} is not kept for a later run: {error.strerror or error}")
            return result
        self.kept.append(key)
        self._make_room(place)
        return again

    def _drop(self, place: Path, reason: str) -> None:
        self.notes.append(f"a damaged entry of the cache is computed again: {reason}")
        shutil.rmtree(place, ignore_errors=True)

    @contextlib.contextmanager
    def _alone(self, key: str, progress: Progress) -> Iterator[None]:
        """Work on a key alone; the system frees the lock of a process that dies."""
        try:
            import fcntl
        except ImportError:  # not on Windows: there two runs at once compute the same twice
            yield
            return
        with (self.folder / "locks" / key[:3]).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another run of this pass", 0, 0)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, newest: Path) -> None:
        now = time.time()
        entries = []
        for place in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another run makes room too
                if place.name.startswith("."):
                    if now - place.stat().st_mtime > LEFT_BEHIND_SECONDS:
                        shutil.rmtree(place, ignore_errors=True)
                elif place.name not in ("locks", MEASURED):
                    size = sum(file.stat().st_size for file in place.rglob("*"))
                    entries.append((place.stat().st_mtime, size, place))
        total = sum(size for _, size, _ in entries)
        for _, size, place in sorted(entries):
            if total <= self.limit or place == newest:
                continue
            shutil.rmtree(place, ignore_errors=True)
            total -= size


def _checked(place: Path) -> Entry:
    """Read what an entry says of itself; raise ValueError where a byte of it was changed."""
    content = (place / "entry.json").read_bytes()
    if hashlib.sha256(content).hexdigest() != (place / "entry.sha256").read_text(encoding="utf-8"):
        raise ValueError("entry.json was changed")
    entry = msgspec.json.decode(content, type=Entry)
    for name, wanted in entry.files.items():
        if fingerprint.file_digest(place / name) != wanted:
            raise ValueError(f"{name} was changed")
    return entry


def _write(parent: Model, result: Model, folder: Path) -> Entry:
    kind: Literal["modules", "graph", "onnx"] = "graph"
    changes: module_changes.Changes | None = module_changes.Changes()
    if isinstance(result.network, OnnxNetwork):
        kind = "onnx"
        (folder / "model.onnx").write_bytes(onnx_bytes(result.network))
    elif not isinstance(result.network, TorchNetwork):
        raise CompressionError("it is a language model in a file of its own")
    elif _is_graph(result.network):
        network_files.write(trace(result), folder)
    else:
        kind = "modules"
        module = result.network.module
        known = isinstance(parent.network, TorchNetwork)
        changes = module_changes.between(parent.network.module, module) if known else None  # type: ignore[union-attr]  # known says so
        tensors = network_files.tensors_to_bytes(module_changes.tensors_of(module))
        (folder / network_files.WEIGHTS).write_bytes(tensors)
    if changes is None or result.data is not parent.data or result.name != parent.name:
        raise CompressionError("the pass changed more than tensors, sizes and identities")
    return Entry(
        kind=kind,
        changes=changes,
        steps=result.lineage[len(parent.lineage) :],
        plan=result.plan,
        task=result.task,
        inputs=result.inputs,
        outputs=result.outputs,
        files={path.name: fingerprint.file_digest(path) for path in sorted(folder.iterdir())},
    )


def _restored(place: Path, entry: Entry, parent: Model) -> Model:
    network = parent.network
    if entry.kind == "onnx" and isinstance(network, OnnxNetwork):
        network = replace(network, content=(place / "model.onnx").read_bytes())
    elif entry.kind == "graph" and isinstance(network, TorchNetwork):
        network = replace(network, module=network_files.read(place))
    elif entry.kind == "modules" and isinstance(network, TorchNetwork):
        tensors = network_files.read_tensors(place / network_files.WEIGHTS)
        network = replace(network, module=module_changes.again(network.module, entry.changes, tensors))
    else:
        raise CompressionError("it belongs to another kind of network")
    return replace(
        parent,
        network=network,
        plan=entry.plan,
        task=entry.task,
        inputs=entry.inputs,
        outputs=entry.outputs,
        lineage=(*parent.lineage, *entry.steps),
    )


def _is_graph(network: TorchNetwork) -> bool:
    with extra("compress"):
        import torch
    return isinstance(network.module, torch.fx.GraphModule)


def _refuse_other(result: Model, again: Model) -> None:
    """Raise where what was rebuilt is not what was kept: on one batch, and in what it is made of."""
    import numpy as np

    if isinstance(result.network, TorchNetwork) and isinstance(again.network, TorchNetwork):
        if _is_graph(result.network):
            same = network_files.graph_bytes(trace(result)) == network_files.graph_bytes(trace(again))
        else:
            same = repr(result.network.module) == repr(again.network.module)
        if not same:
            raise CompressionError("it cannot be rebuilt exactly")
    if result.data is None:
        return
    sample = result.data.calibration.head(max(1, result.inputs[0].shape[0]))
    one, two = (model.network.run(sample.inputs) for model in (result, again))
    if not all(np.array_equal(one[name], two[name], equal_nan=True) for name in one):
        raise CompressionError("it cannot be rebuilt exactly")
