"""SmoothQuant: moves what is hard to quantize from activations into weights. The network computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit.compress.calibration import runner
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.fold import fold
from edgekit.compress.producers import rescaled, seams
from edgekit.errors import CompressionError
from edgekit.manifest import Step

if TYPE_CHECKING:
    from edgekit.compress.producers import Seam
    from edgekit.model import Model
    from edgekit.progress import Progress
    from edgekit.tensors import Array

SMALLEST = 1e-5
"""Factors stay above it and below its inverse: a dead channel must not blow up a weight."""


class Smooth(CompressionPass, frozen=True):
    """Divide each channel of an activation by a factor and multiply the weights that take it by the same.

    The factor of a channel is max|activation|^``alpha`` / max|weight|^(1 - ``alpha``); 0.5 shares the difficulty,
    1 leaves all of it to the weights (Xiao et al. 2022, "SmoothQuant", equation 4). It goes into the normalization,
    or the convolution or linear layer with or without ReLU, that makes the activation, where nothing else takes it;
    the extremes are those of the first ``samples`` calibration samples. Comes before `quantize`.
    """

    alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    samples: Annotated[int, msgspec.Meta(ge=1)] = 128

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the float model with its batch normalization folded and its channels smoothed.

        Raises:
            CompressionError: quantized already, not a PyTorch network, no calibration data.
        """
        if model.plan is not None:
            raise CompressionError(f"{model.name} is quantized already ({model.precision})", "put smooth before it")
        if model.data is None:
            raise CompressionError(f"{model.name} has no calibration data", "give --data file.py:function or data.npz")
        folded, _ = fold(model)
        found = seams(folded)
        largest = _largest(folded, found, self.samples, progress)
        factors = {seam.source: self._factors(seam, largest[seam.source]) for seam in found}
        note = Step(name="smooth", measured={"smoothed": len(factors)})
        return replace(rescaled(folded, found, factors), lineage=(*model.lineage, note))

    def _factors(self, seam: Seam, largest: Array) -> Array:
        import numpy as np

        weights = np.max([input_maxima(seam, number) for number in range(len(seam.takers))], axis=0)
        factors = np.maximum(largest, SMALLEST) ** self.alpha / np.maximum(weights, SMALLEST) ** (1 - self.alpha)
        alive = (largest > 0) & (weights > 0)
        bounded: Array = np.where(alive, np.clip(factors, SMALLEST, 1 / SMALLEST), 1.0)
        return bounded.astype(np.float32)


def input_maxima(seam: Seam, number: int) -> Array:
    """Return the largest absolute weight of each input channel of one taker of a seam."""
    import numpy as np

    taker = seam.takers[number]
    outputs, each = taker.values.shape[:2]
    cut = np.abs(taker.values).reshape(taker.groups, outputs // taker.groups, each, -1)
    largest: Array = cut.max(axis=(1, 3)).reshape(-1)
    return largest


def _largest(model: Model, found: tuple[Seam, ...], samples: int, progress: Progress) -> dict[str, Array]:
    """Return the largest absolute value of each channel of the seams' values."""
    import numpy as np

    axes = {seam.source: -1 if seam.takers[0].kind == "linear" else 1 for seam in found}
    largest: dict[str, Array] = {}

    def watch(name: str, values: Array) -> None:
        if name in axes:
            own = np.abs(np.moveaxis(values, axes[name], 0)).reshape(values.shape[axes[name]], -1).max(axis=1)
            largest[name] = np.maximum(largest.get(name, own), own)

    if model.data is not None and found:
        runner(model, model.data.calibration.head(samples))(watch, progress)
    return largest


PLUGIN: type[CompressionPass] = Smooth
