"""Reads a LiteRT file: which operators it has, and which of its layers have float weights. Knows no plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from edgekit.plugins import extra

WEIGHTED = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"}
"""Operators that multiply with weights: their second input."""


@dataclass(frozen=True)
class Found:
    """How many of each operator, how many layers have integer weights, and the operators that have float ones."""

    operators: Counter[str]
    integer: int
    floats: tuple[str, ...]

    def note(self) -> str:
        """Say in one sentence which layers stay float, empty for none."""
        if not self.floats:
            return ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(self.floats).items()))
        return f"{len(self.floats)} of {self.integer + len(self.floats)} layers keep float weights ({kinds})"


def read(content: bytes) -> Found:
    """Read the first subgraph of a file; weights that are widened to float while it runs count as integers."""
    with extra("export"):
        from ai_edge_litert import schema_py_generated as schema
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    kinds = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    codes = [kinds[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    operators = [(codes[operator.opcodeIndex], operator) for operator in graph.operators]
    constant = {n for n, tensor in enumerate(graph.tensors) if _is_stored(model, tensor)}
    weights = [(kind, operator.inputs[1]) for kind, operator in operators if kind in WEIGHTED]
    floats = [
        kind
        for kind, place in weights
        if place in constant and graph.tensors[place].type in (schema.TensorType.FLOAT32, schema.TensorType.FLOAT16)
    ]
    widened = {place for kind, operator in operators if kind == "DEQUANTIZE" for place in operator.outputs}
    integer = sum(place in constant or place in widened for _, place in weights) - len(floats)
    return Found(Counter(kind for kind, _ in operators), integer, tuple(floats))


def _is_stored(model: Any, tensor: Any) -> bool:  # noqa: ANN401  # the schema's classes are untyped
    buffer = model.buffers[tensor.buffer]
    return bool(buffer.data is not None and len(buffer.data)) or bool(buffer.size)
