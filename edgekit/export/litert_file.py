"""Reads a LiteRT file: its operators, the layers that multiply with stored weights, its ends. Knows no plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.plugins import extra

if TYPE_CHECKING:
    from edgekit.tensors import Array

WEIGHTED = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL", "EMBEDDING_LOOKUP"}
"""Operators that multiply with weights, or look them up: their second input."""


@dataclass(frozen=True)
class Layer:
    """One operator with stored weights: ``output`` is what it computes, ``values`` the numbers as they lie there.

    ``dtype`` is LiteRT's name (FLOAT32, INT8, INT4); ``scales`` has one a channel, none for floats or blocks.
    """

    kind: str
    output: str
    weight: str
    dtype: str
    values: Array
    scales: Array | None = None

    @property
    def is_float(self) -> bool:
        """Whether the weights are floats."""
        return self.dtype.startswith("FLOAT")


@dataclass(frozen=True)
class End:
    """An input or output of the file; ``scale`` is 0 for floats."""

    dtype: str
    scale: float = 0.0
    zero: int = 0


@dataclass(frozen=True)
class Found:
    """How many of each operator, the layers with stored weights, and the ends by their names in the signature."""

    operators: Counter[str]
    layers: tuple[Layer, ...]
    ends: dict[str, End]

    @property
    def floats(self) -> tuple[str, ...]:
        """The operators that have float weights."""
        return tuple(layer.kind for layer in self.layers if layer.is_float)

    def note(self) -> str:
        """Say in one sentence which layers stay float, empty for none."""
        if not self.floats:
            return ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(self.floats).items()))
        return f"{len(self.floats)} of {len(self.layers)} layers keep float weights ({kinds})"


def read(content: bytes) -> Found:
    """Read the first subgraph of a file; weights that are widened to float while it runs count as integers."""
    with extra("export"):
        from ai_edge_litert import schema_py_generated as schema
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    kinds, types = _names(schema.BuiltinOperator), _names(schema.TensorType)
    codes = [kinds[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    operators = [(codes[operator.opcodeIndex], operator) for operator in graph.operators]
    widened = {one.outputs[0]: one.inputs[0] for kind, one in operators if kind == "DEQUANTIZE"}
    layers = []
    for kind, one in operators:
        place = widened.get(one.inputs[1], one.inputs[1]) if kind in WEIGHTED else -1
        if place >= 0 and (data := model.buffers[graph.tensors[place].buffer].data) is not None and len(data):
            tensor = graph.tensors[place]
            output = graph.tensors[one.outputs[0]].name.decode()
            layers.append(_layer(kind, output, tensor, data=data, dtype=types[tensor.type]))
    ends = {
        named.name.decode(): _end(graph.tensors[named.tensorIndex], types)
        for signature in model.signatureDefs or ()
        for named in (*signature.inputs, *signature.outputs)
    }
    return Found(Counter(kind for kind, _ in operators), tuple(layers), ends)


def _names(enumeration: Any) -> dict[int, str]:  # noqa: ANN401  # the schema's classes are untyped
    return {number: name for name, number in vars(enumeration).items() if not name.startswith("_")}


def _layer(kind: str, output: str, tensor: Any, *, data: Array, dtype: str) -> Layer:  # noqa: ANN401  # as above
    import numpy as np

    raw = np.asarray(data, np.uint8)
    if dtype == "INT4":  # two in a byte, the lower four bits first
        pairs = np.stack([raw & 15, raw >> 4], -1).reshape(-1)[: int(np.prod(tensor.shape))]
        flat = pairs.astype(np.int8) - 16 * (pairs > 7).astype(np.int8)
    else:
        flat = raw.view({"INT8": np.int8, "FLOAT16": np.float16, "FLOAT32": np.float32}.get(dtype, np.uint8))
    known = tensor.quantization is not None and tensor.quantization.scale is not None
    scales = np.asarray(tensor.quantization.scale, np.float32) if known else None
    values = flat.reshape(tuple(tensor.shape)) if flat.size == np.prod(tensor.shape) else flat
    return Layer(kind, output, tensor.name.decode(), dtype, values, scales)


def _end(tensor: Any, types: dict[int, str]) -> End:  # noqa: ANN401  # as above
    known = tensor.quantization is not None and tensor.quantization.scale is not None
    if not known or not len(tensor.quantization.scale):
        return End(types[tensor.type].lower())
    return End(types[tensor.type].lower(), float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0]))
