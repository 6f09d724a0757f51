"""Which weighted layers an engine clamps as it computes them: the bounds of a ReLU, ReLU6 or clamp right behind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekit.compress import graph, onnx_graph
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    from torch import fx

    from edgekit.model import Model

Bounds = tuple[float, float]
FREE: Bounds = (-math.inf, math.inf)


def clamps(model: Model) -> dict[str, Bounds]:
    """Return the bounds of each layer whose output goes into a clamp only, by `Layer.node`."""
    if isinstance(model.network, OnnxNetwork):
        return dict(_onnx(model.network.proto()))
    return dict(_torch(model)) if isinstance(model.network, TorchNetwork) else {}


def ends(model: Model) -> dict[str, str]:
    """Return the clamp that each such layer goes into, both by name: what an engine that fuses them makes of it."""
    if isinstance(model.network, OnnxNetwork):
        return {node.input[0]: node.output[0] for node in _onnx_clamps(model.network.proto())}
    return {one.name: clamp.name for one, clamp in _fused(model)} if isinstance(model.network, TorchNetwork) else {}


def _torch(model: Model) -> Iterator[tuple[str, Bounds]]:
    for node, clamp in _fused(model):
        yield node.name, _bounds(clamp)


def _fused(model: Model) -> Iterator[tuple[fx.Node, fx.Node]]:
    for node, _ in graph.weighted(trace(model).module(check_guards=False).graph):
        followers = list(node.users)
        if len(followers) == 1 and graph.operation(followers[0]) in graph.CLAMPS:
            yield node, followers[0]


def _bounds(node: fx.Node) -> Bounds:
    kind = graph.operation(node).rstrip("_")
    fixed = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
    if kind in fixed:
        return fixed[kind]
    default = (-1.0, 1.0) if kind == "hardtanh" else FREE
    low, high = (*node.args[1:3], None, None)[:2]
    if not all(n is None or isinstance(n, int | float) for n in (low, high)):
        return FREE  # bounds that are computed
    return (
        float(low) if isinstance(low, int | float) else default[0],
        float(high) if isinstance(high, int | float) else default[1],
    )


def _onnx(proto: onnx.ModelProto) -> Iterator[tuple[str, Bounds]]:
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in _onnx_clamps(proto):
        names = [*node.input[1:], "", ""][:2]
        if node.op_type == "Relu":
            yield node.input[0], (0.0, math.inf)
        elif all(not name or name in stored for name in names):
            found = [float(numpy_helper.to_array(stored[name])) if name else None for name in names]
            given = {a.name: a.f for a in node.attribute}  # before opset 11
            low, high = (given.get(key) if n is None else n for n, key in zip(found, ("min", "max"), strict=True))
            yield node.input[0], (-math.inf if low is None else low, math.inf if high is None else high)


def _onnx_clamps(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    fused = onnx_graph.fused_away(proto.graph)
    return (node for node in proto.graph.node if node.op_type in onnx_graph.CLAMPS and node.input[0] in fused)
