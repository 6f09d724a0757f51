"""Cross-layer equalization: moves scales between layers that follow each other, so that few channels stick out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress.calibration import runner
from edgekit.compress.layer import Change
from edgekit.compress.layers import with_parameters
from edgekit.compress.neighbours import Pair, pairs
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.fold import fold
from edgekit.errors import CompressionError
from edgekit.manifest import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.model import Model
    from edgekit.progress import Progress
    from edgekit.tensors import Array

ENOUGH = 1e-3
"""A round that changes no scale by more than this share is the last."""
WIDEST = 1e4
"""No channel is scaled by more, either way: a channel of almost nothing would become an outlier of its own."""


class Equalize(CompressionPass, frozen=True):
    """Fold batch normalization and scale the channels between two layers, so that both use their ranges alike.

    A channel is divided by ``s`` in the first layer and multiplied by it in the second. With one scale a tensor ``s``
    is ``sqrt(r1 r2) / r2`` of the largest weights of the channel in both, round after round until nothing changes
    (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1). With
    one scale a channel the first layer's ranges are free, so ``s`` is ``1 / r2`` but for a common factor: all inputs
    of the second share their row's scale alike; a depthwise second layer is left alone.

    Factors pass through ReLU, not through ReLU6: ``skip`` leaves such pairs alone. With ``clamps = "unreached"`` the
    channels that stay below the clamp on ``samples`` calibration samples, by a factor ``margin``, are scaled as far
    as they stay below it; other samples may reach it, so the network is only nearly the same.
    """

    scales: Literal["channel", "tensor"] = "channel"
    rounds: Annotated[int, msgspec.Meta(ge=1)] = 50
    clamps: Literal["unreached", "skip"] = "skip"
    margin: Annotated[float, msgspec.Meta(ge=1)] = 1.5
    samples: Annotated[int, msgspec.Meta(ge=2)] = 64

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the model with other weights that computes the same.

        Raises:
            CompressionError: a plan exists, or no two layers follow each other so that a scale could move.
        """
        if model.plan is not None:
            raise CompressionError(
                "equalize must come before quantize: the plan fits the weights as they are now",
                "put the pass before quantize in the recipe",
            )
        folded, count = fold(model)
        found = pairs(folded)
        clamped = [pair for pair in found if math.isfinite(pair.ceiling)]
        uses_data = self.clamps == "unreached" and model.data is not None
        least = self._least(folded, clamped, progress) if uses_data else {}
        taken = [pair for pair in found if pair not in clamped or pair.first.weight in least]
        if not taken:
            raise CompressionError(
                f"{model.name} has no two layers between which a scale can move, {len(clamped)} pairs are clamped",
                "drop the pass" if not clamped else 'give calibration data and clamps = "unreached", or drop the pass',
            )
        changes, measured = _equalized(taken, least, self)
        measured |= {"folded": count, "pairs": len(taken), "skipped_pairs": len(found) - len(taken)}
        note = Step(name="equalize", measured=measured)
        return replace(with_parameters(folded, changes), lineage=(*model.lineage, note))

    def _least(self, model: Model, clamped: Sequence[Pair], progress: Progress) -> dict[str, Array]:
        """Return the least divisor of each channel that comes into a clamp; infinite where it reaches it."""
        import numpy as np

        if model.data is None or not clamped:
            return {}
        wanted = {pair.first.node: pair for pair in clamped}
        peaks = {name: np.zeros(len(pair.first.values), np.float32) for name, pair in wanted.items()}

        def watch(name: str, values: Array) -> None:
            if name in wanted:
                axis = values.ndim - 1 if wanted[name].first.kind == "linear" else 1
                others = tuple(i for i in range(values.ndim) if i != axis)
                np.maximum(peaks[name], values.max(axis=others), out=peaks[name])

        runner(model, model.data.calibration.head(self.samples))(watch, progress)
        found = {}
        for name, pair in wanted.items():
            share = peaks[name] * self.margin / pair.ceiling
            found[pair.first.weight] = np.where(share >= 1, np.inf, share)
        return found


def _equalized(
    found: Sequence[Pair], least: dict[str, Array], options: Equalize
) -> tuple[dict[str, Change], dict[str, float]]:
    """Iterate over the pairs; return the changed layers, the rounds that it took, and how far channels moved."""
    import numpy as np

    values = {layer.weight: layer.values.copy() for pair in found for layer in (pair.first, pair.second)}
    totals = {pair.first.weight: np.ones(len(pair.first.values), np.float32) for pair in found}
    done = 0
    for done in range(1, options.rounds + 1):  # noqa: B007  # told afterwards
        if (
            max([_step(pair, values, totals, options=options, least=least.get(pair.first.weight)) for pair in found])
            < ENOUGH
        ):
            break
    offsets = {p.first.weight: p.first.offsets / totals[p.first.weight] for p in found if p.first.offsets is not None}
    changes = {name: Change(array, offsets.get(name)) for name, array in values.items()}
    moved = np.concatenate(list(totals.values()))
    measured: dict[str, float] = {
        "rounds": done,
        "channels": len(moved),
        "moved_channels": int((moved != 1).sum()),
        "largest_factor": float(np.maximum(moved, 1 / moved).max()),
    }
    return changes, measured


def _step(
    pair: Pair, values: dict[str, Array], totals: dict[str, Array], *, options: Equalize, least: Array | None
) -> float:
    """Equalize one pair in place; return by which share the scales changed at most."""
    import numpy as np

    first, taken = values[pair.first.weight], _by_channel(values[pair.second.weight], pair)
    before = totals[pair.first.weight]
    wanted = np.clip(before * _wanted(first, taken, options.scales), 1 / WIDEST, WIDEST)
    if least is not None:
        wanted = np.where(np.isinf(least), 1.0, np.maximum(wanted, least))
    totals[pair.first.weight] = wanted.astype(np.float32)
    factors = totals[pair.first.weight] / before
    first /= factors.reshape(-1, *[1] * (first.ndim - 1))
    taken *= factors.reshape(taken.shape[0], 1, taken.shape[2], 1)
    return float(np.abs(factors - 1).max())


def _wanted(first: Array, taken: Array, scales: Literal["channel", "tensor"]) -> Array:
    """Return by how much each channel should move; nothing where one of its weights is zero throughout."""
    import numpy as np

    mine, theirs = np.abs(first.reshape(len(first), -1)).max(axis=1), np.abs(taken).max(axis=(1, 3)).reshape(-1)
    used = (mine > 0) & (theirs > 0)
    if not used.any() or (scales == "channel" and taken.shape[2] == 1):
        return np.ones(len(first), np.float32)
    safe = np.where(used, theirs, 1)
    even = np.exp(np.log(theirs[used]).mean())
    found: Array = np.where(used, np.sqrt(mine / safe) if scales == "tensor" else even / safe, 1)
    return found


def _by_channel(second: Array, pair: Pair) -> Array:
    """View the second weight as [groups, outputs, channels taken, numbers a channel], all channels in order."""
    groups = 1 if pair.second.kind == "linear" else pair.second.groups
    channels = len(pair.first.values) // groups
    return second.reshape(groups, len(second) // groups, channels, -1)


PLUGIN: type[CompressionPass] = Equalize
