"""What lies behind the figures: layer by layer how coarse, how wide and how many bits; which classes changed places.

Reads validation and calibration, never test. Changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekit.compress.layers import layers
from edgekit.compress.rounding import planned_weight, round_dynamically, round_value
from edgekit.compress.simulation import planned_network
from edgekit.compress.walking import walk
from edgekit.errors import EdgekitError
from edgekit.model import run_batched, whole_batches
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan
    from edgekit.tensors import Array

MOST_CLASSES = 40
SAMPLES = 16
"""Calibration samples that tell what rounding does to a layer."""
ROUNDS = 10
"""Of fitting the factors of outputs and inputs in turn."""
EXPLAINED = 0.25
"""Up to which share of the difference what remains behind the factors says that there are some: noise leaves more."""


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A layer by the name of its weight, its bits and the lowest and highest of its weights.

    ``sqnr`` in decibels is the layer's output over the damage that its own rounding does to it; NaN where nothing is
    rounded, or nobody knows what it was before.
    """

    name: str
    bits: int
    low: float
    high: float
    sqnr: float


def layer_facts(model: Model, floats: Model | None = None) -> tuple[LayerFacts, ...]:
    """Return the facts of every weighted layer, in execution order; none where the network cannot be looked into.

    ``floats`` is the model that the plan was made for: passes that choose integers leave weights on the grid, which
    tell no longer what they were.
    """
    try:
        found = layers(model)
    except EdgekitError:
        return ()
    left = {} if floats is None else _left(model, floats, {layer.weight: layer for layer in found})
    return tuple(
        LayerFacts(
            name=layer.weight,
            bits=_bits(model, layer.weight),
            low=float(layer.values.min()),
            high=float(layer.values.max()),
            sqnr=left.get(layer.weight, math.nan),
        )
        for layer in found
        if layer.values.size
    )


def _bits(model: Model, name: str) -> int:
    if model.plan is None:
        return 32
    if name in model.plan.weights:
        return model.plan.weights[name].bits
    return 16 if model.plan.scheme == "float16" else 32


def _left(model: Model, before: Model, found: Mapping[str, Layer]) -> dict[str, float]:
    """Return the decibels that each layer is left when it alone is rounded: what it takes comes from float layers.

    One walk through the float network, so that it costs little however many layers there are.
    """
    plan, left = model.plan, dict[str, float]()
    if plan is None or before.data is None:
        return left

    def look(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> None:
        del planned
        own = found.get(layer.weight)
        if own is not None and _bits(model, layer.weight) < 32 and own.values.shape == layer.values.shape:
            left[layer.weight] = _sqnr(layer, own, floats, plan)

    try:
        samples, size = whole_batches(before, before.data.calibration)
        samples = samples.head(max(size, SAMPLES // size * size))
        walk(replace(before, plan=None), samples, look, silent)
    except EdgekitError:  # what cannot be walked through can be compressed all the same
        pass
    return left


def _sqnr(layer: Layer, own: Layer, inputs: Sequence[torch.Tensor], plan: QuantizationPlan) -> float:
    """Return what a layer gives over what its rounded weight, bias and input change of that."""
    import torch

    values, shift = _comparable(layer, own, planned_weight(own, plan))
    weight, rounded = torch.as_tensor(layer.values), torch.as_tensor(values)
    moved = None if shift is None else torch.as_tensor(shift)
    signal = noise = 0.0
    for batch in inputs:
        exact = layer.compute(batch, weight, None)
        signal += float(exact.double().square().sum())
        found = layer.compute(_taken(layer.source, batch, plan), rounded, moved)
        noise += float((found - exact).double().square().sum())
    return 10 * math.log10(signal / noise) if signal > 0 and noise > signal * 1e-20 else math.nan


def _taken(source: str, batch: torch.Tensor, plan: QuantizationPlan) -> torch.Tensor:
    if plan.scheme == "dynamic":
        return round_dynamically(batch)
    if plan.scheme == "float16":
        return batch.half().float()
    limits = plan.activations.get(source)
    return batch if limits is None else round_value(batch, limits)


def _comparable(layer: Layer, own: Layer, values: Array) -> tuple[Array, Array | None]:
    """Return a rounded weight and how its bias moved, as beside the float layer.

    A pass may have moved factors from a layer into the next one (awq); the network computes the same, so they are
    found by least squares and taken out. A bias means nothing then.
    """
    import numpy as np

    unscaled = _without_factors(values, layer)
    apart, rest = (float(np.square(one - layer.values).sum()) for one in (values, unscaled))
    if rest < EXPLAINED * apart:
        return unscaled, None
    none = np.zeros(1, np.float32)
    before, after = (none if one.offsets is None else one.offsets for one in (layer, own))
    return values, None if np.array_equal(before, after) else after - before


def _without_factors(values: Array, layer: Layer) -> Array:
    """Return a weight without the factors that its outputs and inputs have beside the layer's."""
    import numpy as np

    groups = 1 if layer.kind == "transposed" else layer.groups
    shape = (groups, values.shape[0] // groups, values.shape[1], -1)
    mine, wanted = values.reshape(shape).astype(np.float64), layer.values.reshape(shape).astype(np.float64)
    factors = {(2, 3): np.ones((groups, shape[1], 1, 1)), (1, 3): np.ones((groups, 1, shape[2], 1))}
    for _ in range(ROUNDS):
        for axes, others in (((2, 3), (1, 3)), ((1, 3), (2, 3))):
            told = wanted * factors[others]
            above, below = (mine * told).sum(axes, keepdims=True), (told * told).sum(axes, keepdims=True)
            known = (below > 0) & (above > 0)  # a channel of zeros has no factor
            factors[axes] = np.where(known, above / np.where(known, below, 1), 1)
    found: Array = (mine / factors[2, 3] / factors[1, 3]).reshape(values.shape).astype(values.dtype)
    return found


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """As what samples of each class are told, before and after: ``counts`` by (class, told as), of pairs that occur."""

    names: tuple[str, ...]
    counts: Mapping[tuple[int, int], tuple[int, int]]

    @property
    def change(self) -> Array | None:
        """How often more each class is told as another, [class, told as]; None above 40 classes: nobody could read it.

        The diagonal are hits.
        """
        import numpy as np

        if len(self.names) > MOST_CLASSES:
            return None
        change = np.zeros((len(self.names), len(self.names)), dtype=np.int64)
        for place, (before, after) in self.counts.items():
            change[place] = after - before
        return change

    @property
    def moved(self) -> tuple[tuple[str, str, int, int], ...]:
        """The mistakes that became more or fewer, the largest change first: class, told as, before, after."""
        mistakes = [(pair, both) for pair, both in self.counts.items() if pair[0] != pair[1] and both[0] != both[1]]
        mistakes.sort(key=lambda entry: (-abs(entry[1][1] - entry[1][0]), entry[0]))
        return tuple((self.names[i], self.names[j], before, after) for (i, j), (before, after) in mistakes)


def confusion(original: Model, compressed: Model) -> Confusion | None:
    """Return what both models make of the classes of the validation split; None where there are no such labels."""
    import numpy as np

    split = original.data.validation if original.data else None
    if original.data is None or split is None or split.labels is None or split.labels.dtype.kind not in "iu":
        return None
    split, batch = whole_batches(original, split)
    labels = split.labels
    if labels is None or labels.ndim != 1:
        return None
    try:
        scores = [next(iter(run_batched(planned_network(m), split, batch).values())) for m in (original, compressed)]
    except EdgekitError:
        return None
    if scores[0].ndim != 2:
        return None
    told = [found.argmax(1) for found in scores]
    count = int(max(labels.max(), *(one.max() for one in told))) + 1
    counts: dict[tuple[int, int], tuple[int, int]] = {}
    for label, before, after in np.stack([labels.astype(np.int64), *told], 1).tolist():
        for place, one, two in ((before, 1, 0), (after, 0, 1)):
            old = counts.get((label, place), (0, 0))
            counts[label, place] = (old[0] + one, old[1] + two)
    return Confusion(names=_names(original.data.labels, count), counts=counts)


def _names(given: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(given[i] if i < len(given) else str(i) for i in range(count))
