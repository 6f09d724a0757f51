"""AWQ: makes the weights that meet large activations larger before they are rounded, so that they lose less."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit import grid
from edgekit.compress.layer import Change
from edgekit.compress.layers import layers, with_parameters
from edgekit.compress.passes import CompressionPass
from edgekit.compress.producers import for_taker, rescaled, seams
from edgekit.compress.refining import calibration, planned
from edgekit.compress.rounding import canonical
from edgekit.compress.rows import fits, some_rows
from edgekit.compress.walking import walk
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.model import Model
    from edgekit.plan import WeightRule
    from edgekit.progress import Progress
    from edgekit.tensors import Array

NARROWEST = 0.5
"""The narrowest range that the clipping tries, as a share of the widest."""

CLIPS = 21


@dataclass(frozen=True)
class _Seen:
    """What a layer takes in float: its Gram matrix [groups, inputs, inputs] and each channel's mean magnitude."""

    gram: torch.Tensor
    magnitude: Array


class Awq(CompressionPass, frozen=True):
    """Multiply the weights of each input channel by a factor, divide what makes the channel by it, and round.

    The factor is the channel's mean absolute activation to a power; of ``steps`` powers from 0 to 1 the one is taken
    with which the rounded layers err least in their outputs (Lin et al. 2023, "AWQ", section 3.2). Factors go where
    nothing else takes the activation: into normalizations, or convolutions and linear layers with or without ReLU.
    ``clip`` then narrows the range of each channel or group to what errs least. Rounds to nearest: a later gptq or
    adaround finds nothing to choose. For plans whose activations have no fixed ranges.
    """

    steps: Annotated[int, msgspec.Meta(ge=2, le=100)] = 20
    clip: bool = True
    rows: Annotated[int, msgspec.Meta(ge=64)] = 4096
    samples: Annotated[int, msgspec.Meta(ge=1)] = 128
    seed: int = 0

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the model with other factors between its layers and weights on the grid of its plan.

        Raises:
            CompressionError: no plan, one with fixed ranges, no calibration data, not a PyTorch network.
        """
        plan = planned(model, "awq")
        if plan.scheme == "static":
            raise CompressionError(
                f"the plan of {model.name} has fixed ranges of activations, which awq would make wrong",
                'quantize with activations = "none" or "dynamic", or put smooth before quantize instead',
            )
        balanced, seen, count = self.balanced(model, progress)
        rules, changes, before, after = dict(plan.weights), {}, [], []
        for layer in layers(balanced):
            if layer.weight not in rules:
                continue
            widest = _with_widest(layer.values, canonical(rules[layer.weight]))
            rule = widest
            if layer.weight in seen:
                gram = seen[layer.weight].gram
                rule = _clipped(layer, widest, gram) if self.clip else widest
                before.append(_error(layer, widest, gram))
                after.append(_error(layer, rule, gram))
            changes[layer.weight] = Change(grid.rounded(layer.values, rule))
            rules[layer.weight] = msgspec.structs.replace(rule, axis=layer.axis)
        measured = {"balanced": float(count), "layers": float(len(changes))}
        measured["clip_gain"] = 1 - sum(after) / sum(before) if sum(before) else 0.0
        made = with_parameters(balanced, changes)
        note = Step(name="awq", measured=measured)
        return replace(made, plan=msgspec.structs.replace(plan, weights=rules), lineage=(*model.lineage, note))

    def balanced(self, model: Model, progress: Progress) -> tuple[Model, dict[str, _Seen], int]:
        """Return the float model with its factors, what its layers take then, and how many seams got factors."""
        found = seams(model)
        seen = self._seen(model, progress)
        rules = model.plan.weights if model.plan else {}
        factors = {}
        for seam in found:
            takers = [taker for taker in seam.takers if taker.weight in rules and taker.weight in seen]
            if takers:
                factors[seam.source] = self._factors(takers, seen, rules)
        for seam in found:
            for taker in seam.takers if seam.source in factors else ():
                if taker.weight in seen:
                    seen[taker.weight] = _divided(seen[taker.weight], taker, factors[seam.source])
        moved = sum(bool((own != 1).any()) for own in factors.values())
        return rescaled(model, found, factors), seen, moved

    def _seen(self, model: Model, progress: Progress) -> dict[str, _Seen]:
        """Look at the float inputs of all layers."""
        seen: dict[str, _Seen] = {}

        def visit(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> None:
            del planned
            if not fits(layer):
                return
            rows = some_rows(layer, floats, floats, self.rows, seed=self.seed).floats
            channels = rows.abs().mean(1).reshape(layer.groups * layer.values.shape[1], -1).mean(1)
            seen[layer.weight] = _Seen(rows.mT @ rows / rows.shape[1], channels.numpy())

        walk(model, calibration(model, self.samples), visit, progress, what="awq")
        return seen

    def _factors(self, takers: list[Layer], seen: Mapping[str, _Seen], rules: Mapping[str, WeightRule]) -> Array:
        """Return the factors [channels] with which these layers err least together; ones where none help."""
        import numpy as np

        magnitude = np.maximum(seen[takers[0].weight].magnitude, 1e-4)
        best, least = np.ones_like(magnitude), np.inf
        for power in np.linspace(0, 1, self.steps, endpoint=False):
            own = magnitude ** np.float32(power)
            own = (own / np.sqrt(own.max() * own.min())).astype(np.float32)
            error = 0.0
            for taker in takers:
                scaled = replace(taker, values=taker.values * for_taker(taker, own))
                rule = _with_widest(scaled.values, canonical(rules[taker.weight]))
                error += _error(scaled, rule, _divided(seen[taker.weight], taker, own).gram)
            if error < least:
                best, least = own, error
        return best


def _divided(seen: _Seen, taker: Layer, factors: Array) -> _Seen:
    """Return what a layer takes when its input channels are divided by factors."""
    with extra("compress"):
        import torch
    each = torch.from_numpy(factors).reshape(taker.groups, -1)
    each = each.repeat_interleave(seen.gram.shape[1] // each.shape[1], dim=1)
    return _Seen(seen.gram / each[:, :, None] / each[:, None, :], seen.magnitude / factors)


def _with_widest(values: Array, rule: WeightRule) -> WeightRule:
    """Return the rule with the scales of these weights, symmetric."""
    bare = msgspec.structs.replace(rule, scales=b"", zeros=b"")
    return grid.with_scales(bare, grid.scales_of(values, bare))


def _error(layer: Layer, rule: WeightRule, gram: torch.Tensor) -> float:
    return float(_errors(layer, rule, gram, layer.values[0].size).sum())


def _errors(layer: Layer, rule: WeightRule, gram: torch.Tensor, size: int) -> Array:
    """Return the squared error of the outputs, [outputs, runs of ``size`` inputs], each run rounded alone."""
    import numpy as np
    import torch

    apart = torch.from_numpy(grid.rounded(layer.values, rule) - layer.values)
    cut = apart.reshape(layer.groups, layer.values.shape[0] // layer.groups, -1)
    found = []
    for start in range(0, cut.shape[2], size):
        own, square = cut[:, :, start : start + size], gram[:, start : start + size, start : start + size]
        found.append(((own @ square) * own).sum(2).reshape(-1).numpy())
    return np.stack(found, axis=1)


def _clipped(layer: Layer, widest: WeightRule, gram: torch.Tensor) -> WeightRule:
    """Return the rule with the narrower scales that err least, each channel, group or tensor for itself."""
    import numpy as np

    start = grid.scales_of(layer.values, widest)
    size = widest.group or layer.values[0].size
    best, least = start.copy(), np.full(start.shape, np.inf)
    for share in np.linspace(1.0, NARROWEST, CLIPS):
        scales = np.maximum(start * np.float32(share), grid.SMALLEST_SCALE).astype(np.float32)
        errors = _errors(layer, grid.with_scales(widest, scales), gram, size)
        if widest.granularity == "tensor":
            errors = errors.sum(keepdims=True)
        better = errors < least
        best[better], least[better] = scales[better], errors[better]
    return grid.with_scales(widest, best)


PLUGIN: type[CompressionPass] = Awq
