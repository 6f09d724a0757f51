"""What each layer costs when it alone is rounded: damage at the network's outputs, bytes, multiplications.

Knows candidates for bits; chooses none.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from edgekit import grid
from edgekit.compress.layer import Change
from edgekit.compress.losses import is_scores
from edgekit.compress.rounding import canonical
from edgekit.compress.walking import steps_of, writes_in_place
from edgekit.compress.weight_scales import scaled
from edgekit.model import whole_batches
from edgekit.plan import WeightRule
from edgekit.plugins import extra
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.compress.walking import Step
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress

FLOAT = 32
"""The width of a weight that stays float."""


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """One weight at one width: ``damage`` at the outputs when it alone is rounded, bytes stored, MACs a sample."""

    name: str
    bits: int
    damage: float
    bytes: int
    macs: int
    weights: int


class Compare(Protocol):
    """Says how far outputs of one batch lie from the float network's."""

    def __call__(self, wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
        """Return a mean over the samples of the batch; 0 for none."""
        ...


class Rounds(Protocol):
    """Rounds a layer that stands alone."""

    def __call__(self, layer: Layer, rule: WeightRule, inputs: Sequence[torch.Tensor]) -> Change:
        """Take its inputs in the float network, batch by batch; answer with its weight on the grid of the rule."""
        ...


def _nearest(layer: Layer, rule: WeightRule, inputs: Sequence[torch.Tensor]) -> Change:  # noqa: ARG001  # as Rounds
    return Change(values=grid.rounded(layer.values, rule))


class How(NamedTuple):
    """Who says what rounding did, and how it is done: to nearest, if nobody says otherwise."""

    compare: Compare | None = None
    rounds: Rounds = _nearest


def candidate(layer: Layer, plan: QuantizationPlan | None, bits: int) -> WeightRule:
    """Return the rule of a layer at a width: the plan's own, else its granularity with scales of least error.

    Where `quantize` made 8 bits 7, lest sums of products leave 16 bits, 8 are 7 here as well (`saturation`).
    """
    rule = WeightRule(axis=layer.axis) if plan is None else plan.weights[layer.weight]
    if plan is not None and (plan.bits, rule.bits, bits) == (8, 7, 8):
        bits = 7
    if rule.bits == bits and rule.scales:
        return rule
    bare = msgspec.structs.replace(rule, bits=bits, scales=b"", zeros=b"")
    return scaled(layer.values, bare, "mse", is_symmetric=not rule.zeros)


def sensitivities(
    model: Model,
    samples: Split,
    widths: Sequence[int],
    *,
    how: How | None = None,
    progress: Progress = silent,
) -> tuple[Sensitivity, ...]:
    """Round each weight alone to each width and compare the network's outputs; all else stays float.

    Where ``how`` names no other judge, the damage is the divergence KL(float || rounded) of scores, and of other
    outputs the power of the error over that of the signal (Pandey et al. 2023, "A Practical Mixed Precision Algorithm
    for Post-Training Quantization", section 3.1). What stands before a layer is computed once for all widths. With a
    plan only its weights are tried, in its granularity; 32 bits are float.

    Raises:
        CompressionError: a network that cannot be walked through.
    """
    with extra("compress"):
        import torch
    whole, size = whole_batches(model, samples)
    steps, ends = steps_of(model)
    runs = [_Run(steps, ends, batch.inputs) for batch in whole.batches(size)]
    found: list[Sensitivity] = []
    seen: set[str] = set()
    with torch.no_grad():
        for run in runs:
            run.wanted = run.rest(0, {})
        judge, rounds = how or How()
        judge = judge or _default(model)
        for position, step in enumerate(steps):
            layer = step.layer
            if layer is not None and layer.weight not in seen and _is_planned(layer, model.plan):
                seen.add(layer.weight)
                progress("sensitivity", position, len(steps))
                found += [_tried(layer, model.plan, bits, _Trial(runs, position, judge, rounds)) for bits in widths]
            for run in runs:
                run.advance(position)
    progress("sensitivity", len(steps), len(steps))
    return tuple(found)


def _is_planned(layer: Layer, plan: QuantizationPlan | None) -> bool:
    return plan is None or layer.weight in plan.weights


class _Run:
    """One batch in the float network, computed up to some step."""

    def __init__(self, steps: Sequence[Step], ends: Sequence[str], inputs: Mapping[str, Any]) -> None:
        import torch

        self._steps, self._ends = steps, tuple(ends)
        self._last = {name: position for position, step in enumerate(steps) for name in step.sources}
        self._last_write = max((place for place, step in enumerate(steps) if writes_in_place(step)), default=-1)
        self._values: dict[str, Any] = {name: torch.as_tensor(array) for name, array in inputs.items()}
        self.samples = len(next(iter(inputs.values())))
        self.wanted: list[torch.Tensor] = []

    def advance(self, position: int) -> None:
        """Compute one step."""
        self._compute(position, self._values, {})

    def taken(self, layer: Layer) -> torch.Tensor:
        """Return what a layer takes that is to be computed next."""
        value: torch.Tensor = self._values[layer.source]
        return value

    def rest(self, position: int, changes: Mapping[str, Change]) -> list[torch.Tensor]:
        """Compute the outputs from a step on, with other weights, and leave the float values as they are."""
        values = self._apart() if position <= self._last_write else dict(self._values)
        for place in range(position, len(self._steps)):
            self._compute(place, values, changes)
        return [values[name] for name in self._ends]

    def macs(self, position: int) -> int:
        """Count the multiplications of a weighted step for one sample."""
        layer = self._steps[position].layer
        if layer is None:
            return 0
        if layer.kind == "transposed":
            each, times = self._values[layer.source].numel(), layer.values.size // layer.values.shape[1]
        else:
            made = self._steps[position].compute(self._values)[0]
            each, times = made.numel(), layer.values[0].size
        return int(each * times // self.samples)

    def _apart(self) -> dict[str, Any]:
        """Copy the held values, views of one storage as views of one copy; parameters, which nobody writes, stay."""
        import torch

        kept = {id(value): value for value in self._values.values() if isinstance(value, torch.nn.Parameter)}
        return copy.deepcopy(self._values, kept)

    def _compute(self, position: int, values: dict[str, Any], changes: Mapping[str, Change]) -> None:
        step = self._steps[position]
        if step.layer is not None and step.layer.weight in changes:
            values[step.makes[0]] = _changed(step.layer, values[step.layer.source], changes[step.layer.weight])
        else:
            values.update(zip(step.makes, step.compute(values), strict=True))
        for name in step.sources:
            if self._last[name] == position and name not in self._ends:
                values.pop(name, None)


def _changed(layer: Layer, inputs: torch.Tensor, change: Change) -> torch.Tensor:
    import torch

    offsets = layer.offsets if change.offsets is None else change.offsets
    values = layer.values if change.values is None else change.values
    return layer.compute(
        inputs, torch.from_numpy(values), None if offsets is None else torch.from_numpy(offsets.astype("float32"))
    )


class _Trial(NamedTuple):
    """Where a layer stands, and who judges what its rounding does."""

    runs: Sequence[_Run]
    position: int
    judge: Compare
    rounds: Rounds


def _tried(layer: Layer, plan: QuantizationPlan | None, bits: int, trial: _Trial) -> Sensitivity:
    count = layer.values.size
    known: dict[str, Any] = {"name": layer.weight, "bits": bits, "weights": count}
    known["macs"] = trial.runs[0].macs(trial.position)
    if bits == FLOAT:
        return Sensitivity(**known, damage=0.0, bytes=4 * count)
    rule = canonical(candidate(layer, plan, bits))
    changes = {layer.weight: trial.rounds(layer, rule, [run.taken(layer) for run in trial.runs])}
    damage = sum(run.samples * trial.judge(run.wanted, run.rest(trial.position, changes)) for run in trial.runs)
    return Sensitivity(
        **known,
        damage=damage / sum(run.samples for run in trial.runs),
        bytes=grid.stored_bytes(layer.values.shape, rule),
    )


def _default(model: Model) -> Compare:
    scored = [is_scores(model, position) for position in range(len(model.outputs))]

    def compare(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
        pairs = zip(scored, wanted, found, strict=True)
        return sum(divergence(one, other) if scores else noise(one, other) for scores, one, other in pairs)

    return compare


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL(softmax wanted || softmax found) over all but the last axis, in nats."""
    from torch.nn import functional

    told, truth = (functional.log_softmax(side.double(), -1) for side in (found, wanted))
    each = functional.kl_div(told, truth, reduction="none", log_target=True).sum(-1)
    return float(each.mean().clamp_min(0))


def noise(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Return the power of the error over the power of the signal."""
    signal = float((wanted.double() ** 2).sum())
    return float(((wanted.double() - found.double()) ** 2).sum()) / max(signal, 1e-30)
