"""One conformance test for every tensor backend that is found: the same promises, whatever the engine."""

import threading

import msgspec
import numpy as np
import pytest
from fakes import bundles

from edgekit import plugins
from edgekit.errors import EdgekitError, HealthError, InputError, MissingExtra, UsageError
from edgekit.manifest import Port
from edgekit.runtime import Contract, open_variant
from edgekit.runtime.backends import EngineOptions
from edgekit.tensors import TensorSpec

BACKENDS = plugins.names("edgekit.runtime.backends")
TENSOR_BACKENDS = [name for name in BACKENDS if name != "gguf"]
CONTRACT = Contract(
    name="double",
    inputs=(TensorSpec("image", "float32", (-1, 3)),),
    outputs=(TensorSpec("scores", "float32", (-1, 4)),),
)
WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4) - 5


def _write_onnx(folder):
    (folder / "model.onnx").write_bytes(bundles.gemm_onnx(WEIGHTS))
    return bundles.variant("any", "onnx", "model.onnx", **_ports("x", "y"))


def _write_tensorrt(folder):
    return msgspec.structs.replace(_write_onnx(folder), format="tensorrt")


def _write_tflite(folder):
    torch = pytest.importorskip("torch", reason="torch writes the LiteRT file of this test")
    litert_torch = pytest.importorskip("litert_torch", reason="litert-torch writes the LiteRT file of this test")
    layer = torch.nn.Linear(3, 4, bias=False).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(WEIGHTS.T))
    litert_torch.convert(layer, (torch.zeros(2, 3),)).export(str(folder / "model.tflite"))
    return bundles.variant("any", "tflite", "model.tflite", batch=2, **_ports("args_0", "output_0"))


def _write_openvino(folder):
    openvino = pytest.importorskip("openvino", reason="OpenVINO writes the file of this test")
    (folder / "source.onnx").write_bytes(bundles.gemm_onnx(WEIGHTS))
    openvino.save_model(openvino.convert_model(str(folder / "source.onnx")), folder / "model.xml")
    (folder / "source.onnx").unlink()
    return bundles.variant("any", "openvino", "model.xml", **_ports("x", "y"))


def _write_executorch(folder):
    torch = pytest.importorskip("torch", reason="torch writes the ExecuTorch program of this test")
    exir = pytest.importorskip("executorch.exir", reason="executorch writes the program of this test")
    partitioner = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    layer = torch.nn.Linear(3, 4, bias=False).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(WEIGHTS.T))
    program = torch.export.export(layer, (torch.zeros(2, 3),))
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()])
    (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)
    return bundles.variant("any", "executorch", "model.pte", batch=2, **_ports("input_0", "output_0"))


def _write_null(folder):
    content = {"outputs": CONTRACT.outputs, "value": 7.0}
    (folder / "model.json").write_bytes(msgspec.json.encode(content))
    return bundles.variant("any", "null", "model.json")


def _ports(x, y):
    return {
        "inputs": (Port(name="image", key=x, dtype="float32"),),
        "outputs": (Port(name="scores", key=y, dtype="float32"),),
    }


WRITERS = {
    "executorch": _write_executorch,
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "tensorrt": _write_tensorrt,
    "tflite": _write_tflite,
    "null": _write_null,
}


@pytest.fixture(scope="module", params=TENSOR_BACKENDS)
def written(request, tmp_path_factory):
    if request.param not in WRITERS:
        pytest.fail(f"the backend {request.param} has no writer in this test: add one")
    folder = tmp_path_factory.mktemp(request.param)
    try:
        return folder, WRITERS[request.param](folder)
    except MissingExtra as error:
        pytest.skip(error.message)


@pytest.fixture
def session(written):
    with open_variant(*written, CONTRACT, EngineOptions(threads=1), choice="test") as opened:
        yield opened


def expected(session, image):
    return np.full((len(image), 4), 7, np.float32) if session.variant.format == "null" else image @ WEIGHTS


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_any_batch_is_computed_whatever_batch_the_file_has(session, batch):
    image = np.random.default_rng(batch).normal(size=(batch, 3)).astype(np.float32)
    scores = session.run({"image": image})["scores"]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected(session, image), rtol=1e-4, atol=1e-4)


def test_array_that_is_not_contiguous_gives_the_same(session):
    image = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32).T[:, :]
    np.testing.assert_allclose(session.run({"image": image})["scores"], expected(session, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"picture": np.zeros((1, 3), np.float32)}, "no input 'picture'"),
        ({}, "'image' is missing"),
        ({"image": np.zeros((1, 3))}, "'image' is float64, the model wants float32"),
        ({"image": np.zeros((1, 4), np.float32)}, r"'image' has shape \[1, 4\]"),
        ({"image": np.zeros(3, np.float32)}, r"'image' has shape \[3\]"),
        ({"image": np.zeros((0, 3), np.float32)}, "'image' is an empty batch"),
        ({"image": [[1.0, 2.0, 3.0]]}, "'image' is a list"),
        ({"image": np.zeros((1, 3), np.float32), "more": np.zeros(1)}, "no input 'more'"),
    ],
)
def test_input_that_does_not_fit_is_named(session, inputs, message):
    with pytest.raises(InputError, match=message):
        session.run(inputs)


def test_many_threads_get_their_own_answers(session):
    wrong = []

    def ask(seed):
        random = np.random.default_rng(seed)
        for _ in range(30):
            image = random.normal(size=(2, 3)).astype(np.float32)
            if not np.allclose(session.run({"image": image})["scores"], expected(session, image), atol=1e-3):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closed_session_says_so_and_closes_twice(session):
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run({"image": np.zeros((1, 3), np.float32)})


def test_close_while_running_fails_cleanly_or_answers(written):
    session = open_variant(*written, CONTRACT, EngineOptions(threads=1))
    surprises, started = [], threading.Event()

    def ask():
        try:
            while True:
                session.run({"image": np.zeros((2, 3), np.float32)})
                started.set()
        except UsageError:
            pass
        except EdgekitError as error:
            surprises.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(10)
    session.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not surprises


def test_session_tells_engine_variant_and_choice(session):
    assert session.engine
    assert session.variant.name == "any"
    assert session.choice == "test"


@pytest.mark.parametrize("name", BACKENDS)
def test_corrupt_file_is_a_health_error(name, tmp_path):
    (tmp_path / "broken").write_bytes(b"this is no model at all" * 10)
    task = "text-generation" if name == "gguf" else "tensor"
    variant = bundles.variant("any", name, "broken")
    with pytest.raises((HealthError, MissingExtra)):
        open_variant(tmp_path, variant, Contract(task=task, inputs=CONTRACT.inputs, outputs=CONTRACT.outputs))


def test_truncated_gguf_is_a_health_error(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    with pytest.raises(HealthError, match=r"refuses cut\.gguf"):
        open_variant(tmp_path, bundles.variant("any", "gguf", "cut.gguf"), Contract(task="text-generation"))


def test_file_with_other_tensors_than_the_manifest_says_is_a_health_error(tmp_path):
    variant = _write_onnx(tmp_path)
    with pytest.raises(HealthError, match="no output 'z'"):
        open_variant(tmp_path, msgspec.structs.replace(variant, **_ports("x", "z")), CONTRACT)
    with pytest.raises(HealthError):
        open_variant(tmp_path, msgspec.structs.replace(variant, **_ports("q", "y")), CONTRACT)


def test_output_of_another_shape_than_the_manifest_says_is_a_health_error(tmp_path):
    variant = _write_onnx(tmp_path)
    wrong = Contract(inputs=CONTRACT.inputs, outputs=(TensorSpec("scores", "float32", (-1, 5)),))
    with pytest.raises(HealthError, match="the manifest says"):
        open_variant(tmp_path, variant, wrong)


def test_tensorrt_backend_says_where_it_really_runs(tmp_path):
    with open_variant(tmp_path, _write_tensorrt(tmp_path), CONTRACT) as session:
        assert "no TensorRT" in session.engine


@pytest.mark.parametrize(
    ("name", "missing"),
    [("onnx", "onnxruntime"), ("tflite", "ai_edge_litert.interpreter"), ("executorch", "executorch.runtime")],
)
def test_missing_engine_names_the_pip_command(name, missing, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(MissingExtra) as caught:
        open_variant(tmp_path, bundles.variant("any", name, "file"), CONTRACT)
    assert caught.value.hint == f"pip install 'edgekit[{name}]'"
