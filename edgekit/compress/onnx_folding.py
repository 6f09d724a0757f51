"""Folds batch normalization in an ONNX graph into the convolution or matrix product before it. Knows no plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgekit import onnx_io
from edgekit.compress.onnx_graph import weight_axis
from edgekit.model import OnnxNetwork

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

    from edgekit.tensors import Array

FOLDS = ("Conv", "Gemm")


class _Pair(NamedTuple):
    layer: onnx.NodeProto
    norm: onnx.NodeProto
    axis: int


def folded(network: OnnxNetwork) -> tuple[OnnxNetwork, int]:
    """Return the network without the normalizations that follow one layer alone, and how many those were.

    A network with nothing to fold comes back itself (Jacob et al. 2018, section 3.2).
    """
    proto = network.proto()
    pairs = list(_pairs(proto))
    if not pairs:
        return network, 0
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for pair in pairs:
        _fold(proto, pair, stored)
    gone = {pair.norm.output[0] for pair in pairs}
    kept = [type(n).FromString(n.SerializeToString()) for n in proto.graph.node if not _is_gone(n, gone)]
    used = {name for node in kept for name in node.input}
    tensors = [type(t).FromString(t.SerializeToString()) for t in proto.graph.initializer if t.name in used]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(kept)
    proto.graph.initializer.extend(tensors)
    return OnnxNetwork(network.path, onnx_io.one_piece(proto)), len(pairs)


def _is_gone(node: onnx.NodeProto, gone: set[str]) -> bool:
    return node.op_type == "BatchNormalization" and node.output[0] in gone


def _pairs(proto: onnx.ModelProto) -> Iterator[_Pair]:
    """Give layers with the normalization that alone follows them, all of whose numbers are stored."""
    graph = proto.graph
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return  # a nested graph may read any value
    stored = {tensor.name: tensor for tensor in graph.initializer}
    shown = {value.name for value in graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for layer in graph.node:
        axis = weight_axis(layer, stored) if layer.op_type in FOLDS else None
        followers = readers.get(layer.output[0], [])
        if axis is None or layer.output[0] in shown or len(followers) != 1:
            continue
        norm = followers[0]
        own = list(layer.input[1:])
        alone = all(name in stored and len(readers[name]) == 1 for name in own if name)
        if alone and _normalizes(norm, stored) and not _scales(layer):
            yield _Pair(layer, norm, axis)


def _normalizes(norm: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    given = {a.name: a.i for a in norm.attribute}
    is_inference = norm.op_type == "BatchNormalization" and not given.get("training_mode")
    return is_inference and len(norm.output) == 1 and all(name in stored for name in norm.input[1:])


def _scales(layer: onnx.NodeProto) -> bool:
    """Say whether a Gemm multiplies its product or its bias with a number of its own."""
    return any((a.name in ("alpha", "beta") and a.f != 1) or (a.name == "transA" and a.i) for a in layer.attribute)


def _fold(proto: onnx.ModelProto, pair: _Pair, stored: dict[str, onnx.TensorProto]) -> None:
    import numpy as np
    from onnx import numpy_helper

    def read(name: str) -> Array:
        values: Array = numpy_helper.to_array(stored[name]).astype(np.float64)
        return values

    layer, norm = pair.layer, pair.norm
    gamma, beta, mean, variance = (read(name) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    weight = read(layer.input[1])
    shape = [-1 if axis == pair.axis else 1 for axis in range(weight.ndim)]
    offsets = read(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros_like(mean)
    bias = layer.input[2] if len(layer.input) > 2 and layer.input[2] else f"{layer.input[1]}__bias"
    made = {layer.input[1]: weight * factor.reshape(shape), bias: (offsets - mean) * factor + beta}
    for name, values in made.items():
        if name not in stored:
            stored[name] = proto.graph.initializer.add()
        stored[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    layer.input[:] = [*layer.input[:2], bias]
    layer.output[0] = norm.output[0]
