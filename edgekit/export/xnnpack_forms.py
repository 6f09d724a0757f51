"""Brings a traced graph into the forms that XNNPACK has kernels for; it computes the same. Knows no plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout")
WITH_NUMBERS = ("add", "sub", "mul", "div")
PICTURE = 4
"""Axes of a batch of pictures: batch, channels, height, width."""


def operator(node: fx.Node) -> str:
    """Return ``conv2d`` for a node that calls ``aten.conv2d.default`` or ``aten.conv2d_.default``, "" for no call."""
    if node.op != "call_function" or "." not in str(node.target):
        return ""
    return str(node.target).split(".")[1].rstrip("_")


def argument(node: fx.Node, place: int) -> Any:  # noqa: ANN401  # a node, a number, a list of either, or nothing
    """Return what a call is given at that place, ``None`` where it is given less."""
    return node.args[place] if len(node.args) > place else None


def rewrite(graph: fx.Graph) -> dict[str, str]:
    """Change the graph; return what stands for each node that left, by name.

    Dropout leaves, pictures' means keep their axes and are flattened behind, clamps become ReLU and hardtanh, and
    whole numbers beside floats become floats, for which no cast has to run.
    """
    gone = {}
    for node in list(graph.nodes):
        kind = operator(node)
        if kind in DROPOUTS and not argument(node, 2):
            gone[node.name] = argument(node, 0).name
            node.replace_all_uses_with(argument(node, 0))
            graph.erase_node(node)
        elif kind == "mean":
            _keep_axes(graph, node)
        elif kind in ("clamp", "clamp_min"):
            gone |= _as_activation(graph, node)
        elif kind in WITH_NUMBERS and is_float(node):
            node.args = tuple(_as_float(one) for one in node.args)
    return gone


def is_float(node: fx.Node) -> bool:
    """Say whether a node gives one tensor of floats."""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return dtype is not None and bool(dtype.is_floating_point)


def is_mean_of_pictures(node: fx.Node) -> bool:
    """Say whether a node takes the mean of height and width, which is the one mean that XNNPACK has."""
    axes = argument(node, 1)
    if operator(node) != "mean" or not isinstance(axes, list | tuple) or node.kwargs.get("dtype"):
        return False
    is_picture = len(argument(node, 0).meta["val"].shape) == PICTURE
    return is_picture and sorted(axis % PICTURE for axis in axes) == [2, 3]


def _keep_axes(graph: fx.Graph, node: fx.Node) -> None:
    import torch

    if not is_mean_of_pictures(node) or argument(node, 2):
        return
    node.args = (*node.args[:2], True)
    with graph.inserting_after(node):
        flat = graph.call_function(torch.ops.aten.flatten.using_ints, (node, 1))
    flat.meta = dict(node.meta)
    node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
    if isinstance(node.meta.get("val"), torch.Tensor):
        node.meta = {**node.meta, "val": node.meta["val"][:, :, None, None]}


def _as_activation(graph: fx.Graph, node: fx.Node) -> dict[str, str]:
    import torch

    low, high = node.kwargs.get("min", argument(node, 1)), node.kwargs.get("max", argument(node, 2))
    target, bounds = torch.ops.aten.hardtanh.default, [low, high]
    if low == 0 and high is None:
        target, bounds = torch.ops.aten.relu.default, []
    elif not (_is_number(low) and _is_number(high)):
        return {}
    with graph.inserting_after(node):
        made = graph.call_function(target, (node.args[0], *bounds))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return {node.name: made.name}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _as_float(value: Any) -> Any:  # noqa: ANN401  # an argument of a node may be anything
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
