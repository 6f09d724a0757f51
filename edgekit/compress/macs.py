"""Counts the multiplications that a network makes for one sample. Knows neither time nor bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgekit import onnx_io
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.plugins import extra
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.model import Model

Shapes = dict[str, tuple[int, ...]]


def macs(model: Model) -> int | None:
    """Return the multiply-accumulates of convolutions, linear layers and matrix products for one sample.

    None where nothing can be counted: a language model's folder, or an ONNX file whose shapes depend on values.
    """
    if isinstance(model.network, TorchNetwork):
        return _torch(model, model.network)
    return _onnx(model.network) if isinstance(model.network, OnnxNetwork) else None


def _torch(model: Model, network: TorchNetwork) -> int:
    with extra("compress"):
        import torch
        from torch.utils.flop_counter import FlopCounterMode
    batch = max(1, model.inputs[0].shape[0])
    sizes = {spec.name: (batch, *(1 if n == DYNAMIC else n for n in spec.shape[1:])) for spec in model.inputs}
    example = [torch.zeros(sizes[spec.name], dtype=getattr(torch, spec.dtype)) for spec in model.inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.module(*example)
    return int(counter.get_total_flops()) // 2 // batch  # torch counts an addition and a multiplication as two


def _onnx(network: OnnxNetwork) -> int | None:
    with extra("compress"):
        pass
    proto = network.proto()
    batch = 1
    stored = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if value.name in stored or not dimensions:
            continue
        if dimensions[0].dim_value:
            batch = dimensions[0].dim_value
        else:
            dimensions[0].dim_value = 1
    del proto.graph.value_info[:]  # they speak of the batch by its name
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    onnx_io.infer_shapes(proto, data_prop=True)
    inferred = proto.graph
    shapes: Shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    try:
        return sum(_node(node, shapes) for node in inferred.node) // batch
    except (KeyError, IndexError, ZeroDivisionError):
        return None


def _node(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:  # noqa: ANN401  # onnx is untyped here
    """Count one node; a shape that is not known is a KeyError, a size that is not known a ZeroDivisionError."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    made, left, right = (math.prod(shapes[name]) for name in (node.output[0], node.input[0], node.input[1]))
    1 // (made * left * right)
    if node.op_type == "Conv":
        return made * right // shapes[node.input[1]][0]
    if node.op_type == "ConvTranspose":
        return left * right // shapes[node.input[1]][0]
    if node.op_type == "MatMul":
        return made * shapes[node.input[0]][-1]
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return made * shapes[node.input[0]][0 if turned else 1]
