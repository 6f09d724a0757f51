"""Goes through a planned model and lets each layer choose its integers anew; what comes back lies on the plan's grid.

Knows no way of rounding: passes bring theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import msgspec

from edgekit import grid
from edgekit.compress.layer import Change
from edgekit.compress.layers import with_parameters
from edgekit.compress.rounding import canonical
from edgekit.compress.rows import fits
from edgekit.compress.walking import walk
from edgekit.errors import CompressionError
from edgekit.manifest import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan, WeightRule
    from edgekit.progress import Progress
    from edgekit.tensors import Array


CHOOSERS = frozenset({"adaround", "awq", "gptq", "hqq", "qat"})
"""Behind these steps, weights lie on the plan's grid: whoever chooses once more finds each where it is."""

PLANNERS = frozenset({"mixed_precision", "quantize"})
"""These make a new grid."""


@dataclass(frozen=True)
class Choice:
    """What a layer became: its rule, canonical with explicit scales, values near its grid, and perhaps other biases.

    ``error`` and ``nearest`` are the mean squared errors of its output, after this and after rounding to nearest, as
    shares of the output's variance.
    """

    rule: WeightRule
    values: Array
    offsets: Array | None = None
    error: float = 0.0
    nearest: float = 0.0


class Choose(Protocol):
    """Called at each planned layer whose inputs can be laid out as a matrix."""

    def __call__(
        self, layer: Layer, rule: WeightRule, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]
    ) -> Choice:
        """Take the layer, its canonical rule with explicit scales, and its inputs in both worlds, batch by batch."""
        ...


def planned(model: Model, name: str) -> QuantizationPlan:
    """Return the plan that the pass ``name`` refines.

    Raises:
        CompressionError: there is none, it has no integers, or another pass has chosen them already.
    """
    if model.plan is None or not model.plan.weights:
        raise CompressionError(
            f"{model.name} has no plan with integer weights ({model.precision}): {name} has nothing to refine",
            f"put quantize before it: quantize, then {name}",
        )
    earlier = next((step.name for step in reversed(model.lineage) if step.name in CHOOSERS | PLANNERS), "")
    if earlier in CHOOSERS:
        raise CompressionError(
            f"{earlier} has put the weights of {model.name} on the grid of the plan: {name} has nothing to choose",
            f"drop {earlier} or {name}; only qat may follow another",
        )
    return model.plan


def calibration(model: Model, most: int) -> Split:
    """Return the first calibration samples.

    Raises:
        CompressionError: there are none.
    """
    if model.data is None:
        raise CompressionError(f"{model.name} has no calibration data", "give --data file.py:function or data.npz")
    return model.data.calibration.head(most)


def explicit(layer: Layer, rule: WeightRule) -> WeightRule:
    """Return the canonical rule of a layer with its scales spelled out."""
    own = canonical(rule)
    return own if own.scales else grid.with_scales(own, grid.scales_of(layer.values, own))


def refine(model: Model, samples: Split, choose: Choose, progress: Progress, *, name: str) -> Model:
    """Let each planned layer choose, in execution order, seeing what the earlier ones became.

    Transposed and three-dimensional convolutions are rounded to nearest and counted as ``skipped_layers``.

    Raises:
        CompressionError: no plan, or a network that cannot be walked through.
    """
    plan = planned(model, name)
    rules = dict(plan.weights)
    chosen: list[Choice] = []
    skipped = 0

    def visit(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> Change | None:
        nonlocal skipped
        if layer.weight not in rules:
            return None
        rule = explicit(layer, rules[layer.weight])
        if not fits(layer):
            skipped += 1
            rules[layer.weight] = _own_axis(rule, plan.weights[layer.weight])
            return Change(grid.rounded(layer.values, rule))
        choice = choose(layer, rule, floats, planned)
        chosen.append(choice)
        rules[layer.weight] = _own_axis(choice.rule, plan.weights[layer.weight])
        return Change(grid.rounded(choice.values, choice.rule), choice.offsets)

    changes = walk(model, samples, visit, progress, what=name)
    measured = {"layers": float(len(chosen)), "skipped_layers": float(skipped)}
    measured |= {"error": _mean([c.error for c in chosen]), "nearest_error": _mean([c.nearest for c in chosen])}
    made = with_parameters(model, changes)
    refined = msgspec.structs.replace(plan, weights=rules)
    return replace(made, plan=refined, lineage=(*model.lineage, Step(name=name, measured=measured)))


def _own_axis(rule: WeightRule, original: WeightRule) -> WeightRule:
    return msgspec.structs.replace(rule, axis=original.axis)


def _mean(errors: list[float]) -> float:
    return sum(errors) / len(errors) if errors else 0.0
