"""Which layers follow each other so that a channel's scale can move from one into the next.

Found by data flow, on a traced PyTorch graph or an ONNX graph. Knows no weights' values and no plan.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.compress import graph
from edgekit.compress.layers import layers, layers_of
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx
    from torch import fx

    from edgekit.compress.layer import Layer
    from edgekit.model import Model

ALWAYS = ("relu", "relu_", "leaky_relu", "leaky_relu_", "alias", "clone", "contiguous", "detach_")
"""Operations that a positive factor a channel passes through, wherever the channels lie."""
POOLS = ("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
BOUNDS = ("hardtanh", "hardtanh_", "relu6", "clamp", "clamp_", "clamp_min")
VIEWS = ("view", "flatten", "reshape")

ONNX_ALWAYS = ("Relu", "LeakyRelu", "Identity", "Dropout")
ONNX_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass(frozen=True)
class Pair:
    """A layer whose output goes into the next one only, and the least value at which it is cut on the way."""

    first: Layer
    second: Layer
    ceiling: float = math.inf


def pairs(model: Model) -> tuple[Pair, ...]:
    """Return the pairs in execution order: convolutions, depthwise ones too, and linear layers, each used once."""
    if isinstance(model.network, OnnxNetwork):
        found = _onnx_pairs(model.network.proto(), layers(model))
    elif isinstance(model.network, TorchNetwork):
        found = _torch_pairs(model)
    else:
        return ()
    return tuple(found)


def _torch_pairs(model: Model) -> Iterator[Pair]:
    traced = trace(model).module(check_guards=False)
    places = traced.graph.find_nodes(op="placeholder")
    public = {node.name: spec.name for node, spec in zip(places, model.inputs, strict=True)}
    known = {layer.node: layer for layer in layers_of(traced, public)}
    free = _unshared(known.values())
    for node, name in graph.weighted(traced.graph):
        first = known[node.name]
        if name not in free or (graph.argument(node, 2) is not None and first.bias is None):
            continue
        end, ceiling = _passed(node, is_convolution=first.kind != "linear")
        second = known.get(end.name) if end is not None else None
        if second is not None and second.weight in free and _fits(first, second):
            yield Pair(first, second, ceiling)


def _unshared(found: Iterable[Layer]) -> set[str]:
    """Name the weights that one layer alone uses, with a bias that no other layer uses."""
    every = list(found)
    weights, biases = Counter(layer.weight for layer in every), Counter(layer.bias for layer in every if layer.bias)
    return {layer.weight for layer in every if weights[layer.weight] == 1 and biases.get(layer.bias or "", 1) == 1}


def _fits(first: Layer, second: Layer) -> bool:
    """Say whether the channels of ``first`` can be found again in the weight of ``second``."""
    if (first.kind == "transposed" and first.groups > 1) or second.kind == "transposed":
        return False
    taken = second.values.shape[1] * second.groups
    given = len(first.values)
    return taken == given or (second.kind == "linear" and first.kind != "linear" and taken % given == 0)


def _passed(node: fx.Node, *, is_convolution: bool) -> tuple[fx.Node | None, float]:
    """Follow a value as long as factors pass through; return the weighted node where it ends."""
    ceiling = math.inf
    while True:
        followers = list(node.users)
        if len(followers) != 1:
            return None, ceiling
        follower = followers[0]
        kind = graph.operation(follower)
        if kind in graph.WEIGHTED:
            is_alone = graph.argument(follower, 0) is node and graph.argument(follower, 1) is not node
            return (follower if is_alone else None), ceiling
        if kind in BOUNDS:
            low, high = _bounds(follower, kind)
            if low != 0:
                return None, ceiling
            ceiling = min(ceiling, high)
        elif not (kind in ALWAYS or _is_idle(follower, kind) or (is_convolution and _keeps_channels(follower, kind))):
            return None, ceiling
        node = follower


def _bounds(node: fx.Node, kind: str) -> tuple[float, float]:
    """Return the limits of a clamp, NaN where they are computed."""
    given: list[Any] = list(node.args[1:])
    if kind == "relu6":
        return 0.0, 6.0
    low, high = [*given, *(-1.0, 1.0)[len(given) :]] if kind.startswith("hardtanh") else [*given, None, None][:2]
    sides = (-math.inf if low is None else low), (math.inf if high is None else high)
    known = [float(side) if isinstance(side, int | float) else math.nan for side in sides]
    return known[0], known[1]


def _is_idle(node: fx.Node, kind: str) -> bool:
    return kind == "dropout" and len(node.args) > 2 and node.args[2] is False


def _keeps_channels(node: fx.Node, kind: str) -> bool:
    """Say whether a node leaves each channel of a convolution to itself: pools, zeros around, means, flattening."""
    source = graph.argument(node, 0)
    size = 0 if source is None else source.meta["val"].dim()
    if kind in POOLS:
        return True
    if kind in ("pad", "constant_pad_nd"):
        edges, *more = node.args[1:]
        words = [a for a in more if a is not None]
        return len(edges) <= 2 * (size - 2) and all(w in {"constant", 0} for w in words)  # type: ignore[arg-type]  # a list of ints
    if kind == "mean":
        axes = node.args[1] if len(node.args) > 1 else None
        return isinstance(axes, list | tuple) and all(int(a) % size >= 2 for a in axes)
    return kind in VIEWS and node.meta["val"].dim() == 2 and size >= 3


def _onnx_pairs(proto: onnx.ModelProto, found: tuple[Layer, ...]) -> Iterator[Pair]:
    followers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            followers.setdefault(name, []).append(node)
    makers = {node.output[0]: node for node in proto.graph.node}
    given = {output.name for output in proto.graph.output}
    known = {layer.node: layer for layer in found}
    free = _unshared(found)
    reader = _OnnxReader(proto)
    for first in found:
        maker = makers[first.node]
        if first.weight not in free or (len(maker.input) > 2 and maker.input[2] and first.bias is None):
            continue
        name, ceiling = first.node, math.inf
        while name not in given and len(followers.get(name, [])) == 1:
            node = followers[name][0]
            second = known.get(node.output[0])
            if second is not None:
                if second.source == name and second.weight in free and _fits(first, second):
                    yield Pair(first, second, ceiling)
                break
            high = reader.limit(node, is_convolution=first.kind != "linear")
            if math.isnan(high):
                break
            name, ceiling = node.output[0], min(ceiling, high)


class _OnnxReader:
    """Says of single nodes whether a factor a channel passes through them."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "Constant":
                self._stored.update((node.output[0], a.t) for a in node.attribute if a.name == "value")

    def limit(self, node: onnx.NodeProto, *, is_convolution: bool) -> float:
        """Return the largest value that passes, infinity where all do, NaN where factors do not."""
        if node.op_type in ONNX_ALWAYS:
            return math.inf
        if node.op_type == "Clip":
            low, high = self._side(node, 1, -math.inf), self._side(node, 2, math.inf)
            return high if low == 0 else math.nan
        is_apart = node.op_type in ONNX_POOLS or self._is_mean(node) or self._is_border(node)
        return math.inf if is_convolution and (is_apart or self._is_flat(node)) else math.nan

    def _side(self, node: onnx.NodeProto, position: int, missing: float) -> float:
        named = {a.name: a.f for a in node.attribute}
        if len(node.input) <= position or not node.input[position]:
            return float(named.get(("min", "max")[position - 1], missing))
        found = self._ints_or_floats(node, position)
        return float(found[0]) if found is not None and len(found) == 1 else math.nan

    def _ints_or_floats(self, node: onnx.NodeProto, position: int) -> list[float] | None:
        from onnx import numpy_helper

        if len(node.input) <= position or node.input[position] not in self._stored:
            return None
        return [float(n) for n in numpy_helper.to_array(self._stored[node.input[position]]).reshape(-1)]

    def _is_mean(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "ReduceMean":
            return False
        axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), self._ints_or_floats(node, 1))
        # the size is unknown: -1 and -2 are positions of a picture, at most
        return axes is not None and all(a in (2, 3, -1, -2) for a in axes)

    def _is_border(self, node: onnx.NodeProto) -> bool:
        edges = self._ints_or_floats(node, 1) if node.op_type == "Pad" else None
        if edges is None or len(node.input) > 3:
            return False
        half = len(edges) // 2
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        value = self._ints_or_floats(node, 2) if len(node.input) > 2 and node.input[2] else [0.0]
        return mode == b"constant" and value == [0.0] and not any((*edges[:2], *edges[half : half + 2]))

    def _is_flat(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "Flatten":
            return next((a.i for a in node.attribute if a.name == "axis"), 1) == 1
        shape = self._ints_or_floats(node, 1) if node.op_type == "Reshape" else None
        return shape is not None and len(shape) == 2 and (shape[0] == 0 or shape[1] > 0)


__all__ = ["Pair", "pairs"]
