"""The arithmetic of a plan: from a weight and its rule to integers and back, and the integers of a range.

NumPy only: compress, export and their tests round alike because they round here. Knows no network and no format.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edgekit.errors import CompressionError

if TYPE_CHECKING:
    from edgekit.plan import Range, WeightRule
    from edgekit.tensors import Array

SMALLEST_SCALE = 1e-12
"""A channel of zeros has this scale, so that nothing is divided by zero."""
MASKED, SEEN, CERTAIN = -5e3, -1e3, -1e8
"""What masks attention fills in -1e4, -65504, -1e9, the smallest float, or minus infinity; no score lies near it."""


class ActivationGrid(NamedTuple):
    """Integers ``lowest`` to ``highest`` that stand for ``(integer - zero) * scale``."""

    scale: float
    zero: int
    lowest: int
    highest: int


def limits(rule: WeightRule) -> tuple[int, int]:
    """Return the smallest and largest integer that a rule stores.

    Symmetric 7- and 8-bit weights leave the smallest integer out, as engines expect; 4-bit ones need it.
    """
    if rule.zeros:
        return 0, 2**rule.bits - 1
    most = 2 ** (rule.bits - 1) - 1
    return (-most if rule.bits >= 7 else -most - 1), most


def rows(weight: Array, rule: WeightRule) -> Array:
    """Cut a weight into what shares a scale: [channels or 1, groups, members], the last group filled up with zeros."""
    import numpy as np

    if rule.granularity == "tensor":
        return weight.reshape(1, 1, -1)
    flat = np.moveaxis(weight, rule.axis, 0).reshape(weight.shape[rule.axis], -1)
    if rule.granularity == "channel":
        return flat[:, None, :]
    count = math.ceil(flat.shape[1] / rule.group)
    filled = np.pad(flat, ((0, 0), (0, count * rule.group - flat.shape[1])))
    return filled.reshape(len(flat), count, rule.group)


def unrows(cut: Array, shape: tuple[int, ...], rule: WeightRule) -> Array:
    """Undo `rows`."""
    import numpy as np

    if rule.granularity == "tensor":
        return cut.reshape(shape)
    moved = (shape[rule.axis], *(n for i, n in enumerate(shape) if i != rule.axis % len(shape)))
    flat = cut.reshape(len(cut), -1)[:, : math.prod(moved[1:])]
    result: Array = np.moveaxis(flat.reshape(moved), 0, rule.axis)
    return result


def scales_of(weight: Array, rule: WeightRule) -> Array:
    """Return the scales as float32 [channels or 1, groups]: the rule's own, else from the largest values.

    Raises:
        CompressionError: the rule holds another number of scales than the weight needs.
    """
    import numpy as np

    cut = rows(weight, rule)
    if rule.scales:
        found = np.frombuffer(rule.scales, "<f4")
        if found.size != cut.shape[0] * cut.shape[1]:
            raise CompressionError(
                f"the plan holds {found.size} scales for a weight of shape {list(weight.shape)}, it needs "
                f"{cut.shape[0] * cut.shape[1]}",
                "the plan was made for another network: compress again",
            )
        return found.reshape(cut.shape[:2])
    most = limits(rule)[1]
    largest: Array = np.maximum(np.abs(cut).max(axis=2).astype(np.float64) / most, SMALLEST_SCALE).astype(np.float32)
    return largest


def zeros_of(weight: Array, rule: WeightRule) -> Array:
    """Return the zero points as int32 [channels or 1, groups]; all 0 for symmetric rules."""
    import numpy as np

    shape = rows(weight, rule).shape[:2]
    return np.frombuffer(rule.zeros, "<i4").reshape(shape) if rule.zeros else np.zeros(shape, np.int32)


def with_scales(rule: WeightRule, scales: Array, zeros: Array | None = None) -> WeightRule:
    """Return the rule with these scales [channels or 1, groups], and zero points where it is not symmetric."""
    import numpy as np

    return msgspec.structs.replace(
        rule,
        scales=np.ascontiguousarray(scales, "<f4").tobytes(),
        zeros=b"" if zeros is None else np.ascontiguousarray(zeros, "<i4").tobytes(),
    )


def with_room(weight: Array, rule: WeightRule, bias: Array, input_scale: float) -> WeightRule:
    """Return the rule with scales so large that the layer's bias fits into 32 bits at the scale of its sums.

    Only a channel whose weights are next to nothing beside its bias, as dead ones are, has its scale changed.
    """
    import numpy as np

    scales = scales_of(weight, rule)
    least = np.abs(bias.astype(np.float64)) / (input_scale * 2**30)
    least = least.reshape(scales.shape) if scales.size == least.size else least.max()
    if (scales >= least).all():
        return rule
    return with_scales(rule, np.maximum(scales, least), zeros_of(weight, rule) if rule.zeros else None)


def quantized(weight: Array, rule: WeightRule) -> Array:
    """Return the integers that a weight is stored as, int32, in its own shape."""
    import numpy as np

    lowest, highest = limits(rule)
    scales, zeros = scales_of(weight, rule)[:, :, None], zeros_of(weight, rule)[:, :, None]
    integers = np.clip(np.round(rows(weight, rule) / scales) + zeros, lowest, highest)
    return unrows(integers.astype(np.int32), weight.shape, rule)


def dequantized(integers: Array, weight: Array, rule: WeightRule) -> Array:
    """Return the float32 values that integers of a weight stand for; ``weight`` gives scales that the rule lacks."""
    import numpy as np

    scales, zeros = scales_of(weight, rule)[:, :, None], zeros_of(weight, rule)[:, :, None]
    return unrows(((rows(integers, rule) - zeros) * scales).astype(np.float32), weight.shape, rule)


def rounded(weight: Array, rule: WeightRule) -> Array:
    """Return the weight as an engine sees it: rounded to the grid, float32."""
    return dequantized(quantized(weight, rule), weight, rule)


def stored_bytes(shape: tuple[int, ...], rule: WeightRule) -> int:
    """Count the bytes of a weight's integers and scales, and of its zero points at the width of the integers."""
    count = math.prod(shape)
    if rule.granularity == "tensor":
        scales = 1
    else:
        channels = shape[rule.axis]
        scales = channels * (math.ceil(count / channels / rule.group) if rule.granularity == "group" else 1)
    bits = 8 if rule.bits == 7 else rule.bits
    return math.ceil(count * bits / 8) + 4 * scales + (math.ceil(scales * bits / 8) if rule.zeros else 0)


def activation_grid(limits: Range, *, symmetric: bool = False) -> ActivationGrid:
    """Return the integers of a range that is widened to hold zero: unsigned, or signed around zero if symmetric."""
    low, high = min(limits.low, 0.0), max(limits.high, 0.0)
    if symmetric:
        return ActivationGrid(_scale(max(-low, high) / 127), 0, -127, 127)
    scale = _scale((high - low) / 255)
    return ActivationGrid(scale, min(max(round(-low / scale), 0), 255), 0, 255)


def is_masked(values: Array) -> bool:
    """Say whether an activation holds the fillers of a mask: far below zero, and nothing between them and the rest.

    A range with both would leave no integers for the rest, and one without them would unmask: it has to stay float.
    """
    if not values.size or values.min() > MASKED:
        return False
    return bool(values.min() <= CERTAIN or not ((values > MASKED) & (values < SEEN)).any())


def _scale(width: float) -> float:
    """Keep a scale a normal float32: engines divide by it. An activation that is always zero has scale 1."""
    if width == 0:
        return 1.0
    return max(width, 1.2e-38)
