"""Reads and rewrites an ONNX file: its weights, every value in it, and the same graph rounded by a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit import grid
from edgekit.errors import CompressionError

if TYPE_CHECKING:
    from collections.abc import Container

    import onnx

    from edgekit.model import OnnxNetwork
    from edgekit.plan import QuantizationPlan, Range

CLAMPS = ("Relu", "Clip")
SUMS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")


def weights(network: OnnxNetwork) -> dict[str, int]:
    """Return each weight of a convolution or matrix product with the axis of its output channels.

    Raises:
        CompressionError: the file is quantized already, or a weight holds NaN or infinity.
    """
    model = network.proto()
    kinds = {node.op_type for node in model.graph.node}
    quantized = sorted(kind for kind in kinds if "QLinear" in kind or "QuantizeLinear" in kind or "Integer" in kind)
    if quantized:
        raise CompressionError(
            f"{network.path.name} is quantized already: it holds {quantized[0]}", "give the float model"
        )
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        axis = weight_axis(node, stored)
        if axis is not None:
            found[node.input[1]] = axis
    _refuse_broken(stored, found)
    return found


def _refuse_broken(stored: dict[str, onnx.TensorProto], weights: Container[str]) -> None:
    import numpy as np
    import onnx

    for name, tensor in stored.items():
        values = onnx.numpy_helper.to_array(tensor)
        # minus infinity in what is no weight is a mask of attention
        if values.dtype.kind == "f" and not (np.isfinite(values) if name in weights else values < np.inf).all():
            raise CompressionError(f"weight {name!r} holds NaN or infinity", "check the file")


def values(model: onnx.ModelProto) -> list[str]:
    """List every value that a node makes."""
    return [name for node in model.graph.node for name in node.output if name]


def weight_axis(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> int | None:
    """Return the axis of the output channels of a node's stored weight, None where it has none."""
    if len(node.input) < 2 or node.input[1] not in stored:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    dimensions = len(stored[node.input[1]].dims)
    return dimensions - 1 if node.op_type == "MatMul" and dimensions >= 2 else None


def rounded(model: onnx.ModelProto, plan: QuantizationPlan) -> onnx.ModelProto:
    """Return the graph with its weights rounded and QuantizeLinear/DequantizeLinear after each planned value.

    Only for measuring on this machine: an engine's own choices of what to fuse may differ.
    """
    import numpy as np
    import onnx

    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in plan.weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(grid.rounded(array, plan.weights[tensor.name]), tensor.name))
        elif plan.scheme == "float16" and array.dtype == np.float32:
            half = array.astype(np.float16).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    if plan.scheme == "dynamic":
        _round_inputs(model, plan)
    planned = {name: limits for name, limits in plan.activations.items() if name not in fused_away(model.graph)}
    nodes: list[onnx.NodeProto] = []
    for value in model.graph.input:
        if value.name in planned:
            for node in model.graph.node:
                node.input[:] = [f"{name}__rounded" if name == value.name else name for name in node.input]
            nodes += _round_value(model, value.name, f"{value.name}__rounded", planned[value.name])
    for node in model.graph.node:
        made = [name for name in node.output if name in planned]
        node.output[:] = [f"{name}__float" if name in planned else name for name in node.output]
        nodes.append(node)
        for name in made:
            nodes += _round_value(model, f"{name}__float", name, planned[name])
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _round_inputs(model: onnx.ModelProto, plan: QuantizationPlan) -> None:
    """Round what each planned weight is multiplied with by the range that it has at that moment."""
    from onnx import helper

    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if len(node.input) > 1 and node.input[1] in plan.weights:
            made = [f"{node.name or node.output[0]}__{part}" for part in ("integer", "scale", "zero", "rounded")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [node.input[0]], made[:3]))
            nodes.append(helper.make_node("DequantizeLinear", made[:3], made[3:]))
            node.input[0] = made[3]
        nodes.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def fused_away(graph: onnx.GraphProto) -> set[str]:
    """Name the values that engines never make, because they fuse the clamp that follows."""
    followers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            followers.setdefault(name, []).append(node.op_type)
    return {
        name
        for node in graph.node
        if node.op_type in SUMS
        for name in node.output
        if len(followers.get(name, [])) == 1 and followers[name][0] in CLAMPS
    }


def _round_value(model: onnx.ModelProto, source: str, target: str, limits: Range) -> list[onnx.NodeProto]:
    import numpy as np
    from onnx import helper, numpy_helper

    own = grid.activation_grid(limits)
    names = [f"{target}__scale", f"{target}__zero"]
    for name, value in zip(names, (np.float32(own.scale), np.uint8(own.zero)), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return [
        helper.make_node("QuantizeLinear", [source, *names], [f"{target}__integer"]),
        helper.make_node("DequantizeLinear", [f"{target}__integer", *names], [target]),
    ]
