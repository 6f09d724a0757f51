"""Rounds PyTorch values as a plan says. The arithmetic of weights is `grid`'s. Knows no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit import grid
from edgekit.plan import QuantizationPlan, Range

if TYPE_CHECKING:
    import torch

    from edgekit.compress.layer import Layer
    from edgekit.plan import WeightRule
    from edgekit.tensors import Array


def round_value(values: torch.Tensor, limits: Range) -> torch.Tensor:
    """Return an activation rounded to the integers of its range; gradients pass where it is inside."""
    import torch

    own = grid.activation_grid(limits)
    rounded: torch.Tensor = torch.fake_quantize_per_tensor_affine(values, own.scale, own.zero, own.lowest, own.highest)
    return rounded


def round_dynamically(values: torch.Tensor) -> torch.Tensor:
    """Return an activation rounded to 8 bits by the range it has now, the whole tensor together."""
    low, high = float(values.detach().min()), float(values.detach().max())
    return round_value(values, Range(low, high))


def canonical(rule: WeightRule) -> WeightRule:
    """Return the rule for `Layer.values`, whose channels lie on the first axis; scales stay in their order."""
    import msgspec

    return msgspec.structs.replace(rule, axis=0)


def planned_weight(layer: Layer, plan: QuantizationPlan | None) -> Array:
    """Return the weight of a layer as the plan has it, in the shape of `Layer.values`."""
    import numpy as np

    if plan is None:
        return layer.values
    if plan.scheme == "float16":
        return layer.values.astype(np.float16).astype(np.float32)
    rule = plan.weights.get(layer.weight)
    return layer.values if rule is None else grid.rounded(layer.values, canonical(rule))
