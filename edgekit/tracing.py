"""Turns a PyTorch network into torch.export's graph. Knows no file and no pass."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
import weakref
from typing import TYPE_CHECKING

from edgekit.errors import CompressionError
from edgekit.model import Model, TorchNetwork
from edgekit.plugins import extra
from edgekit.sources import first_line, own_line
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from edgekit.tensors import Array, TensorSpec

_TRACED: weakref.WeakKeyDictionary[
    torch.nn.Module, tuple[tuple[object, ...], tuple[TensorSpec, ...], torch.export.ExportedProgram]
] = weakref.WeakKeyDictionary()
"""Graphs of the modules that are alive: a pass, its measuring and its saving all need the same one."""


def trace(model: Model) -> torch.export.ExportedProgram:
    """Return the torch.export graph of the model's network, its batch dynamic.

    Raises:
        CompressionError: not a PyTorch network, or control flow that cannot be traced.
    """
    with extra("compress"):
        import torch
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(f"{model.name} is no PyTorch network", "give its Python workload instead")
    module, state = model.network.module, _state(model.network.module)
    kept = _TRACED.get(module)
    if kept is not None and kept[:2] == (state, model.inputs):
        return kept[2]
    example = tuple(torch.as_tensor(a) for a in _example(model, 2).values())
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    shapes = tuple({0: batch} for _ in example)
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        shapes = (shapes,)  # type: ignore[assignment]  # *args are one entry, a tuple of its own
    try:
        with _quiet():
            traced = torch.export.export(module, example, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise CompressionError(f"{model.name} cannot be traced to a graph: {why(error)}", way_out(error)) from error
    _TRACED[module] = (state, model.inputs, traced)
    return traced


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch tells: a list of weights in recurrent layers, the whole graph where it cannot be made."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def depends_on_values(error: BaseException) -> bool:
    """Say whether torch.export stopped because the way through the network depends on values of a tensor."""
    return "data-dependent" in str(error) or "DataDependent" in type(error).__name__


def why(error: BaseException) -> str:
    """Say why a network has no graph, with the line of its own code at which that came up."""
    line = own_line(error)
    if depends_on_values(error):
        return f"its control flow depends on the values of a tensor{f' ({line})' if line else ''}"
    return first_line(error) + (f" ({line})" if line else "")


def way_out(error: BaseException) -> str:
    """Return what a person does about `why`."""
    if depends_on_values(error):
        return "write it with torch.where or torch.cond, or move the decision out of the network"
    return "mend that line, or export it to ONNX yourself and give the .onnx file"


def _state(module: torch.nn.Module) -> tuple[object, ...]:
    """Return what tells that a module would be traced to another graph: its parts, its tensors, its modes.

    New values in the same tensors are not among it: the graph holds the tensors themselves.
    """
    parts = tuple((name, id(part), part.training) for name, part in module.named_modules())
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return (*parts, *((name, id(tensor), tuple(tensor.shape)) for name, tensor in tensors))


def _example(model: Model, batch: int) -> dict[str, Array]:
    import numpy as np

    sizes = {s.name: tuple(1 if n == DYNAMIC else n for n in s.shape[1:]) for s in model.inputs}
    return {s.name: np.zeros((batch, *sizes[s.name]), s.dtype) for s in model.inputs}
