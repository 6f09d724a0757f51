"""Lowers a program for XNNPACK and tells what came of it: what runs there, and what stays outside. Knows no plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError
from edgekit.export.quiet import silence
from edgekit.export.refusal import REFUSALS, WAY_OUT, UnsupportedOperator, called, module_path, places, refused
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import fx

    from edgekit.model import Model

ROUNDING = ("quantize_", "dequantize_", "choose_qparams")
IMPLICIT = "IS_IMPLICIT_Q_DQ_TAG"
"""The mark on rounding nodes that became part of an integer kernel."""
VOLUME = 5
"""Axes of what a 3-D convolution gives."""
INSIDE = "xnnpack."


@dataclass(frozen=True)
class Lowered:
    """The file's bytes and its operators by name; those that XNNPACK runs begin with ``xnnpack.``."""

    content: bytes
    operators: Counter[str]

    def note(self) -> str:
        """Say in one sentence how many operators XNNPACK runs, and which it does not; rounding is no operator."""
        computing = {n: c for n, c in self.operators.items() if not n.removeprefix(INSIDE).startswith(ROUNDING)}
        outside = {name: count for name, count in computing.items() if not name.startswith(INSIDE)}
        total = sum(computing.values())
        told = f"XNNPACK runs {total - sum(outside.values())} of {total} operators"
        listed = ", ".join(f"{count} {name}" for name, count in sorted(outside.items()))
        return f"{told}; ExecuTorch's own kernels run {listed}" if outside else told


def lower(program: torch.export.ExportedProgram, model: Model) -> Lowered:
    """Return what XNNPACK makes of a program with a fixed batch, made of ``model``.

    Raises:
        ExportError: an operator that ExecuTorch has no form or kernel for, or integers that no kernel takes.
        MissingExtra: executorch is not installed.
    """
    with extra("executorch"), silence():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import error as own
        from executorch.exir import to_edge_transform_and_lower
        from torch._export.verifier import SpecViolationError
    try:
        with silence():
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            graph = edge.exported_program().graph_module
            _refuse_outside(graph)
            written = edge.to_executorch()
    except (*REFUSALS, SpecViolationError, own.ExportError, own.InternalError) as error:
        raise refused(model, "ExecuTorch", error) from error
    _refuse_without_kernel(written.executorch_program, model)
    outside = Counter(_name(node) for node in _calls(graph))
    inside = Counter(INSIDE + _name(node) for part in _delegates(graph) for node in _calls(part))
    return Lowered(bytes(written.buffer), inside + outside)


def _delegates(graph: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for part in graph.children():
        lowered: Any = part
        if hasattr(part, "original_module"):
            yield lowered.original_module.graph_module


def _calls(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Give what computes: no call of a delegate, no pick of a result, no rounding that is part of a kernel."""
    for node in graph.graph.nodes:
        if _name(node) and not node.meta.get(IMPLICIT) and "_per_channel" not in _name(node):
            yield node


def _name(node: fx.Node) -> str:
    """Return ``mean`` of ``aten::mean.dim``, "" for what is no operator."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return "" if schema is None else str(schema.name).rpartition("::")[2]


def _refuse_outside(graph: fx.GraphModule) -> None:
    """Refuse what would be computed otherwise than planned outside of XNNPACK, or not at all."""
    for node in graph.graph.nodes:
        if _name(node).startswith(ROUNDING):
            reader = next(iter(node.users), node)
            raise ExportError(
                f"XNNPACK has no integer kernel for {module_path(reader)} ({_name(reader) or reader.name}): its "
                "integers would be computed in float",
                "leave its weight out with keep, or use another target",
            )
        if _name(node) == "convolution" and node.meta["val"].dim() == VOLUME:
            raise ExportError(f"ExecuTorch has no kernel for {module_path(node)}, a 3-D convolution", WAY_OUT)


def _refuse_without_kernel(written: Any, model: Model) -> None:  # noqa: ANN401  # executorch is untyped
    """Ask the runtime of this package for a kernel of each operator outside of XNNPACK."""
    with extra("executorch"), silence():
        from executorch.runtime import Runtime

        known = Runtime.get().operator_registry.operator_names
    wanted = {
        f"{one.name}.{one.overload}" if one.overload else one.name
        for plan in written.execution_plan
        for one in plan.operators
    }
    missing = sorted(wanted - known)
    if missing:
        found = called(trace(model), {one.partition("::")[2].partition(".")[0] for one in missing})
        place = f", which {places(found)} needs" if found else ""
        raise UnsupportedOperator(
            f"ExecuTorch's runtime has no kernel for {', '.join(missing)} of {model.name}{place}",
            WAY_OUT,
            [node.name for node in found],
        )
