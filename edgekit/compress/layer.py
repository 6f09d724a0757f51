"""A layer that multiplies with a weight: how it computes, and what may be changed of it. Knows no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgekit.errors import CompressionError

if TYPE_CHECKING:
    import torch

    from edgekit.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or matrix product: its names in the plan, its float weight, and how it computes.

    ``values`` is [outputs, inputs / groups, *kernel] or [outputs, inputs], whatever axis the network keeps them on;
    for a transposed convolution [outputs / groups, inputs, *kernel]. ``offsets`` is the bias [outputs].
    """

    weight: str
    bias: str | None
    node: str
    source: str
    kind: Literal["conv", "transposed", "linear"]
    values: Array
    offsets: Array | None
    axis: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()

    def compute(self, inputs: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """Compute the layer with another weight and bias, of the shapes of ``values`` and ``offsets``."""
        from torch.nn import functional

        if self.kind == "linear":
            return functional.linear(inputs, values, offsets)
        size = values.dim() - 2
        if self.kind == "transposed":
            up = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[size - 1]
            made: torch.Tensor = up(
                inputs,
                values.transpose(0, 1),
                offsets,
                self.stride,
                self.padding,
                self.output_padding,
                self.groups,
                self.dilation,
            )
            return made
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[size - 1]
        begin, end = self.padding[:size], self.padding[size:] or self.padding[:size]
        if begin != end:
            edges = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
            inputs, begin = functional.pad(inputs, edges), (0,) * size
        return convolve(inputs, values, offsets, self.stride, begin, self.dilation, self.groups)

    def columns(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what a row of the weight is multiplied with: [groups, samples x positions, inputs / groups x kernel].

        Raises:
            CompressionError: a transposed or three-dimensional convolution.
        """
        from torch.nn import functional

        if self.kind == "linear":
            return inputs.reshape(1, -1, inputs.shape[-1])
        size = self.values.ndim - 2
        if self.kind == "transposed" or size == 3:
            raise CompressionError(f"{self.weight!r} is a convolution whose inputs cannot be laid out as a matrix")
        if size == 1:
            inputs = inputs.unsqueeze(2)
        lead = (0,) * (2 - size)
        begin, end = self.padding[:size], self.padding[size:] or self.padding[:size]
        edges = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
        kernel = (1,) * (2 - size) + self.values.shape[2:]
        unit = (1,) * (2 - size)
        patches = functional.unfold(
            functional.pad(inputs, [*edges, *lead, *lead]), kernel, unit + self.dilation, 0, unit + self.stride
        )
        rows = patches.transpose(1, 2).reshape(-1, self.groups, patches.shape[1] // self.groups)
        return rows.transpose(0, 1)


@dataclass(frozen=True)
class Change:
    """New values for one layer, in the shapes of `Layer.values` and `Layer.offsets`; None keeps what is there."""

    values: Array | None = None
    offsets: Array | None = None
