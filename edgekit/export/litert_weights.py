"""Which layer of a LiteRT file holds which weight, and whether it holds it as the plan says. Runs no quantizer.

The converter renames weights and turns their axes, but keeps their numbers: a layer is known by what it holds. Batch
normalization and constant factors that it multiplies into a channel multiply that channel's scale, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from edgekit import grid
from edgekit.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgekit.export.litert_file import Layer
    from edgekit.plan import WeightRule
    from edgekit.tensors import Array

CLOSE = 1e-5
"""How far a folded channel may lie from a multiple of the model's, of its largest value: rounding of one product."""
SMALLEST = 1e-9
"""The quantizer makes no scale that is smaller; a channel of zeros has one in the plan."""
LAST = {"DEPTHWISE_CONV_2D": 3}
"""The axis that has a scale for each of its places; the first one but for these operators."""


@dataclass(frozen=True)
class Held:
    """A weight of the model in a layer: its name, and its integers and scales, value by value in the file's layout.

    For a weight that the plan leaves float, ``rule`` is None, and the values stand for themselves.
    """

    layer: Layer
    name: str
    rule: WeightRule | None
    integers: Array
    scales: Array


def held(
    layers: Sequence[Layer], weights: Mapping[str, Array], rules: Mapping[str, WeightRule]
) -> dict[str, Held | None]:
    """Return by its output what each layer of a float file holds of the model's weights, None where nothing fits."""
    return {layer.output: _held(layer, weights, rules) for layer in layers}


def _held(layer: Layer, weights: Mapping[str, Array], rules: Mapping[str, WeightRule]) -> Held | None:
    import numpy as np

    fits = {name: value for name, value in weights.items() if value.size == layer.values.size}
    for folded in (False, True):
        for name, value in fits.items():
            for axes in _turns(value, layer.values):
                factor = _factor(layer, _turned(value, axes, layer), folded=folded)
                if factor is None:
                    continue
                rule = rules.get(name)
                if rule is None:
                    return Held(layer, name, None, layer.values, np.ones_like(layer.values))
                scales = _turned(_by_value(value, rule), axes, layer) * np.abs(factor)
                integers = _turned(grid.quantized(value, rule), axes, layer) * np.sign(factor).astype(np.int32)
                return Held(layer, name, rule, integers, scales)
    return None


def _turns(value: Array, stored: Array) -> Iterator[tuple[int, ...]]:
    """Give the orders of a weight's axes, those of one place left out, that have the stored shape."""
    import numpy as np

    shape, wanted = np.squeeze(value).shape, np.squeeze(stored).shape
    if len(shape) == len(wanted):
        yield from (axes for axes in permutations(range(len(shape))) if tuple(shape[a] for a in axes) == wanted)


def _turned(value: Array, axes: tuple[int, ...], layer: Layer) -> Array:
    import numpy as np

    return np.squeeze(value).transpose(axes).reshape(layer.values.shape)


def _factor(layer: Layer, value: Array, *, folded: bool) -> Array | None:
    """Return what each channel was multiplied with, None where the numbers are others."""
    import numpy as np

    stored = layer.values
    if not folded:
        return np.ones(1, np.float32) if np.array_equal(stored, value) else None
    others = tuple(axis for axis in range(stored.ndim) if axis != LAST.get(layer.kind, 0))
    if stored.size // stored.shape[LAST.get(layer.kind, 0)] < 2:  # any number is a multiple of any other
        return None
    squares = (value * value).sum(others, keepdims=True)
    factor: Array = (stored * value).sum(others, keepdims=True) / np.maximum(squares, grid.SMALLEST_SCALE)
    near = np.abs(stored - factor * value).max() <= CLOSE * max(float(np.abs(stored).max()), grid.SMALLEST_SCALE)
    return factor if near and bool(np.abs(stored).max()) else None


def _by_value(weight: Array, rule: WeightRule) -> Array:
    """Return the scale of each value, in the weight's shape."""
    import numpy as np

    cut = grid.rows(weight, rule)
    return grid.unrows(np.broadcast_to(grid.scales_of(weight, rule)[:, :, None], cut.shape), weight.shape, rule)


def channel_scales(one: Held) -> Array:
    """Return the scales of a layer, one a channel, all axes kept.

    Raises:
        ExportError: the plan has them along another axis.
    """
    others = tuple(axis for axis in range(one.scales.ndim) if axis != LAST.get(one.layer.kind, 0))
    found: Array = one.scales.max(others, keepdims=True)
    if (one.scales.min(others, keepdims=True) != found).any():
        raise ExportError(
            f"{one.name!r} has scales along another axis than its outputs; {one.layer.kind} takes one an output",
            'quantize with granularity = "channel"',
        )
    return found


def block_scales(one: Held, size: int) -> Array:
    """Return the scales of a matrix, [outputs, blocks]."""
    return one.scales.reshape(one.scales.shape[0], -1, size)[:, :, 0]


def check(before: Mapping[str, Held | None], after: Sequence[Layer]) -> None:
    """Compare what the quantizer wrote with the plan, weight by weight.

    Raises:
        ExportError: names the weight that is a float against the plan, an integer against it, or another one.
    """
    written = {layer.output: layer for layer in after}
    by_weight = {layer.weight: layer for layer in after}
    for output, one in before.items():
        layer = written.get(output) or (by_weight.get(one.layer.weight) if one else None)
        if one is None or layer is None:
            continue
        if layer.is_float == (one.rule is not None):
            kinds = ("a float", "integers") if layer.is_float else ("integers", "a float")
            raise ExportError(
                f"{one.name!r} is {kinds[0]} in the LiteRT file and {kinds[1]} in the plan ({layer.kind})",
                "leave that layer in float (keep), or export to onnx",
            )
        if one.rule is not None and not _is_written(one, layer):
            raise ExportError(
                f"{one.name!r} has other integers or scales in the LiteRT file than in the plan ({layer.kind})",
                "export to onnx, or use another version of ai-edge-quantizer",
            )


def _is_written(one: Held, layer: Layer) -> bool:
    import numpy as np

    if not np.array_equal(layer.values, one.integers):
        return False
    if layer.scales is None or (one.rule is not None and one.rule.granularity == "group"):
        return True  # scales of blocks lie in a tensor of their own, rounded
    place = LAST.get(layer.kind, 0) if layer.scales.size > 1 else 0
    shape = [1] * layer.values.ndim
    shape[place] = layer.scales.size
    return np.allclose(one.scales, layer.scales.reshape(shape), rtol=CLOSE, atol=SMALLEST)
