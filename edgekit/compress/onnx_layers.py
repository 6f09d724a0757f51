"""The layers of an ONNX graph: found, computed one node at a time, and written back. Knows no plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit import onnx_io
from edgekit.compress import onnx_graph
from edgekit.compress.layer import Change, Layer
from edgekit.errors import CompressionError
from edgekit.model import OnnxNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx
    import onnxruntime

    from edgekit.tensors import Array

KINDS = {"Conv": "conv", "ConvTranspose": "transposed", "Gemm": "linear", "MatMul": "linear"}


def layers_of(proto: onnx.ModelProto) -> Iterator[Layer]:
    """Give the layers whose weight is stored in the file, in the order of its nodes."""
    import numpy as np
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        axis = onnx_graph.weight_axis(node, stored)
        if axis is None or len(stored[node.input[1]].dims) < 2:
            continue
        attributes = _attributes(node)
        if attributes.get("transA") or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
            continue  # a Gemm that scales or turns its input is not what `Layer.compute` computes
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in stored else None
        weight = numpy_helper.to_array(stored[node.input[1]]).astype(np.float32)
        yield Layer(
            weight=node.input[1],
            bias=bias,
            node=node.output[0],
            source=node.input[0],
            kind=KINDS[node.op_type],  # type: ignore[arg-type]  # one of the three words
            values=np.ascontiguousarray(np.moveaxis(weight, axis, 0)),
            offsets=None if bias is None else numpy_helper.to_array(stored[bias]).astype(np.float32).reshape(-1),
            axis=axis,
            **(_geometry(node, attributes, weight.shape[2:]) if "Conv" in node.op_type else {}),
        )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _geometry(node: onnx.NodeProto, attributes: Mapping[str, Any], kernel: tuple[int, ...]) -> dict[str, Any]:
    """Return how a convolution slides.

    Raises:
        CompressionError: a padding that depends on the size of the input.
    """
    size = len(kernel)
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise CompressionError(
            f"node {node.name!r} pads by auto_pad, which depends on the size of its input", "write explicit pads"
        )
    pads = tuple(attributes.get("pads", (0,) * 2 * size))
    return {
        "stride": tuple(attributes.get("strides", (1,) * size)),
        "padding": pads if pads[:size] != pads[size:] else pads[:size],
        "dilation": tuple(attributes.get("dilations", (1,) * size)),
        "output_padding": tuple(attributes.get("output_padding", (0,) * size)),
        "groups": int(attributes.get("group", 1)),
    }


def with_parameters(network: OnnxNetwork, found: Mapping[str, Layer], changes: Mapping[str, Change]) -> OnnxNetwork:
    """Return the network with new weights and biases, by the names of the weights.

    Raises:
        CompressionError: a MatMul is to get a bias, which it cannot hold.
    """
    import numpy as np
    from onnx import numpy_helper

    proto = network.proto()
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, change in changes.items():
        layer = found[name]
        if change.values is not None:
            weight = np.ascontiguousarray(np.moveaxis(change.values, 0, layer.axis), np.float32)
            stored[name].CopyFrom(numpy_helper.from_array(weight, name))
        if change.offsets is not None:
            _put_bias(proto, stored, layer, change.offsets.astype(np.float32))
    return OnnxNetwork(network.path, onnx_io.one_piece(proto))


def _put_bias(proto: onnx.ModelProto, stored: Mapping[str, onnx.TensorProto], layer: Layer, offsets: Array) -> None:
    from onnx import numpy_helper

    if layer.bias is not None:
        stored[layer.bias].CopyFrom(numpy_helper.from_array(offsets, layer.bias))
        return
    node = next(n for n in proto.graph.node if n.output[0] == layer.node)
    if node.op_type == "MatMul":
        raise CompressionError(f"the MatMul of {layer.weight!r} can hold no bias", "leave that layer out")
    name = f"{layer.weight}__bias"
    proto.graph.initializer.append(numpy_helper.from_array(offsets, name))
    node.input[:] = [*node.input[:2], name]


def steps_of(proto: onnx.ModelProto, layers: Sequence[Layer]) -> Iterator[OnnxStep]:
    """Give the nodes of a graph as steps that can be computed one by one.

    Raises:
        CompressionError: a node holds a graph of its own.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    fused = onnx_graph.fused_away(proto.graph)
    by_node = {layer.node: layer for layer in layers}
    for node in proto.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise CompressionError(
                f"node {node.name!r} ({node.op_type}) branches or loops: it cannot be walked through layer by layer",
                "use passes that need no walk, as quantize, or remove the control flow",
            )
        layer = by_node.get(node.output[0])
        yield OnnxStep(
            proto, node, {n: stored[n] for n in node.input if n in stored}, layer, is_fused_away=node.output[0] in fused
        )


class OnnxStep:
    """One node, computed by ONNX Runtime in a session of its own."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        node: onnx.NodeProto,
        stored: Mapping[str, onnx.TensorProto],
        layer: Layer | None,
        *,
        is_fused_away: bool,
    ) -> None:
        self._proto, self._node, self._stored = proto, node, stored
        self._session: onnxruntime.InferenceSession | None = None
        self.name = node.output[0]
        self.sources = tuple(dict.fromkeys(n for n in node.input if n and n not in stored))
        self.makes = tuple(n for n in node.output if n)
        self.layer = layer
        self.is_fused_away = is_fused_away

    def compute(self, values: dict[str, Any]) -> list[Any]:
        """Compute what the node makes, as PyTorch tensors."""
        import torch

        feeds = {name: values[name].numpy() for name in self.sources}
        if self._session is None:
            self._session = self._open(feeds)
        return [torch.from_numpy(array) for array in self._session.run(list(self.makes), feeds)]

    def _open(self, feeds: Mapping[str, Array]) -> onnxruntime.InferenceSession:
        with extra("compress"):
            import onnx
            import onnxruntime
        kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
        graph = onnx.helper.make_graph(
            [self._node],
            "step",
            [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
            [onnx.ValueInfoProto(name=name) for name in self.makes],
            list(self._stored.values()),
        )
        model = onnx.helper.make_model(graph, opset_imports=self._proto.opset_import, ir_version=self._proto.ir_version)
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
