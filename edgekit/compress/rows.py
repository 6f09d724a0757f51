"""What the weight of a layer is multiplied with: some rows of the matrices that a layer's inputs are laid out as.

A convolution meets far more positions than its weight has unknowns, so some of each sample are enough. Knows no plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekit.errors import CompressionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgekit.compress.layer import Layer

LARGEST = 1 << 25
"""Numbers that the rows of one layer in one world may hold: 128 MiB."""


@dataclass(frozen=True)
class Rows:
    """The same rows of both worlds, [groups, rows, inputs / groups x kernel] each."""

    floats: torch.Tensor
    planned: torch.Tensor


def fits(layer: Layer) -> bool:
    """Say whether the inputs of a layer can be laid out as a matrix."""
    return layer.kind == "linear" or (layer.kind == "conv" and layer.values.ndim < 5)


def some_rows(
    layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor], most: int, *, seed: int
) -> Rows:
    """Draw about ``most`` rows, as many from each sample; both worlds at the same places.

    Raises:
        CompressionError: a transposed or three-dimensional convolution.
    """
    import torch

    if not fits(layer):
        raise CompressionError(f"{layer.weight!r} is a convolution whose inputs cannot be laid out as a matrix")
    random = torch.Generator().manual_seed(seed)
    members = layer.values[0].size * layer.groups
    samples = sum(len(batch) for batch in floats)
    each = max(1, min(most, LARGEST // members) // samples)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in zip(floats, planned, strict=True):
        if layer.kind == "linear":
            flat = [batch.reshape(len(batch), -1, batch.shape[-1]) for batch in pair]
            chosen = torch.randperm(flat[0].shape[1], generator=random)[:each]
            found.append(tuple(f[:, chosen].reshape(1, -1, f.shape[-1]) for f in flat))  # type: ignore[arg-type]  # a pair of worlds
        else:
            spots = places(layer, pair[0])
            chosen = torch.randperm(len(spots), generator=random)[:each]
            found.append(tuple(patches(layer, batch, spots[chosen]) for batch in pair))  # type: ignore[arg-type]  # a pair of worlds
    return Rows(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


def places(layer: Layer, batch: torch.Tensor) -> torch.Tensor:
    """Return where in a sample each position of a convolution looks, [positions, kernel]; 0 is the padding."""
    import torch

    size = batch.shape[2:]
    numbers = torch.arange(1, math.prod(size) + 1, dtype=torch.float64).reshape(1, 1, *size)
    return replace(layer, groups=1).columns(numbers)[0].long()


def patches(layer: Layer, batch: torch.Tensor, spots: torch.Tensor) -> torch.Tensor:
    """Return what a batch holds at those places, [groups, samples x positions, inputs / groups x kernel]."""
    from torch.nn import functional

    flat = functional.pad(batch.flatten(2), (1, 0))
    seen = flat[:, :, spots]  # [samples, inputs, positions, kernel]
    samples, inputs, positions, kernel = seen.shape
    grouped = seen.reshape(samples, layer.groups, inputs // layer.groups, positions, kernel)
    return grouped.permute(1, 0, 3, 2, 4).reshape(layer.groups, samples * positions, -1)
