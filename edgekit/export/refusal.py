"""What converters raise where they cannot hold a model, and how that is said: the operator, its module, its line.

Knows no converter. An operator is told by its name in torch.export's graph, as ``aten.linalg_svd``, also where a
converter complains of what it was decomposed to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import CompressionError, ExportError, causes
from edgekit.model import TorchNetwork
from edgekit.sources import first_line, is_own
from edgekit.tracing import depends_on_values, trace, way_out, why

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import fx

    from edgekit.model import Model

REFUSALS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError,
    ArithmeticError, NameError, StopIteration,
)  # fmt: skip
"""They share no class: litert-torch, coremltools and torch.export raise any of these for an operator they lack."""

WAY_OUT = "replace that operator, or use another target"
REAL = "compute with real and imaginary parts as floats, or move the transform out of the network"
SHOWN = 3
"""How many places of an operator are told."""

_NAMED = (
    r"op='(?:\w+)\.(\w+)'",  # torch.onnx
    r"(?:Lowering not found: |torch\._ops\.|torch\.ops\.)\w+\.(\w+)",  # litert-torch, ExecuTorch
    r"fx node (\w+)",  # coremltools
    r"Torch `(\w+)` op",
    r"\b[a-z_]\w*::([a-z_]\w+)",  # aten::special_zeta
    r'\("(\w+)"\("',  # the place in an error of MLIR
)


class UnsupportedOperator(ExportError):
    """A format has no form for an operator. ``nodes`` name it in the model's traced graph; empty where it has none."""

    def __init__(self, message: str, hint: str = "", nodes: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.nodes = tuple(nodes)


def reason(error: BaseException) -> str:
    """Return the first line of the deepest cause, at most 300 characters."""
    deepest = causes(error)[-1]
    if isinstance(deepest, KeyError) and deepest.args:  # its text is a repr, of a message too
        return first_line(ValueError(deepest.args[0]))
    return first_line(deepest)


def traced(model: Model) -> torch.export.ExportedProgram:
    """Return the model's graph, for an exporter.

    Raises:
        ExportError: it cannot be traced; names the line of the network's own code.
    """
    try:
        return trace(model)
    except CompressionError as error:
        raise ExportError(error.message, error.hint) from error


def refused(model: Model, form: str, error: BaseException) -> ExportError:
    """Return the error of a converter that cannot hold a model: ``{model} has no {form} form: …``.

    Names the line at which control flow depends on values, else the operators that the converter complains of and the
    modules that call them, else where the network computes with complex numbers.
    """
    for one in causes(error):
        if depends_on_values(one):
            return ExportError(f"{model.name} cannot be traced to a graph: {why(one)}", way_out(one))
    told = "\n".join(map(str, causes(error)))
    program = _graph(model)
    found = called(program, names_in(told)) if program else []
    imaginary = [node for node in program.graph.nodes if is_complex(node)] if program else []
    if imaginary and ("complex" in told.lower() or not found or {*found} & {*imaginary}):
        return UnsupportedOperator(
            f"{model.name} has no {form} form: it computes with complex numbers at {places(imaginary)}:"
            f" {reason(error)}",
            REAL,
            [node.name for node in imaginary[:1]],
        )
    if found:
        return UnsupportedOperator(
            f"{model.name} has no {form} form for {places(found)}: {reason(error)}",
            WAY_OUT,
            [node.name for node in found],
        )
    return ExportError(
        f"{model.name} has no {form} form: {reason(error)}", "use another target; the converter names no operator"
    )


def _graph(model: Model) -> torch.export.ExportedProgram | None:
    if not isinstance(model.network, TorchNetwork):
        return None
    try:
        return trace(model)
    except CompressionError:  # what stopped the tracing is told already
        return None


def names_in(told: str) -> set[str]:
    """Return the operators' names in a converter's message, without their namespace: ``_linalg_svd``."""
    return {name for pattern in _NAMED for name in re.findall(pattern, told)}


def called(program: torch.export.ExportedProgram, names: Iterable[str]) -> list[fx.Node]:
    """Return the nodes of the graph that call the operators of these names, or are decomposed to them."""
    wanted = set(names)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    found = [node for node in nodes if kind(node) in wanted]
    if found or not wanted:
        return found
    sources = {
        node.meta["from_node"][0].name
        for node in program.run_decompositions().graph.nodes
        if node.meta.get("from_node") and kind(node) in wanted
    }
    found = [node for node in nodes if node.name in sources]
    # A converter decomposes further than torch does: prims.zeta of aten.special_zeta.
    return found or [node for node in nodes if any(kind(node).endswith(f"_{name}") for name in wanted)]


def kind(node: fx.Node) -> str:
    """Return ``special_zeta`` of ``aten.special_zeta.default``, "" for what is no operator."""
    words = str(node.target).split(".") if node.op == "call_function" else []
    return words[1] if len(words) > 1 else ""


def is_complex(node: fx.Node) -> bool:
    """Say whether a node of a traced graph makes complex numbers."""
    value = node.meta.get("val")
    return getattr(getattr(value, "dtype", None), "is_complex", False)


def module_path(node: fx.Node) -> str:
    """Return the path of the module that a node comes from, else the node's own name."""
    stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    return next((path for path in reversed(stack) if path), node.name)


def places(nodes: Iterable[fx.Node]) -> str:
    """Say what the nodes call and where: ``aten.linalg_svd at inner.0 (net.py:22)``, at most three of them."""
    told = list(dict.fromkeys(f"{_operator(node)} at {module_path(node)}{_line(node)}" for node in nodes))
    return ", ".join(told[:SHOWN]) + (f" and {len(told) - SHOWN} more" if len(told) > SHOWN else "")


def _operator(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0] or str(node.target)


def _line(node: fx.Node) -> str:
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f" ({Path(path).name}:{number})" for path, number in lines if is_own(path)]
    return own[-1] if own else ""
