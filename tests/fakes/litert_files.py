"""Small LiteRT files that are put together field by field, so that a test can bend any of them."""

from __future__ import annotations

import numpy as np
import pytest

schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed")
flatbuffers = pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")


def _tensor(name, shape, buffer):
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.buffer, tensor.type = name, shape, buffer, 0
    return tensor


def dense():
    """Return y = x @ w of float32 [1, 4] to [1, 3] as LiteRT's own objects."""
    model, graph, code, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = 9  # FULLY_CONNECTED
    code.version = 1
    operator.inputs, operator.outputs = [0, 1, -1], [2]
    operator.builtinOptionsType = 8
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    graph.tensors = [_tensor("x", [1, 4], 0), _tensor("w", [3, 4], 1), _tensor("y", [1, 3], 0)]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [operator]
    empty, weights = schema.BufferT(), schema.BufferT()
    weights.data = np.arange(12, dtype=np.float32).view(np.uint8)
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [empty, weights]
    entry, signature = schema.TensorMapT(), schema.SignatureDefT()
    entry.name, entry.tensorIndex = "x", 0
    signature.inputs, signature.outputs, signature.signatureKey, signature.subgraphIndex = [entry], [], "main", 0
    model.signatureDefs = [signature]
    return model


def packed(model) -> bytes:
    """Return a model's bytes."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
