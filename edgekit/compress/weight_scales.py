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
CUTS = tuple(
    (share + apart / 2, share - apart / 2)
    for share in (1.0 - 0.05 * step for step in range(15))
    for apart in (0.0, 0.1, -0.1, 0.3, -0.3)
    if max(share + apart / 2, share - apart / 2) <= 1.0
)
"""Shares of the range below and above zero."""


def scaled(values: Array, rule: WeightRule, observer: WeightObserver, *, is_symmetric: bool = True) -> WeightRule:
    """Return the rule with scales for ``values``, whose channels lie on the first axis; zero points if not symmetric.

    ``minmax`` lets the largest value be the largest integer; ``mse`` takes, scale by scale, the narrower range that
    loses the least squared error (Nagel et al. 2021, section 3.1).
    """
    own = canonical(rule)
    if not is_symmetric:
        return grid.with_scales(rule, *_between(grid.rows(values, own), 2**rule.bits - 1, observer))
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


def _between(cut: Array, most: int, observer: WeightObserver) -> tuple[Array, Array]:
    """Return scales and zero points of integers 0 to ``most``, both ends of the range cut for themselves."""
    import numpy as np

    low, high = np.minimum(cut.min(axis=2), 0.0), np.maximum(cut.max(axis=2), 0.0)
    best, zeros, least = np.ones_like(low), np.zeros(low.shape, np.int32), np.full(low.shape, np.inf)
    for below, above in [(1.0, 1.0)] if observer == "minmax" else CUTS:
        scales = np.maximum((high * above - low * below) / most, grid.SMALLEST_SCALE).astype(np.float32)
        zero = np.clip(np.round(-low * below / scales), 0, most)[:, :, None]
        integers = np.clip(np.round(cut / scales[:, :, None]) + zero, 0, most)
        error = (((integers - zero) * scales[:, :, None] - cut) ** 2).sum(axis=2, dtype=np.float64)
        better = error < least
        best[better], zeros[better], least[better] = scales[better], zero[:, :, 0][better], error[better]
    return best.astype(np.float32), zeros
