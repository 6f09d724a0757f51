"""What lies behind the figures: layer by layer how coarse, how wide and how many bits; which classes changed places.

Reads validation and calibration, never test. Changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit import grid
from edgekit.compress.layers import layers
from edgekit.compress.simulation import planned_network
from edgekit.errors import EdgekitError
from edgekit.model import run_batched, whole_batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.model import Model
    from edgekit.tensors import Array

MOST_CLASSES = 40


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A layer by the name of its weight; ``sqnr`` in decibels is what rounding leaves of the weight, NaN if float."""

    name: str
    bits: int
    low: float
    high: float
    sqnr: float


def layer_facts(model: Model) -> tuple[LayerFacts, ...]:
    """Return the facts of every weighted layer, in execution order; none where the network cannot be looked into."""
    try:
        found = layers(model)
    except EdgekitError:
        return ()
    return tuple(
        LayerFacts(
            name=layer.weight,
            bits=_bits(model, layer.weight),
            low=float(layer.values.min()),
            high=float(layer.values.max()),
            sqnr=_sqnr(model, layer.weight, layer.values, layer.axis),
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


def _sqnr(model: Model, name: str, values: Array, axis: int) -> float:
    """Return the signal over the noise of rounding; a weight that lies on its grid already has none to tell."""
    import numpy as np

    rule = model.plan.weights.get(name) if model.plan else None
    if rule is None:
        return math.nan
    stored = np.moveaxis(values, 0, axis)
    noise = float(np.mean((grid.rounded(stored, rule) - stored) ** 2))
    signal = float(np.mean(stored**2))
    return 10 * math.log10(signal / noise) if noise > signal * 1e-12 else math.nan


def confusion(original: Model, compressed: Model) -> tuple[Array, tuple[str, ...]] | None:
    """Return how the confusion matrix of the validation split changed [class, told as], and the classes' names.

    None where there are no labels, or more than 40 classes.
    """
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
    one, two = (found.argmax(1) for found in scores)
    count = int(max(labels.max(), one.max(), two.max())) + 1
    if count > MOST_CLASSES:
        return None
    change = np.zeros((count, count), dtype=np.int64)
    np.add.at(change, (labels, two), 1)
    np.add.at(change, (labels, one), -1)
    return change, _names(original.data.labels, count)


def _names(given: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(given[i] if i < len(given) else str(i) for i in range(count))
