"""Turns a PyTorch network into torch.export's graph. Knows no file and no pass."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from edgekit.errors import CompressionError
from edgekit.model import Model, TorchNetwork
from edgekit.plugins import extra
from edgekit.sources import first_line
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    import torch

    from edgekit.tensors import Array


def trace(model: Model) -> torch.export.ExportedProgram:
    """Return the torch.export graph of the model's network, its batch dynamic.

    Raises:
        CompressionError: not a PyTorch network, or control flow that cannot be traced.
    """
    with extra("compress"):
        import torch
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(f"{model.name} is no PyTorch network", "give its Python workload instead")
    example = tuple(torch.as_tensor(a) for a in _example(model, 2).values())
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    shapes = tuple({0: batch} for _ in example)
    parameters = list(inspect.signature(model.network.module.forward).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        shapes = (shapes,)  # type: ignore[assignment]  # *args are one entry, a tuple of its own
    try:
        return torch.export.export(model.network.module, example, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise CompressionError(
            f"{model.name} cannot be traced to a graph: {first_line(error)}",
            "remove control flow that depends on values, or export it to ONNX yourself and give the .onnx file",
        ) from error


def _example(model: Model, batch: int) -> dict[str, Array]:
    import numpy as np

    sizes = {s.name: tuple(1 if n == DYNAMIC else n for n in s.shape[1:]) for s in model.inputs}
    return {s.name: np.zeros((batch, *sizes[s.name]), s.dtype) for s in model.inputs}
