"""Small files of weights in every format whose tensors `edgekit.ota.deltas` can find, written from NumPy arrays."""

from __future__ import annotations

import numpy as np
import pytest


def numbers(seed, **shapes):
    """Return float32 arrays by name."""
    chance = np.random.default_rng(seed)
    return {name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(kind, path, arrays):
    """Write arrays as ``kind`` (see `WRITERS`); what the format cannot hold is skipped."""
    WRITERS[kind](path, arrays)
    return path


def _safetensors(path, arrays):
    pytest.importorskip("safetensors.numpy").save_file(arrays, path)


def _onnx(path, arrays):
    onnx = pytest.importorskip("onnx")
    constant = np.arange(40, dtype=np.float32)
    node = onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(constant, "constant"))
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", [], [], initializers)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def _gguf(path, arrays, kind=None):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d" * 50])
    writer.add_array("some.numbers", [1, 2, 3])
    for name, array in arrays.items():
        if kind is None:
            writer.add_tensor(name, array)
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantized(kind):
    return lambda path, arrays: _gguf(path, arrays, kind)


def _litert(path, arrays):
    torch, litert_torch = pytest.importorskip("torch"), pytest.importorskip("litert_torch")

    class Sums(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, array in arrays.items():
                setattr(self, name, torch.nn.Parameter(torch.as_tensor(array)))

        def forward(self, x):
            return tuple(x @ getattr(self, name).T for name in arrays)

    width = next(iter(arrays.values())).shape[1]
    litert_torch.convert(Sums().eval(), (torch.zeros(1, width),)).export(str(path))


WRITERS = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "gguf": _gguf,
    **{f"gguf {kind}": _quantized(kind) for kind in ("F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")},
    "litert": _litert,
}
