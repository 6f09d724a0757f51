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

    def mean_output(self, mean: Array, values: Array) -> Array:
        """Return the mean output [outputs] of the layer with other weights, without bias, float64.

        ``mean`` is the mean input over the samples, [inputs, *positions] or [*positions, inputs]: a layer is linear,
        so no more of the samples counts. Needs PyTorch for transposed convolutions alone.
        """
        import numpy as np

        if self.kind == "linear":
            product: Array = values @ mean.reshape(-1, mean.shape[-1]).mean(0, dtype=np.float64)
            return product
        if self.kind == "transposed":
            import torch

            made = self.compute(torch.from_numpy(mean).double()[None], torch.from_numpy(values).double(), None)
            whole: Array = made.flatten(2).mean((0, 2)).numpy()
            return whole
        column = self._mean_column(mean).reshape(self.groups, -1)
        rows = values.reshape(self.groups, len(values) // self.groups, -1)
        summed: Array = np.einsum("gok,gk->go", rows, column).reshape(-1)
        return summed

    def _mean_column(self, mean: Array) -> Array:
        """Return what each weight of a convolution is multiplied with on average, [inputs, *kernel]."""
        import numpy as np

        kernel = self.values.shape[2:]
        size = len(kernel)
        begin, end = self.padding[:size], self.padding[size:] or self.padding[:size]
        padded = np.pad(mean, [(0, 0), *zip(begin, end, strict=True)])
        column = np.empty((len(mean), *kernel))
        for at in np.ndindex(kernel):
            cut = [slice(None)]
            for axis, place in enumerate(at):
                reach = self.dilation[axis] * (kernel[axis] - 1)
                first = self.dilation[axis] * place
                cut.append(slice(first, padded.shape[axis + 1] - reach + first, self.stride[axis]))
            column[(slice(None), *at)] = padded[tuple(cut)].mean(tuple(range(1, size + 1)))
        return column

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
