"""Reads a traced graph: what a node does, and which parameter it multiplies with. Changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, "linear")
"""Operations that multiply with a weight, which is their second argument."""

CLAMPS = ("relu", "relu_", "hardtanh", "hardtanh_", "relu6", "clamp", "clamp_min")
"""Activations that every engine fuses into the operation before them."""


def operation(node: fx.Node) -> str:
    """Return ``conv2d`` for a node that calls ``aten.conv2d.default``, nothing for what is no call."""
    return str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""


def argument(node: fx.Node, position: int) -> fx.Node | None:
    """Return the node at that position of a call, None where there is none or a constant."""
    from torch import fx

    found = node.args[position] if len(node.args) > position else None
    return found if isinstance(found, fx.Node) else None


def parameter(node: fx.Node | None) -> str | None:
    """Return the name of the parameter or buffer that a node fetches."""
    return str(node.target) if node is not None and node.op == "get_attr" else None


def weighted(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Give each node that multiplies with a stored weight, and the name of that weight; not what nobody uses."""
    used = _used(graph)
    for node in graph.nodes:
        name = parameter(argument(node, 1)) if operation(node) in WEIGHTED and node in used else None
        if name:
            yield node, name


def _used(graph: fx.Graph) -> set[fx.Node]:
    """Return what the outputs are made of, and what is written in place: a head that nobody reads is never written."""
    found: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output" or operation(node).endswith("_")]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def weight_axis(node: fx.Node) -> int:
    """Return the axis of a weighted node's weight that counts its output channels."""
    return 1 if operation(node) in TRANSPOSED else 0


def is_fused_away(node: fx.Node) -> bool:
    """Say whether an engine never makes this value, because it fuses the clamp that follows."""
    followers = list(node.users)
    makes_sums = operation(node) in (*WEIGHTED, "add", "add_", "batch_norm")
    return makes_sums and len(followers) == 1 and operation(followers[0]) in CLAMPS
