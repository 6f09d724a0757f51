"""Which scales the integers of a weight get. Knows neither activations nor networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgekit import grid
from edgekit.compress.rounding import canonical

if TYPE_CHECKING:
    from edgekit.plan import WeightRule
    from edgekit.tensors import Array

WeightObserver = Literal["minmax", "mse"]
SHRINKS = 80
"""How many narrower ranges are tried, down to a fifth of the widest."""


def scaled(values: Array, rule: WeightRule, observer: WeightObserver) -> WeightRule:
    """Return the rule with scales for ``values``, whose channels lie on the first axis.

    ``minmax`` lets the largest value be the largest integer; ``mse`` takes, scale by scale, the narrower range that
    loses the least squared error (Nagel et al. 2021, section 3.1).
    """
    own = canonical(rule)
    widest = grid.scales_of(values, own)
    return grid.with_scales(rule, widest if observer == "minmax" else _least_error(values, own, widest))


def _least_error(values: Array, rule: WeightRule, widest: Array) -> Array:
    import numpy as np

    cut = grid.rows(values, rule)
    lowest, highest = grid.limits(rule)
    best, least = widest.copy(), np.full(widest.shape, np.inf)
    for share in np.linspace(1.0, 0.2, SHRINKS):
        scales = np.maximum(widest * np.float32(share), grid.SMALLEST_SCALE).astype(np.float32)
        rounded = np.clip(np.round(cut / scales[:, :, None]), lowest, highest) * scales[:, :, None]
        error = ((rounded - cut) ** 2).sum(axis=2, dtype=np.float64)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best
