"""Lowers a dynamic plan into ONNX: inputs become integers by the range they have when the device computes.

Products are MatMulInteger and ConvInteger, which ONNX Runtime fuses with what follows; what they cannot hold (scales
a group, transposed convolutions) is computed in float from the same integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.export.onnx_weights import (
    Planned,
    Weights,
    as_product,
    has_block_kernel,
    pack,
    planned_nodes,
    replace_nodes,
    storage,
)

if TYPE_CHECKING:
    import onnx

    from edgekit.export.onnx_file import Graph
    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan

GEOMETRY = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def quantize(graph: Graph, model: Model, plan: QuantizationPlan) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the graph with the plan lowered into it, and notes on what is computed in float."""
    proto = type(graph.proto)()
    proto.CopyFrom(graph.proto)
    weights = Weights(proto)
    items = {item.node.output[0]: item for item in planned_nodes(weights, model, plan)}
    nodes: list[onnx.NodeProto] = []
    rounded: set[str] = set()
    floats = 0
    for node in proto.graph.node:
        item = items.get(node.output[0])
        if item is None:
            nodes.append(node)
            continue
        item, own = as_product(weights, item)
        if has_block_kernel(item):
            pack(weights, item)  # its kernel rounds the input to 8 bits, block by block
            nodes += own
            continue
        source = node.input[0]
        if source not in rounded:
            nodes.append(_rounding(source))
            rounded.add(source)
        if _is_integer(item):
            nodes += _product(weights, item)
        else:
            floats += 1
            pack(weights, item)
            nodes += _in_float(node)
    replace_nodes(proto, [*weights.nodes, *nodes])
    weights.drop_unused()
    notes = ("inputs of layers are rounded to 8 bits by the range they have at that moment",)
    return proto, (*notes, f"{floats} layers are computed in float from integers") if floats else notes


def _parts(source: str) -> list[str]:
    return [f"{source}__dynamic_{part}" for part in ("integer", "scale", "zero")]


def _rounding(source: str) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("DynamicQuantizeLinear", [source], _parts(source), f"{source}__dynamic")


def _is_integer(item: Planned) -> bool:
    """Say whether an integer product can hold the layer: scales a channel of the outputs, nothing turned."""
    from onnx import helper

    node, given = item.node, {a.name: helper.get_attribute_value(a) for a in item.node.attribute}
    if node.op_type == "ConvTranspose" or item.rule.granularity == "group":
        return False
    if len(set(item.integers()[2].reshape(-1).tolist())) > 1:
        return False  # the products take one zero point a weight
    if node.op_type == "Gemm" and (given.get("transA") or given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1):
        return False
    return node.op_type == "Conv" or item.values.ndim == 2


def _product(weights: Weights, item: Planned) -> list[onnx.NodeProto]:
    import numpy as np
    from onnx import TensorProto, helper

    node, out = item.node, item.node.output[0]
    integers, scales, zeros = item.integers()
    is_conv = node.op_type == "Conv"
    if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
        integers = np.ascontiguousarray(integers.T)
    kind = storage(item.rule, packed=False)
    shape = (-1, *(1,) * (item.values.ndim - 2)) if is_conv else (-1,)
    stored = weights.add(f"{item.weight}_quantized", integers.astype(kind))
    zero = weights.add(f"{item.weight}_zero_point", zeros.reshape(-1)[0].astype(kind).reshape(()))
    scale = weights.add(f"{item.weight}_scale", scales.reshape(shape) if scales.size > 1 else scales.reshape(()))
    value, input_scale, input_zero = _parts(node.input[0])
    made = [f"{out}__{part}" for part in ("sum", "float", "scale", "scaled")]
    kept = [a for a in node.attribute if is_conv and a.name in GEOMETRY]
    product = helper.make_node(
        "ConvInteger" if is_conv else "MatMulInteger", [value, stored, input_zero, zero], made[:1], f"{out}__product"
    )
    product.attribute.extend(kept)
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
    if bias and is_conv:
        bias = weights.add(f"{out}__bias", weights.array(bias).reshape(shape))
    nodes = [
        product,
        helper.make_node("Cast", made[:1], made[1:2], f"{out}__cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [input_scale, scale], made[2:3], f"{out}__scales"),
        helper.make_node("Mul", made[1:3], [made[3] if bias else out], f"{out}__scale_it"),
    ]
    return [*nodes, helper.make_node("Add", [made[3], bias], [out], f"{out}__add")] if bias else nodes


def _in_float(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    from onnx import helper

    made = f"{node.output[0]}__input"
    nodes = [helper.make_node("DequantizeLinear", _parts(node.input[0]), [made], made), node]
    node.input[0] = made
    return nodes
