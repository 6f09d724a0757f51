"""The smallest files of every format: ``y = x @ w``, and an operator of each type. A writer a backend.

A new backend adds a writer to `WRITERS` and a row to `HELD`.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edgekit.manifest import Port
from edgekit.runtime import Contract
from edgekit.tensors import TensorSpec

from . import bundles

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
CONTRACT = Contract(
    name="double",
    inputs=(TensorSpec("image", "float32", (-1, 3)),),
    outputs=(TensorSpec("scores", "float32", (-1, 4)),),
)
KINDS = {"float16": "float16", "int64": "int64", "bool": "bool", "text": "object"}
"""By the name that a test has: NumPy's."""

NARROW = {"int64": "int32"}
NO_TEXT = "its tensors hold numbers only"
HELD = {
    "coreml": {"int64": NARROW, "bool": "Core ML takes floats and 32-bit integers", "text": NO_TEXT},
    "executorch": {"text": NO_TEXT},
    "null": {"text": "it answers with one number"},
    "onnx": {},
    "openvino": {"text": "its Python takes text of one width only, and an IR of ours holds none"},
    "tensorrt": {},
    "tflite": {"int64": NARROW, "text": NO_TEXT},
}
"""By backend, what it holds of `KINDS` in another type, or why it cannot; what is not named goes as it is."""


def ports(x, y, dtype="float32"):
    return {
        "inputs": (Port(name="image", key=x, dtype=dtype),),
        "outputs": (Port(name="scores", key=y, dtype=dtype),),
    }


def echo_contract(kind):
    """Say what `write` with that kind makes: [n, 3] to [n, 3]."""
    spec = (-1, 3)
    return Contract(
        inputs=(TensorSpec("image", KINDS[kind], spec),), outputs=(TensorSpec("scores", KINDS[kind], spec),)
    )


def echoed(array):
    """Compute what those files do: not, double, or the same."""
    return ~array if array.dtype == bool else array if array.dtype == object else array + array


def write(backend, folder, kind=""):
    """Write the product with `WEIGHTS`, or with a ``kind`` the file of one operator; return its variant."""
    if not kind:
        return WRITERS[backend](folder, "")
    held = HELD[backend].get(kind, KINDS[kind])
    if isinstance(held, str) and held not in KINDS.values():
        pytest.skip(f"{backend}: {held}")
    dtype = held[kind] if isinstance(held, dict) else held
    return WRITERS[backend](folder, dtype)


def _onnx(folder, dtype):
    (folder / "model.onnx").write_bytes(_echo_onnx(dtype) if dtype else bundles.gemm_onnx(WEIGHTS))
    return bundles.variant("any", "onnx", "model.onnx", **ports("x", "y", dtype or "float32"))


def _echo_onnx(dtype):
    from onnx import TensorProto, helper

    held = {"float16": TensorProto.FLOAT16, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    node = {"bool": ("Not", ["x"]), "object": ("Identity", ["x"])}.get(dtype, ("Add", ["x", "x"]))
    x, y = (helper.make_tensor_value_info(name, held.get(dtype, TensorProto.STRING), ["n", 3]) for name in "xy")
    return bundles._model(helper.make_graph([helper.make_node(*node, ["y"])], "echo", [x], [y]))


def _tensorrt(folder, dtype):
    return msgspec.structs.replace(_onnx(folder, dtype), format="tensorrt")


def _module(dtype):
    torch = pytest.importorskip("torch", reason="torch makes the network of this test")

    class Echo(torch.nn.Module):
        def forward(self, x):
            return torch.logical_not(x) if x.dtype == torch.bool else x + x

    layer = torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(WEIGHTS.T))
    return (Echo() if dtype else layer).eval(), lambda batch: (
        torch.zeros(batch, 3, dtype=getattr(torch, dtype or "float32")),
    )


def _tflite(folder, dtype):
    litert_torch = pytest.importorskip("litert_torch", reason="litert-torch writes the LiteRT file of this test")
    module, example = _module(dtype)
    litert_torch.convert(module, example(2)).export(str(folder / "model.tflite"))
    return bundles.variant("any", "tflite", "model.tflite", batch=2, **ports("args_0", "output_0", dtype or "float32"))


def _openvino(folder, dtype):
    openvino = pytest.importorskip("openvino", reason="OpenVINO writes the file of this test")
    _onnx(folder, dtype)
    network = openvino.convert_model(str(folder / "model.onnx"))
    openvino.save_model(network, folder / "model.xml", compress_to_fp16=False)
    (folder / "model.onnx").unlink()
    files = ("model.xml", "model.bin")
    return bundles.variant("any", "openvino", "model.xml", files=files, **ports("x", "y", dtype or "float32"))


def _executorch(folder, dtype):
    exir = pytest.importorskip("executorch.exir", reason="executorch writes the program of this test")
    partitioner = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    import torch

    module, example = _module(dtype)
    partitioners = [] if dtype else [partitioner.XnnpackPartitioner()]
    lowered = exir.to_edge_transform_and_lower(torch.export.export(module, example(2)), partitioner=partitioners)
    (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)
    return bundles.variant(
        "any", "executorch", "model.pte", batch=2, **ports("input_0", "output_0", dtype or "float32")
    )


def _coreml(folder, dtype):
    coremltools = pytest.importorskip("coremltools", reason="coremltools writes the package of this test")
    import torch

    module, example = _module(dtype)
    program = coremltools.convert(
        torch.jit.trace(module, example(1)),
        inputs=[coremltools.TensorType(name="x", shape=(1, 3), dtype=np.dtype(dtype or "float32").type)],
        outputs=[coremltools.TensorType(name="y", dtype=np.dtype(dtype or "float32").type)],
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
    )
    program.save(str(folder / "model.mlpackage"))
    main = "model.mlpackage/Manifest.json"
    files = tuple(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return bundles.variant("any", "coreml", main, files=files, batch=1, **ports("x", "y", dtype or "float32"))


def _null(folder, dtype):
    outputs = echo_contract(next(k for k, v in KINDS.items() if v == dtype)).outputs if dtype else CONTRACT.outputs
    (folder / "model.json").write_bytes(msgspec.json.encode({"outputs": outputs, "value": 7.0}))
    return bundles.variant("any", "null", "model.json")


WRITERS = {
    "coreml": _coreml,
    "executorch": _executorch,
    "null": _null,
    "onnx": _onnx,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tflite": _tflite,
}
