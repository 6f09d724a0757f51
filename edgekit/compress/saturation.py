"""Where integer products leave 16 bits on processors without a dot product of 8-bit integers. Changes nothing.

Such an x86 multiplies unsigned activations with signed weights by ``vpmaddubsw``, which adds the products of two
neighbours in 16 bits and cuts off what does not fit (Intel SDM, PMADDUBSW; ONNX Runtime issue 6004). Weights of 7 bits
never get there: 2 x 255 x 63 fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit import grid
from edgekit.compress.rounding import canonical
from edgekit.compress.walking import walk
from edgekit.device_profiles.machine import INTEGER_DOT_PRODUCT
from edgekit.plan import Range

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.device_profiles import DeviceProfile
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress

MOST = 32767
ROWS = 512
"""Rows of inputs that are looked at in a layer, spread over all samples and positions."""
SAMPLES = 4
"""Samples of a batch that these rows come from."""
CHUNK = 1 << 21
"""Sums that are computed at once."""


@dataclass(frozen=True)
class Saturation:
    """What a layer's sums of two products do: the share that is cut off, the largest over the limit, and the cost.

    ``reach`` is 0 where no pair can leave 16 bits. ``sqnr_db`` is the layer's exact output over
    the error, infinite where nothing is cut off.
    """

    weight: str
    share: float
    reach: float
    sqnr_db: float

    @property
    def is_cut(self) -> bool:
        """Say whether any sum left 16 bits."""
        return self.share > 0


def may_saturate(profile: DeviceProfile) -> bool:
    """Say whether a hardware class adds products of u8 and s8 in 16 bits."""
    return (
        profile.arch == "x86_64"
        and profile.format == "onnx"
        and str(profile.options.get("activations", "uint8")) == "uint8"
        and not set(profile.isa) & set(INTEGER_DOT_PRODUCT)
    )


def saturations(model: Model, samples: Split, progress: Progress) -> tuple[Saturation, ...]:
    """Look at every layer that multiplies integers, in execution order.

    Depthwise convolutions are left out: their kernels add in 32 bits.
    """
    plan = model.plan
    found: list[Saturation] = []
    if plan is None or plan.scheme not in ("static", "dynamic"):
        return ()

    def look(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> None:
        del floats
        if layer.weight in plan.weights and _multiplies_pairs(layer, plan):
            found.append(_of(layer, planned, plan))

    walk(model, samples, look, progress, what="saturation")
    return tuple(found)


def _multiplies_pairs(layer: Layer, plan: QuantizationPlan) -> bool:
    is_depthwise = layer.kind == "conv" and layer.values.shape[1] == 1 and layer.groups > 1
    rule = plan.weights[layer.weight]
    has_range = plan.scheme == "dynamic" or layer.source in plan.activations
    return (
        has_range
        and not is_depthwise
        and layer.kind != "transposed"
        and layer.values.ndim < 5
        and rule.granularity != "group"
        and not rule.zeros
    )


def _of(layer: Layer, planned: Sequence[torch.Tensor], plan: QuantizationPlan) -> Saturation:
    import numpy as np
    import torch

    weight = grid.quantized(layer.values, canonical(plan.weights[layer.weight]))
    # kernels see channels last: neighbours in a product are neighbouring channels of one position
    last = np.ascontiguousarray(np.moveaxis(weight, 1, -1)).reshape(layer.groups, -1, weight[0].size)
    share, excess, signal, reach, seen = 0, 0.0, 0.0, 0.0, 0
    for batch in planned:
        limits = plan.activations.get(layer.source) or Range(float(batch.min()), float(batch.max()))
        own = grid.activation_grid(limits)
        rows = _rows(layer, batch, ROWS // len(planned) + 1)
        integers = (torch.round(rows / own.scale) + own.zero).clamp(0, 255).to(torch.int32)
        for group, part in zip(integers, torch.from_numpy(last.astype(np.int32)), strict=True):
            cut = _pairs(group, part)
            exact = (group - own.zero).float() @ part.float().T
            share, seen = share + cut[0], seen + group.shape[0] * part.shape[0] * math.ceil(part.shape[1] / 2)
            excess, signal = excess + float(cut[1].square().sum()), signal + float(exact.double().square().sum())
            reach = max(reach, cut[2])
    sqnr = 10 * math.log10(max(signal, 1e-30) / excess) if excess else math.inf
    return Saturation(layer.weight, share / max(seen, 1), reach, sqnr)


def _rows(layer: Layer, batch: torch.Tensor, most: int) -> torch.Tensor:
    """Return some of what the weight is multiplied with: [groups, rows, positions x channels]; zero is zero."""
    columns = layer.columns(batch[:: math.ceil(len(batch) / SAMPLES)])
    columns = columns[:, :: max(1, columns.shape[1] // most)]
    if layer.kind == "linear":
        return columns
    groups, rows, width = columns.shape
    channels = layer.values.shape[1]
    return columns.reshape(groups, rows, channels, width // channels).transpose(2, 3).reshape(groups, rows, width)


def _pairs(rows: torch.Tensor, weight: torch.Tensor) -> tuple[int, torch.Tensor, float]:
    """Return how many sums of two products are cut off, what that costs each output, and the largest over the limit.

    ``rows`` [rows, width] are unsigned, ``weight`` [outputs, width] signed; pairs that fit whatever
    row meets whatever output are not computed.
    """
    import torch

    if rows.shape[1] % 2:
        rows, weight = (torch.nn.functional.pad(part, (0, 1)) for part in (rows, weight))
    one, other = rows[:, 0::2], rows[:, 1::2]
    first, second = weight[:, 0::2], weight[:, 1::2]
    tops = (one.max(0).values, other.max(0).values)
    most = tops[0] * first.clamp(min=0) + tops[1] * second.clamp(min=0)
    least = tops[0] * first.clamp(max=0) + tops[1] * second.clamp(max=0)
    outputs, pairs = torch.nonzero(torch.maximum(most, -least) > MOST, as_tuple=True)
    lost = torch.zeros(rows.shape[0], weight.shape[0])
    count, reach, step = 0, 0.0, max(1, CHUNK // rows.shape[0])
    for start in range(0, len(pairs), step):
        p, o = pairs[start : start + step], outputs[start : start + step]
        sums = one[:, p] * first[o, p] + other[:, p] * second[o, p]
        over = sums - sums.clamp(-MOST - 1, MOST)
        count += int((over != 0).sum())
        lost.index_add_(1, o, over.float())
        reach = max(reach, float(sums.abs().max()) / MOST)
    return count, lost, reach
