"""The file for TensorRT is parsed and built by TensorRT-RTX, which names what it does not take."""

import dataclasses

import msgspec
import pytest
from fakes.exportable import tiny_model

from edgekit import device_profiles, workload
from edgekit.errors import ExportError
from edgekit.export import export, lowering, qdq, rtx
from edgekit.manifest import EngineBuild
from edgekit.model import Data, Split
from edgekit.progress import silent

JETSON = device_profiles.load("jetson-orin-nano")
ASKED = "TensorRT-RTX"


@pytest.fixture
def gate():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'edgekit[tensorrt-rtx]'")


def notes(model, folder):
    (row,) = export(model, [JETSON], folder / "b").rows
    if row.error:
        raise row.error
    return row.variant.notes


@pytest.mark.parametrize("planned", [False, True])
def test_floats_and_symmetric_integers_are_built(gate, tiny, tiny_int8, tmp_path, planned):
    told = notes(tiny_int8 if planned else tiny, tmp_path)[-1]
    assert told.startswith(f"parsed and built by {ASKED} 1.")


@pytest.mark.parametrize("scheme", [qdq.UNSIGNED, qdq.SHIFTED])
def test_the_files_of_other_classes_are_refused(gate, tiny_int8, tmp_path, scheme):
    path = tmp_path / "model.onnx"
    lowering.write_artifact(tiny_int8, JETSON, path, scheme=scheme, progress=silent)
    with pytest.raises(ExportError, match=r"DequantizeLinear 'conv2d_bias' \(.*Int32"):
        rtx.note_of(path)


def test_a_number_in_integers_parses_and_builds_nothing(gate, tiny_int8, tmp_path):
    path = tmp_path / "model.onnx"
    biased = dataclasses.replace(qdq.SIGNED, symmetric=False)  # asks for what the other engines want
    lowering.write_artifact(tiny_int8, JETSON, path, scheme=biased, progress=silent)
    with pytest.raises(ExportError):
        rtx.note_of(path)


def determinants(tmp_path):
    onnx = pytest.importorskip("onnx")
    np = pytest.importorskip("numpy")
    from onnx import helper

    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Det", ["r"], ["y"], name="determinant")]
    ports = ([helper.make_tensor_value_info("x", 1, ["n", 3, 3])], [helper.make_tensor_value_info("y", 1, ["n"])])
    made = helper.make_model(
        helper.make_graph(nodes, "g", *ports), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(made, tmp_path / "det.onnx")
    samples = np.random.default_rng(0).random((8, 3, 3), np.float32)
    return workload.load(str(tmp_path / "det.onnx"), None, Data(Split({"x": samples})))


def test_an_operator_that_it_lacks_is_named_with_its_node(gate, tmp_path):
    with pytest.raises(ExportError, match=r"TensorRT does not take model\.onnx: Det 'determinant'") as caught:
        notes(determinants(tmp_path), tmp_path)
    assert "options.gate = false" in caught.value.hint
    assert not (tmp_path / "b").exists()


def test_a_profile_of_your_own_lets_it_pass(tmp_path):
    loose = msgspec.structs.replace(JETSON, options={**JETSON.options, "gate": False})
    (row,) = export(determinants(tmp_path), [loose], tmp_path / "b").rows
    assert row.error is None
    assert not any(ASKED in note for note in row.variant.notes)


def test_without_it_the_file_says_that_nobody_parsed_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rtx, "is_installed", lambda: False)
    told = notes(tiny_model(), tmp_path)[-1]
    assert told == f"not parsed here: {ASKED} is not installed (pip install 'edgekit[tensorrt-rtx]')"


def test_every_node_in_the_way_is_told_up_to_three():
    class Error:
        def __init__(self, number):
            self.number = number

        def desc(self):
            return "false"

        def node_operator(self):
            return "Det"

        def node_name(self):
            return f"d{self.number}"

    class Parser:
        num_errors = 5

        def get_error(self, number):
            return Error(number)

    told = "Det 'd0' (no such operator), Det 'd1' (no such operator), Det 'd2' (no such operator) and 2 more"
    assert rtx._refused(Parser()) == told


def test_the_bundle_says_how_the_devices_of_a_profile_build_their_engines(tiny, tmp_path):
    options = {"gate": False, "dla_core": 0, "gpu_fallback": False, "fp16": True, "max_batch": 4}
    profile = msgspec.structs.replace(JETSON, options={**JETSON.options, **options})
    (row,) = export(tiny, [profile], tmp_path / "b").rows
    assert row.error is None
    how = EngineBuild(max_batch=4, workspace_mb=1024, dla_core=0, gpu_fallback=False, fp16=True)
    assert row.variant.engine == how


@pytest.mark.parametrize(("option", "value"), [("max_batch", 0), ("dla_core", 16), ("fp16", "yes")])
def test_a_profile_that_no_engine_can_be_built_by_is_refused(tiny, tmp_path, option, value):
    profile = msgspec.structs.replace(JETSON, options={**JETSON.options, option: value})
    (row,) = export(tiny, [profile], tmp_path / "b").rows
    assert isinstance(row.error, ExportError)
    assert option in row.error.message
    assert "max_batch" in row.error.hint
