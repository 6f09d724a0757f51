"""Carries the plan's activation ranges to the tensors of a LiteRT file, which have names of their own.

A tensor is the node of the traced graph that holds the same numbers on a sample, in whatever layout. Knows no recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit.export.quiet import silence
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edgekit.model import Model
    from edgekit.plan import Range
    from edgekit.tensors import Array

NEAR = 1e-3
"""How far two results may lie apart, of the largest of them, and still be the same: kernels add in another order."""
TO_CHANNEL_LAST = (0, 2, 3, 1)


def carried(path: Path, model: Model, stored: Mapping[str, Array]) -> dict[str, Range]:
    """Return the plan's range of every tensor of the float file ``path`` that holds what a planned node holds.

    ``model`` has the network that the file was written from; ``stored`` is its first calibration sample, by the file's
    names and in the file's layout.
    """
    if model.plan is None or model.data is None:
        return {}
    nodes = _results(model, model.data.calibration.head(1).inputs)
    wanted = {name: nodes[name] for name in model.plan.activations if name in nodes}
    found = {}
    for name, tensor in _tensors(path, stored).items():
        node = _same(tensor, wanted)
        if node is not None:
            found[name] = model.plan.activations[node]
    return found


def _same(tensor: Array, nodes: Mapping[str, Array]) -> str | None:
    """Name the node whose numbers these are, the nearest one."""
    near = {name: _apart(tensor, value) for name, value in nodes.items() if value.size == tensor.size}
    best = min(near, key=near.__getitem__, default=None)
    return best if best is not None and near[best] <= NEAR else None


def _apart(tensor: Array, value: Array) -> float:
    """Return the largest difference, in shares of the largest number, by the layout that fits best."""
    import numpy as np

    layouts = [value] if value.ndim != 4 else [value, value.transpose(TO_CHANNEL_LAST)]
    most = float(np.abs(value).max()) or 1.0
    fits = [layout for layout in layouts if layout.shape == tensor.shape]
    return min((float(np.abs(tensor - layout).max()) / most for layout in fits), default=float("inf"))


def _results(model: Model, sample: Mapping[str, Array]) -> dict[str, Array]:
    """Return what each node of the traced graph makes of a sample, floats only; inputs go by their public names."""
    import torch

    traced = trace(model)
    names = dict(zip(traced.graph_signature.user_inputs, [spec.name for spec in model.inputs], strict=True))
    found: dict[str, Array] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:  # noqa: ANN401  # torch's signature
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                found[names.get(n.name, n.name)] = result.detach().numpy()
            return result

    with torch.no_grad():
        Watch(traced.module()).run(*[torch.as_tensor(sample[spec.name]) for spec in model.inputs])
    return found


def _tensors(path: Path, stored: Mapping[str, Array]) -> dict[str, Array]:
    """Run a float file once and return its float tensors by name."""
    with extra("export"), silence():
        from ai_edge_litert.interpreter import Interpreter
    with silence():
        interpreter = Interpreter(str(path), num_threads=1, experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
        runner = interpreter.get_signature_runner()
        runner(**stored)
    return {
        detail["name"]: interpreter.get_tensor(detail["index"])
        for detail in _floats(interpreter.get_tensor_details())
        if _is_there(interpreter, detail)
    }


def _floats(details: Sequence[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    return (detail for detail in details if getattr(detail["dtype"], "__name__", "") == "float32")


def _is_there(interpreter: Any, detail: Mapping[str, Any]) -> bool:  # noqa: ANN401  # the interpreter is untyped
    """Say whether a tensor has numbers: what delegates keep inside themselves has none."""
    try:
        interpreter.get_tensor(detail["index"])
    except ValueError:
        return False
    return True
