"""OpenVINO's IR: checked by its own engine, in integers where the plan has them, and the same bytes every time."""

import json

import numpy as np
import pytest

from edgekit import device_profiles, load, plugins, workload
from edgekit.compress.passes.float16 import Float16
from edgekit.compress.passes.quantize import Quantize
from edgekit.errors import ExportError, HealthError, UsageError
from edgekit.export import PACKAGE, export
from edgekit.export.onnx_file import float_graph
from edgekit.model import Data, Split
from edgekit.progress import silent
from edgekit.runtime.backends import EngineOptions

openvino = pytest.importorskip("openvino")
pytest.importorskip("torch")
TARGET = "intel-core-ultra"


def seal(model, folder):
    result = export(model, [device_profiles.load(TARGET)], folder)
    assert result.first_error is None, result.first_error.message
    return result.rows[0].variant


PLANS = {
    "fp32": (lambda model: model, 60),
    "int8": (lambda model: Quantize().apply(model, silent), 30),
    "w4a8": (lambda model: Quantize(bits=4, weights="mse").apply(model, silent), 10),
    "int8-weights": (lambda model: Quantize(activations="none").apply(model, silent), 30),
    "int4-weights": (lambda model: Quantize(activations="none", bits=4, weights="mse").apply(model, silent), 10),
    "int8-dynamic": (lambda model: Quantize(activations="dynamic").apply(model, silent), 30),
    "fp16": (lambda model: Float16().apply(model, silent), 45),
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_checked_by_its_engine(tiny, tmp_path, plan):
    make, least = PLANS[plan]
    variant = seal(make(tiny), tmp_path / "b")
    assert variant.precision == plan
    assert variant.parity.status == "checked"
    assert variant.parity.sqnr_db > least
    assert variant.parity.batches == (1, 3, 16)
    assert variant.files == (f"{TARGET}/model.bin", f"{TARGET}/model.xml")


def test_a_static_plan_runs_in_integers(tiny, tmp_path):
    variant = seal(Quantize().apply(tiny, silent), tmp_path / "b")
    compiled = openvino.Core().compile_model(str(tmp_path / "b" / variant.main), "CPU")
    kinds = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    products = [k for k in kinds if k["layerType"].astype(str) in ("Convolution", "FullyConnected")]
    assert len(products) == 4
    assert {k["runtimePrecision"].astype(str) for k in products} == {"u8"}


def test_the_file_names_neither_its_source_nor_the_runtime(tiny_int8, tmp_path):
    seal(tiny_int8, tmp_path / "a")
    text = (tmp_path / "a" / TARGET / "model.xml").read_text()
    assert "model.onnx" not in text
    assert "Runtime_version" not in text


def test_an_onnx_file_becomes_one_too(tiny, tmp_path):
    path = tmp_path / "tiny.onnx"
    path.write_bytes(float_graph(tiny, 20).proto.SerializeToString())
    assert seal(workload.load(str(path), data=tiny.data), tmp_path / "b").parity.sqnr_db > 60


def test_a_session_serves_it_and_closes(tiny_int8, tmp_path):
    seal(tiny_int8, tmp_path / "b")
    image = tiny_int8.data.calibration.inputs["image"][:2]
    with load(tmp_path / "b") as session:
        assert session.engine.startswith("openvino ")
        scores = session.run({"image": image})["scores"]
    want = tiny_int8.network.run({"image": image})["scores"]
    assert (scores.argmax(1) == want.argmax(1)).all()
    engine = plugins.load("edgekit.runtime.backends", "openvino", "engine").open(
        tmp_path / "b" / TARGET / "model.xml", EngineOptions(threads=1)
    )
    with pytest.raises(HealthError, match="OpenVINO failed"):
        engine.run({"nothing": image})
    engine.close()
    with pytest.raises(UsageError, match="is closed"):
        engine.run({"image": image})


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "model.xml").write_text("no network")
    with pytest.raises(HealthError, match=r"refuses model\.xml"):
        plugins.load("edgekit.runtime.backends", "openvino", "engine").open(tmp_path / "model.xml", EngineOptions())


def test_what_openvino_cannot_hold_says_why(monkeypatch, tiny, tmp_path):
    def refuse(_path):
        raise RuntimeError("Not supported ONNX ops: org.example.Strange")

    monkeypatch.setattr(openvino, "convert_model", refuse)
    with pytest.raises(ExportError, match=r"has no OpenVINO form: Not supported.*Strange"):
        plugins.load(PACKAGE, "openvino", "format").export(tiny, device_profiles.load(TARGET), tmp_path, silent)


def test_an_operator_that_openvino_lacks_is_named_and_the_other_target_is_written(tmp_path):
    from onnx import TensorProto, helper

    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 4])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 4])
    node = helper.make_node("Scaler", ["rows"], ["scores"], domain="ai.onnx.ml", offset=[1.0] * 4, scale=[2.0] * 4)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph([node], "g", [rows], [scores])
    path = tmp_path / "scaler.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())
    model = workload.load(str(path), None, Data(Split({"rows": np.random.default_rng(0).random((8, 4), np.float32)})))
    result = export(model, [device_profiles.load(name) for name in (TARGET, "x86-64")], tmp_path / "bundle")
    assert [row.variant is not None for row in result.rows] == [False, True]
    assert "No conversion rule found for operations: ai.onnx.ml.Scaler" in result.first_error.message


def test_the_profile_is_told():
    from click.testing import CliRunner

    from edgekit.cli import cli

    shown = json.loads(CliRunner().invoke(cli, ["devices", "show", TARGET, "--json"]).stdout)
    assert shown["formats"] == ["openvino", "onnx"]
