"""HQQ: zero points and scales for the many weights, not for the few that stick out; looks at no data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit import grid
from edgekit.compress.layer import Change
from edgekit.compress.layers import layers, with_parameters
from edgekit.compress.passes import CompressionPass
from edgekit.compress.refining import planned
from edgekit.compress.rounding import canonical
from edgekit.manifest import Step
from edgekit.plugins import extra

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.plan import WeightRule
    from edgekit.progress import Progress
    from edgekit.tensors import Array

FIRST_BETA, GROWTH = 10.0, 1.02
"""The weight of the auxiliary problem and how it grows by the iteration."""


class Hqq(CompressionPass, frozen=True):
    """Make the plan's weights asymmetric and choose zero points and scales by half-quadratic splitting.

    The l_``p`` norm of the error, p below 1, is split into a shrinkage that takes the outliers out and a least-squares
    problem in what remains (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").
    The paper keeps the scale and has a real zero point; here zero points are integers, as a plan stores them, so each
    is rounded and the scale solved for beside it. A channel, group or tensor keeps the best of all ``iterations``, the
    plan's symmetric scale among them. Needs no data; weights that are learned from data (gptq) are better.
    """

    p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.7
    iterations: Annotated[int, msgspec.Meta(ge=1)] = 30

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the model with weights on the grid of its plan, whose rules have zero points now.

        Raises:
            CompressionError: no plan with integers.
        """
        with extra("compress"):
            import numpy as np
        plan = planned(model, "hqq")
        rules, changes = dict(plan.weights), {}
        found = [layer for layer in layers(model) if layer.weight in rules]
        before, after = [], []
        for done, layer in enumerate(found):
            progress("hqq", done, len(found))
            rule = self.solved(layer.values, canonical(rules[layer.weight]))
            values = grid.rounded(layer.values, rule)
            before.append(_norm(layer.values - grid.rounded(layer.values, canonical(rules[layer.weight])), self.p))
            after.append(_norm(layer.values - values, self.p))
            rules[layer.weight] = msgspec.structs.replace(rule, axis=layer.axis)
            changes[layer.weight] = Change(values)
        progress("hqq", len(found), len(found))
        measured = {"layers": float(len(found))}
        measured["norm_ratio"] = float(np.sum(after) / max(float(np.sum(before)), grid.SMALLEST_SCALE))
        made = with_parameters(model, changes)
        note = Step(name="hqq", measured=measured)
        return replace(made, plan=msgspec.structs.replace(plan, weights=rules), lineage=(*model.lineage, note))

    def solved(self, values: Array, rule: WeightRule) -> WeightRule:
        """Return the canonical rule with zero points and scales for these weights."""
        import numpy as np

        cut = grid.rows(values, rule).astype(np.float64)
        counts = grid.rows(np.ones_like(values), rule) > 0  # the last group is filled up, with what does not count
        most = 2**rule.bits - 1
        middle = np.full(cut.shape[:2], 2 ** (rule.bits - 1), np.int32)
        best = _Best(cut, counts, most, self.p)
        best.offer(grid.scales_of(values, rule).astype(np.float64), middle)
        low, high = np.minimum(cut.min(axis=2), 0), np.maximum(cut.max(axis=2), 0)
        scales = np.maximum((high - low) / most, grid.SMALLEST_SCALE)
        zeros = np.clip(np.round(-low / scales), 0, most)
        beta = FIRST_BETA
        for _ in range(self.iterations):
            best.offer(scales, zeros)
            integers = np.clip(np.round(cut / scales[:, :, None]) + zeros[:, :, None], 0, most)
            error = cut - (integers - zeros[:, :, None]) * scales[:, :, None]
            calm = cut - _shrunk(error / scales[:, :, None], beta, self.p) * scales[:, :, None]
            zeros = np.clip(np.round(_mean(integers - calm / scales[:, :, None], counts)), 0, most)
            apart = (integers - zeros[:, :, None]) * counts
            below = (apart**2).sum(axis=2)
            fitted = (apart * calm).sum(axis=2) / np.where(below > 0, below, 1)
            scales = np.where(fitted > grid.SMALLEST_SCALE, fitted, scales)
            beta *= GROWTH
        return grid.with_scales(rule, best.scales, best.zeros)


class _Best:
    """The zero points and scales of least error so far, each channel or group for itself."""

    def __init__(self, cut: Array, counts: Array, most: int, p: float) -> None:
        import numpy as np

        self._cut, self._counts, self._most, self._p = cut, counts, most, p
        self._least = np.full(cut.shape[:2], np.inf)
        self.scales, self.zeros = np.ones(cut.shape[:2], np.float32), np.zeros(cut.shape[:2], np.int32)

    def offer(self, scales: Array, zeros: Array) -> None:
        """Take what is better."""
        import numpy as np

        scales = np.maximum(scales, grid.SMALLEST_SCALE).astype(np.float32)
        integers = np.clip(np.round(self._cut / scales[:, :, None]) + zeros[:, :, None], 0, self._most)
        error = self._cut - (integers - zeros[:, :, None]) * scales[:, :, None]
        norms = (np.abs(error) ** self._p * self._counts).sum(axis=2)
        better = norms < self._least
        self._least[better] = norms[better]
        self.scales[better], self.zeros[better] = scales[better], zeros[better].astype(np.int32)


def _shrunk(error: Array, beta: float, p: float) -> Array:
    """Return the generalized soft threshold, in units of the scale: what sticks out stays, the rest becomes 0."""
    import numpy as np

    size = np.abs(error)
    threshold = np.maximum(size, grid.SMALLEST_SCALE) ** (p - 1) / beta
    found: Array = np.sign(error) * np.maximum(size - threshold, 0)
    return found


def _mean(values: Array, counts: Array) -> Array:
    found: Array = (values * counts).sum(axis=2) / counts.sum(axis=2)
    return found


def _norm(error: Array, p: float) -> float:
    import numpy as np

    return float((np.abs(error).astype(np.float64) ** p).sum())


PLUGIN: type[CompressionPass] = Hqq
