"""How fast a compressed model is here beside its original: both as the ONNX files that export would write, in turns.

Integers count: a plan is lowered into the file. One thread, so that a busy machine troubles both alike. A profile of
ONNX Runtime tells which layer takes how much of it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from msgspec.structs import replace as replace_fields

from edgekit import device_profiles, onnx_io, plugins
from edgekit.errors import CompressionError, UsageError
from edgekit.plugins import extra
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import onnx
    import onnxruntime

    from edgekit.compress.latency import Compared
    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Exporter
    from edgekit.model import Model
    from edgekit.tensors import Array

ROUNDS = (15, 300)
"""Fewest and most pairs of runs."""
SECONDS = 0.5
"""What the pairs may take together, but for the fewest."""
LEADING = ("DequantizeLinear", "Transpose", "ReorderInput")
"""What engines put before a layer that wants floats, or another layout, than the one before it gives."""
ENDINGS = ("_dequantized", "_quantized", "_q")
"""How integers of a weight are named, by edgekit and by ONNX Runtime, and floats that were made of them."""
FLOAT = 32
"""The width of a weight that stays float."""


class Speed:
    """Compares candidates with one original, whose file is written once: for ``profile``, else for this machine."""

    def __init__(self, original: Model, profile: DeviceProfile | None = None) -> None:
        found = profile or device_profiles.detect()
        self._profile = found if found and found.format == "onnx" else device_profiles.load("x86-64")
        self._original = original
        self._before: Callable[[], object] | None = None

    @property
    def note(self) -> str:
        """Say what is measured."""
        return (
            f"of one sample, as an ONNX file for {self._profile.name}, one thread, median of runs in turns with the "
            "original"
        )

    def compare(self, candidate: Model) -> Compared:
        """Return the milliseconds of one sample before and after.

        Raises:
            EdgekitError: a model cannot be written as ONNX, or there is no sample to run.
        """
        return self._compared(self._written(candidate).runner())

    def layers(self, candidates: Mapping[int, Model]) -> dict[str, dict[int, float]]:
        """Return the milliseconds of each planned weight by width: as in each candidate, and as float among integers.

        All that a file does is counted: what leads into a layer with it, all else with the layer before. Every other
        weight is left float at a time, since values between layers stay integers whatever the weights are.

        Raises:
            EdgekitError: a model cannot be written as ONNX, or ONNX Runtime fuses a layer past recognition.
        """
        first = next(iter(candidates.values()))
        names = _names(self._written(replace(first, plan=None)).content, first)
        order = list(dict.fromkeys(names.values()))
        asked = [(bits, model, order) for bits, model in candidates.items()]
        asked += [(FLOAT, _with_floats(first, some), some) for some in (order[::2], order[1::2])]
        compared: list[Compared] = []
        found: dict[str, dict[int, float]] = {name: {} for name in order}
        for bits, model, chosen in asked:
            file = self._written(model)
            compared.append(self._compared(file.runner()))
            shares = file.shares(names)
            for name in chosen:
                found[name][bits] = compared[-1].fraction * shares[name]
        once = statistics.median(each.before_ms for each in compared)  # one yardstick for all
        return {name: {bits: once * part for bits, part in parts.items()} for name, parts in found.items()}

    def _compared(self, after: Callable[[], object]) -> Compared:
        from edgekit.compress.latency import Compared

        if self._before is None:
            self._before = self._written(replace(self._original, plan=None)).runner()
        before = self._before
        for run in (before, after, before, after):
            run()  # warm caches, and memory that is claimed once
        pair = _seconds(before) + _seconds(after)
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / max(pair, 1e-6))))
        times = [(_seconds(before), _seconds(after)) for _ in range(rounds)]
        one, two = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
        return Compared(one, two)

    def _written(self, model: Model) -> _File:
        if model.data is None or not len(model.data.calibration):
            raise UsageError(f"the latency of {model.name} needs a sample", "give --data")
        exporter = cast("Exporter", plugins.load("edgekit.export.targets", "onnx", "format"))
        with tempfile.TemporaryDirectory() as folder:
            artifact = exporter.export(model, self._profile, Path(folder), silent)
            content = onnx_io.whole(Path(folder) / artifact.main)
        sample = model.data.calibration.head(max(1, artifact.batch))
        return _File(content, {port.key: sample.inputs[port.name] for port in artifact.inputs})


@dataclass(frozen=True)
class _File:
    """A model as ONNX, and one sample for it."""

    content: bytes
    inputs: Mapping[str, Array]

    def runner(self) -> Callable[[], object]:
        session = _session(self.content, _options())
        return lambda: session.run(None, self.inputs)

    def shares(self, names: Mapping[str, str]) -> dict[str, float]:
        """Return which share of the time each layer takes; ``names`` gives the layer of a weight in the float file.

        ONNX Runtime writes down what it runs, and that file is profiled as it is, so that each of its nodes is known.
        """
        proto = self._optimized("ORT_ENABLE_ALL")
        owners = _owners(proto, _marks(self._optimized("ORT_ENABLE_BASIC"), names))
        for number, node in enumerate(proto.graph.node):
            node.name = str(number)
        spent = _profiled(proto, self.inputs)
        lost = sorted(set(names.values()) - set(owners))
        if lost:
            raise CompressionError(f"ONNX Runtime runs {lost[0]!r} as part of something else, so it has no time")
        found = dict.fromkeys(names.values(), 0.0)
        now = next(owner for owner in owners if owner)
        for number, owner in enumerate(owners):
            now = owner or now
            found[now] += spent[str(number)]
        whole = sum(found.values()) or 1.0
        return {name: time / whole for name, time in found.items()}

    def _optimized(self, level: str) -> onnx.ModelProto:
        import onnx
        import onnxruntime

        options = _options()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            _session(self.content, options)
            return onnx.load(options.optimized_model_filepath)


def _options() -> onnxruntime.SessionOptions:
    with extra("onnx"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _session(content: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _names(floats: bytes, planned: Model) -> dict[str, str]:
    """Return the planned weights by the names that they have in the file, without the endings of other forms.

    ONNX Runtime makes integers of a float weight between integer values, and names them after the node.
    """
    import onnx

    from edgekit.export.onnx_weights import Weights, planned_nodes

    if planned.plan is None:
        raise CompressionError(f"{planned.name} has no plan")
    items = planned_nodes(Weights(onnx.load_from_string(floats)), planned, planned.plan)
    return {item.weight: item.name for item in items} | {f"{item.node.name}_weight": item.name for item in items}


def _with_floats(model: Model, names: Collection[str]) -> Model:
    """Return the model with some of its weights float, as mixed_precision leaves them."""
    plan = model.plan
    rules = {name: rule for name, rule in plan.weights.items() if name not in names} if plan else {}
    if plan is None or not rules:
        raise CompressionError(f"{model.name} has only one layer, so there is nothing to choose between")
    return replace(model, plan=replace_fields(plan, weights=rules))


def _marks(proto: onnx.ModelProto, names: Mapping[str, str]) -> dict[str | bytes, str]:
    """Return by what each layer is known in an optimized file: its weight's name, or its numbers in any order.

    ``proto`` is the file with its constants computed, but nothing put into other layouts.
    """
    marks: dict[str | bytes, str] = {}
    for tensor in proto.graph.initializer:
        stem = next((tensor.name.removesuffix(end) for end in ENDINGS if tensor.name.endswith(end)), tensor.name)
        owner = names.get(stem)
        if owner is not None:
            marks |= {tensor.name: owner, _numbers(tensor): owner}
    return marks


def _numbers(tensor: onnx.TensorProto) -> bytes:
    """Return the numbers of a weight in order: kernels that want blocks of channels move them, and fill up with 0."""
    import numpy as np
    from onnx import numpy_helper

    flat = numpy_helper.to_array(tensor).reshape(-1)
    return np.sort(flat[flat != 0], kind="stable").tobytes()  # the other kind leaves halves unsorted on some processors


def _owners(proto: onnx.ModelProto, marks: Mapping[str | bytes, str]) -> list[str]:
    """Return for each node the layer that it computes or leads into, empty where it is none."""
    known: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        mark: str | bytes = tensor.name if tensor.name in marks or len(tensor.dims) < 2 else _numbers(tensor)
        if mark and mark in marks:  # a weight of zeros has no numbers to be known by
            known[tensor.name] = marks[mark]
    owners = [next((known[name] for name in node.input if name in known), "") for node in proto.graph.node]
    takers: dict[str, set[str]] = {}
    for number, node in reversed(list(enumerate(proto.graph.node))):
        if not owners[number] and node.op_type in LEADING:
            found = set().union(*(takers.get(name, {""}) for name in node.output))
            owners[number] = found.pop() if len(found) == 1 else ""
        for name in node.input:
            takers.setdefault(name, set()).add(owners[number])
    return owners


def _profiled(proto: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, float]:
    """Run a file as it is and return the microseconds of its nodes, by name: the mean of the middle half of the runs.

    A median would be a whole number, which says little of a node that takes two.
    """
    import onnxruntime

    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _session(proto.SerializeToString(), options)
        once = min(_seconds(lambda: session.run(None, inputs)) for _ in range(2))
        for _ in range(max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / max(once, 1e-6))))):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    spent: dict[str, list[int]] = {node.name: [] for node in proto.graph.node}
    for event in events:
        name = str(event.get("name")).removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name in spent:
            spent[name].append(event["dur"])
    return {name: _middle(sorted(times)) for name, times in spent.items()}


def _middle(ordered: list[int]) -> float:
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut]) if ordered else 0.0


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
