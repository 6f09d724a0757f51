"""The error of a layer's output as a quadratic form of its weight, learned from rows of its inputs.

With inputs X as planned and X' in float, ``|X q - X' w|^2`` is ``(q - t)' G (q - t)`` and a constant, where
``G = X'X`` and ``t`` is the weight that would answer the planned inputs best. Knows no way of rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekit import grid

if TYPE_CHECKING:
    import torch

    from edgekit.compress.layer import Layer
    from edgekit.compress.rows import Rows
    from edgekit.plan import WeightRule
    from edgekit.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What counts as error: ``damping`` times the mean of the Gram matrix's diagonal is added to the diagonal.

    Asymmetric, the output of the float network is the target, else the weight itself. Centred, the mean of the output
    does not count, for a bias will restore it.
    """

    damping: float
    is_asymmetric: bool
    is_centred: bool


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Which integers to take: all tensors are [groups, outputs / groups, inputs] in double, ``gram`` is square.

    ``scales`` and ``zeros`` stand beside every weight; ``target`` is what rounding should come near in ``gram``.
    """

    rule: WeightRule
    shape: tuple[int, ...]
    weight: torch.Tensor
    target: torch.Tensor
    gram: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def integers(self, values: torch.Tensor, at: int | None = None) -> torch.Tensor:
        """Return the nearest integers, of all inputs or of the one ``at``."""
        import torch

        lowest, highest = grid.limits(self.rule)
        chosen: slice | int = slice(None) if at is None else at
        scaled = torch.round(values / self.scales[:, :, chosen]) + self.zeros[:, :, chosen]
        return scaled.clamp(lowest, highest)

    def values(self, integers: torch.Tensor) -> torch.Tensor:
        """Return what integers stand for."""
        return (integers - self.zeros) * self.scales

    def error(self, values: torch.Tensor) -> float:
        """Return the mean squared error of the outputs, summed over them, less what no weight could avoid."""
        apart = values - self.target
        return float(((apart @ self.gram) * apart).sum())

    def share(self, values: torch.Tensor) -> float:
        """Return the error as a share of the variance of the output."""
        whole = float(((self.weight @ self.gram) * self.weight).sum())
        return self.error(values) / whole if whole else 0.0

    def as_weight(self, values: torch.Tensor) -> Array:
        """Return values in the shape of `Layer.values`, float32."""
        found: Array = values.float().reshape(self.shape).numpy()
        return found

    def rescaled(self, scales: torch.Tensor) -> Problem:
        """Return the problem with one other scale a channel, [groups, outputs / groups]."""
        import numpy as np

        rounded = scales.float()
        zeros = np.frombuffer(self.rule.zeros, "<i4") if self.rule.zeros else None
        rule = grid.with_scales(self.rule, rounded.reshape(-1, 1).numpy().astype(np.float32), zeros)
        return replace(self, rule=rule, scales=rounded.double()[:, :, None].expand_as(self.scales).contiguous())


def beside(layer: Layer, rule: WeightRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and the zero points of a canonical rule beside every weight, as `Problem` has them."""
    import numpy as np
    import torch

    cut = grid.rows(layer.values, rule).shape
    groups, outputs = layer.groups, layer.values.shape[0] // layer.groups

    def spread(found: Array) -> torch.Tensor:
        everywhere = grid.unrows(np.broadcast_to(found[:, :, None], cut), layer.values.shape, rule)
        return torch.from_numpy(np.ascontiguousarray(everywhere, np.float64)).reshape(groups, outputs, -1)

    return spread(grid.scales_of(layer.values, rule)), spread(grid.zeros_of(layer.values, rule))


def problem(layer: Layer, rule: WeightRule, rows: Rows, aim: Aim) -> Problem:
    """Learn the quadratic form from rows of a layer's inputs."""
    import torch

    weight = torch.from_numpy(layer.values).reshape(layer.groups, layer.values.shape[0] // layer.groups, -1).double()
    planned, floats = rows.planned, rows.floats
    if aim.is_centred:
        planned, floats = planned - planned.mean(1, keepdim=True), floats - floats.mean(1, keepdim=True)
    count = planned.shape[1]
    gram = (planned.mT @ planned).double() / count
    diagonal = gram.diagonal(dim1=1, dim2=2)
    floor = aim.damping * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    floor = torch.where(diagonal.mean(1, keepdim=True) > 0, floor, 1.0)  # a dead group: rounds to nearest
    gram = gram + torch.diag_embed(floor.expand_as(diagonal))
    target = weight
    if aim.is_asymmetric:
        lost = (planned.mT @ (floats - planned)).double() / count
        target = weight + torch.linalg.solve(gram, lost @ weight.mT).mT
    scales, zeros = beside(layer, rule)
    return Problem(
        rule=rule, shape=layer.values.shape, weight=weight, target=target, gram=gram, scales=scales, zeros=zeros
    )


def shifted_offsets(layer: Layer, rows: Rows, values: Array) -> Array | None:
    """Return the biases with which the mean output stays what it is in float; None where the layer has none."""
    import torch

    if layer.offsets is None:
        return None
    shape = (layer.groups, layer.values.shape[0] // layer.groups, -1)
    before = rows.floats.mean(1, keepdim=True) @ torch.from_numpy(layer.values).reshape(shape).mT
    after = rows.planned.mean(1, keepdim=True) @ torch.from_numpy(values).reshape(shape).mT
    moved: Array = layer.offsets + (before - after).reshape(-1).numpy()
    return moved
