"""How good and how large a model is: a metric with its interval, parameters, bytes. Changes nothing."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit import grid, workload
from edgekit.compress import intervals, metrics
from edgekit.compress.macs import macs
from edgekit.compress.metrics import Answers, Metric, drop
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError, InputError, UsageError
from edgekit.model import BATCH, GgufFile, LlamaFolder, OnnxNetwork, TorchNetwork, run_batched, whole_batches
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.compress.recipe import Recipe
    from edgekit.model import Data, Model, Network, Split
    from edgekit.tensors import Array

__all__ = [
    "Judge", "Score", "Teacher", "agreement", "drop", "figures", "judge", "macs", "parameters", "score", "stored_bytes",
    "teacher_of", "top1",
]  # fmt: skip

REMEMBERED = 256 << 20
"""Bytes of the reference's answers that a `Judge` keeps."""

FUNCTION_RESAMPLES = 200
"""Calls of a user's function for its interval."""


class Score(msgspec.Struct, frozen=True):
    """A figure with its 95 % interval, NaN where there is none, and the same by class and by group of the samples."""

    metric: str
    value: float
    low: float
    high: float
    samples: int
    by_class: dict[str, float] = {}
    by_group: dict[str, float] = {}


@dataclass(frozen=True)
class Teacher:
    """What a recipe distils from, in the words of the pass; loaded when somebody first asks what it answers."""

    source: str
    checkpoint: str
    data: Data | None

    @functools.cached_property
    def network(self) -> Network:
        """The network that teaches, in float.

        Raises:
            UsageError: it cannot be found or read.
        """
        return workload.load(self.source, Path(self.checkpoint) if self.checkpoint else None, self.data).network

    @property
    def told(self) -> str:
        """What a person calls it; no path of this machine."""
        return f"the teacher {Path(self.source).name}"


def teacher_of(model: Model, recipe: Recipe) -> Teacher | None:
    """Return the last teacher of a recipe, None where it distils nothing."""
    steps = [step for _, step in recipe.passes if isinstance(getattr(step, "teacher", None), str)]
    if not steps:
        return None
    source, checkpoint = (str(getattr(steps[-1], name, "")) for name in ("teacher", "teacher_checkpoint"))
    return Teacher(source, checkpoint, model.data)


class Judge:
    """Scores many models on one split by one metric; computes the reference once.

    Likeness is that to ``reference``, or to its ``teacher``: a student that has learned is no longer like the one that
    knew nothing. ``compares`` says whether the metric asked for it.

    Raises:
        UsageError: the split has not what the metric needs, or no samples.
    """

    def __init__(
        self, reference: Model, split: Split, metric: Metric | str | None = None, *, teacher: Teacher | None = None
    ) -> None:
        self.metric = metric if isinstance(metric, Metric) else metrics.choose(metric, _judged_on(reference, split))
        self._split, self._size = whole_batches(reference, split)
        if not len(self._split):
            raise UsageError("there is no sample to judge a model by", "give a validation or test split")
        metrics.refuse_unfit(self.metric, self._split)
        self._reference = reference
        self._teacher = teacher
        self.compares = False
        self._remembered: dict[int, Mapping[str, Array]] = {}
        self._bytes = 0

    def score(self, model: Model) -> Score:
        """Measure a model, its plan applied.

        Raises:
            CompressionError: it gives NaN or infinity, or something that the metric cannot judge.
        """
        try:
            if self.metric.whole is not None:
                return self._whole(model, self.metric.whole)
            rows = self._rows(planned_network(model), own=model is self._reference and self._teacher is None)
        except InputError as error:
            raise CompressionError(f"{model.name} cannot be judged: {error.message}", error.hint) from error
        low, high = _interval(self.metric, rows)
        return Score(
            metric=self.metric.name,
            value=self.metric.figure(rows),
            low=low,
            high=high,
            samples=len(rows),
            by_class=self._by_class(rows, self._reference.data),
            by_group=_by_part(self._split.groups, lambda chosen: self.metric.figure(rows[chosen])),
        )

    def _rows(self, network: Network, *, own: bool) -> Array:
        import numpy as np

        if self.metric.rows is None:
            raise UsageError(f"{self.metric.name} has no rows", "give it a function for a batch or for the whole")
        parts = []
        for number, batch in enumerate(self._split.batches(self._size)):
            outputs = run_batched(network, batch, self._size)
            ask = functools.partial(self._asked, number, batch, outputs if own else None)
            parts.append(self.metric.rows(Answers(outputs, batch, ask)))
        return np.concatenate(parts)

    def _asked(self, number: int, batch: Split, own: Mapping[str, Array] | None) -> Mapping[str, Array]:
        self.compares = True
        found = own or self._remembered.get(number)
        if found is None:
            found = self._wanted(batch)
            size = sum(array.nbytes for array in found.values())
            if self._bytes + size <= REMEMBERED:
                self._remembered[number] = found
                self._bytes += size
        return found

    def _wanted(self, batch: Split) -> Mapping[str, Array]:
        if self._teacher is None:
            return run_batched(planned_network(self._reference), batch, self._size)
        answers = run_batched(self._teacher.network, batch, self._size)
        # a teacher has its own names for its outputs: it is learned from by their order
        return dict(zip((spec.name for spec in self._reference.outputs), answers.values(), strict=False))

    def _whole(self, model: Model, function: Callable[[Mapping[str, Array], Split], float]) -> Score:
        import numpy as np

        outputs = run_batched(planned_network(model), self._split, self._size)

        def figure(chosen: Array) -> float:
            return function({n: a[chosen] for n, a in outputs.items()}, self._split.take(chosen))

        value = function(outputs, self._split)
        try:
            low, high = intervals.bootstrap(np.arange(len(self._split)), figure, FUNCTION_RESAMPLES)
            groups = _by_part(self._split.groups, figure)
        except (UsageError, CompressionError):  # a part of the samples may lack what the function divides by
            low, high, groups = math.nan, math.nan, {}
        return Score(self.metric.name, value, low, high, len(self._split), {}, groups)

    def _by_class(self, rows: Array, data: Data | None) -> dict[str, float]:
        labels, names = self._split.labels, data.labels if data else ()
        if labels is None or labels.dtype.kind not in "iu" or labels.ndim != 1:
            return {}
        if self.metric.by_class:
            found = {str(c): value for c, value in self.metric.by_class(rows).items()}
        else:
            found = _by_part(labels, lambda chosen: self.metric.figure(rows[chosen]))
        return {names[int(c)] if int(c) < len(names) else c: value for c, value in found.items()}


def _judged_on(model: Model, split: Split) -> Model:
    """Return the model as if ``split`` were all it is judged on: another may have labels that this one lacks."""
    return replace(model, data=model.data and replace(model.data, validation=split, test=None))


def judge(
    model: Model,
    reference: Model,
    split: Split,
    metric: Metric | str | None = None,
    *,
    teacher: Teacher | None = None,
) -> Score:
    """Measure a model, its plan applied, beside the reference it came from; see `Judge`."""
    return Judge(reference, split, metric, teacher=teacher).score(model)


def _interval(metric: Metric, rows: Array) -> tuple[float, float]:
    if rows.dtype == bool:
        return intervals.wilson(float(rows.sum()), len(rows))
    return intervals.bootstrap(rows, metric.figure)


def _by_part(parts: Array | None, figure: Callable[[Array], float]) -> dict[str, float]:
    import numpy as np

    return {} if parts is None else {str(part): figure(np.flatnonzero(parts == part)) for part in np.unique(parts)}


def top1(network: Network, split: Split, batch: int = BATCH) -> float:
    """Return the share of samples whose highest score is at their label.

    Raises:
        UsageError: the split has no labels.
        InputError: the first output holds no scores [samples, classes].
    """
    return _share("top1", network, network, split, batch=batch)


def agreement(network: Network, reference: Network, split: Split, batch: int = BATCH) -> float:
    """Return the share of samples for which both networks choose the same class."""
    return _share("agreement", network, reference, split, batch=batch)


def _share(name: str, network: Network, reference: Network, split: Split, *, batch: int) -> float:
    metric = metrics.METRICS[name]
    metrics.refuse_unfit(metric, split)
    answers = Answers(run_batched(network, split, batch), split, lambda: run_batched(reference, split, batch))
    return metric.figure(metric.rows(answers)) if metric.rows else math.nan


def score(model: Model, reference: Model, split: Split) -> tuple[str, float]:
    """Measure a model, its plan applied: ``top1`` where there are labels, else ``agreement`` with the reference."""
    found = judge(model, reference, split, "agreement" if split.labels is None else "top1")
    return found.metric, found.value


def figures(
    model: Model, reference: Model, metric: Metric | str | None = None, *, teacher: Teacher | None = None
) -> dict[str, float]:
    """Measure what every step of a lineage tells: ``parameters``, ``bytes``, ``validation_`` and the metric's name."""
    measured: dict[str, float] = {"parameters": parameters(model), "bytes": stored_bytes(model)}
    split = model.data.validation if model.data else None
    if split is not None and len(split):
        found = judge(model, reference, split, metric, teacher=teacher)
        measured[f"validation_{found.metric}"] = found.value
    return measured


def parameters(model: Model) -> int:
    """Count the stored numbers of a network: parameters and statistics, no counters."""
    return sum(math.prod(shape) for shape, _ in _stored(model).values())


def stored_bytes(model: Model) -> int:
    """Count the bytes of the weights as the plan stores them, scales included; 4 bytes for what it leaves float."""
    rules = model.plan.weights if model.plan else {}
    most = 2 if model.plan and model.plan.scheme == "float16" else 8
    total = 0
    for name, (shape, width) in _stored(model).items():
        if name in rules:
            total += grid.stored_bytes(shape, rules[name])
        else:
            total += math.prod(shape) * min(width, most)
    return total


def _stored(model: Model) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return shape and width in bytes of each stored float tensor."""
    if isinstance(model.network, LlamaFolder | GgufFile):
        return {}
    with extra("compress"):
        if isinstance(model.network, TorchNetwork):
            state = model.network.module.state_dict().items()
            planned = model.plan.weights if model.plan else {}
            once = {(t.data_ptr(), n in planned) if t.numel() else n: n for n, t in reversed(list(state))}
            kept = set(once.values())  # tied weights, as embedding and head, are stored once
            return {n: (tuple(t.shape), t.element_size()) for n, t in state if t.is_floating_point() and n in kept}
        return _stored_onnx(model.network)


def _stored_onnx(network: OnnxNetwork) -> dict[str, tuple[tuple[int, ...], int]]:
    import onnx

    tensors = network.proto().graph.initializer
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}
    return {name: (array.shape, array.dtype.itemsize) for name, array in arrays.items() if array.dtype.kind == "f"}
