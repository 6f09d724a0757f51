"""ONNX graphs of more weights than one protobuf holds: the limit is lowered, the way is the same."""

import hashlib

import numpy as np
import pytest
from fakes.bundles import mlp_numpy, mlp_onnx

from edgekit import device_profiles, onnx_io, workload
from edgekit.compress import compress
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.recipe import Recipe
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.model import Data, Split

onnx = pytest.importorskip("onnx")
X = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(onnx_io, "LARGE", 9000)  # the network has 35,000 bytes of weights
    monkeypatch.setattr(onnx_io, "PAGE", 64)


@pytest.fixture
def foreign(tmp_path, small_limit):
    """Write a network whose weights lie beside it."""
    path = tmp_path / "net.onnx"
    assert onnx_io.save(onnx.load_from_string(mlp_onnx()), path) == ("net.onnx", "net.onnx.data")
    assert (tmp_path / "net.onnx.data").stat().st_mode & 0o777 == 0o644
    return path


def test_a_session_of_a_large_graph_computes_it(small_limit):
    found = onnx_io.session(onnx.load_from_string(mlp_onnx())).run(None, {"x": X})[0]
    np.testing.assert_allclose(found, mlp_numpy(X), atol=1e-5)


def test_shapes_are_inferred_without_the_weights_and_nothing_else_changes(small_limit):
    proto = onnx.load_from_string(mlp_onnx())
    onnx_io.infer_shapes(proto)
    assert {value.name for value in proto.graph.value_info} == {"h0", "r0", "h1", "r1"}
    del proto.graph.value_info[:]
    assert proto.SerializeToString(deterministic=True) == onnx.load_from_string(mlp_onnx()).SerializeToString(
        deterministic=True
    )


def test_the_digest_counts_every_byte_of_the_weights_beside_a_file(foreign):
    before = onnx_io.digest(foreign)
    beside = foreign.with_name("net.onnx.data")
    content = bytearray(beside.read_bytes())
    content[-1] ^= 1
    beside.write_bytes(content)
    assert onnx_io.digest(foreign) != before
    alone = foreign.with_name("alone.onnx")
    alone.write_bytes(mlp_onnx())
    assert onnx_io.digest(alone) == hashlib.sha256(alone.read_bytes()).hexdigest()


@pytest.mark.parametrize("activations", ["none", "uint8", "dynamic", "fp32"])
def test_a_large_foreign_file_is_quantized_saved_and_exported(foreign, tmp_path, activations):
    model = workload.load(str(foreign), data=Data(Split({"x": X})))
    if activations != "fp32":
        options = {} if activations == "uint8" else {"activations": activations}
        model = compress(model, Recipe((("quantize", Quantize(**options)),)))
    workload.save(model, tmp_path / "saved")
    assert (tmp_path / "saved/model.onnx.data").is_file()
    again = workload.load(str(tmp_path / "saved"))
    done = export(again, [device_profiles.of_format("onnx")], tmp_path / "b")
    assert done.first_error is None
    assert done.rows[0].variant.parity.status == "checked"


def test_a_large_file_of_an_old_opset_is_brought_up(small_limit, tmp_path):
    proto = onnx.load_from_string(mlp_onnx())
    proto.opset_import[0].version = 11
    onnx_io.save(proto, tmp_path / "old.onnx")
    model = workload.load(str(tmp_path / "old.onnx"), data=Data(Split({"x": X})))
    model = compress(model, Recipe((("quantize", Quantize()),)))
    assert export(model, [device_profiles.of_format("onnx")], tmp_path / "b").first_error is None


def test_what_passes_cannot_change_is_told_with_the_way_out(foreign):
    with pytest.raises(UsageError, match=r"GiB of weights, and passes change at most") as caught:
        onnx_io.one_piece(onnx.load(foreign))
    assert "PyTorch network" in caught.value.hint


def test_weights_of_constant_nodes_that_lie_beside_a_file_travel_with_it_and_count(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "w")
    nodes = [helper.make_node("Constant", [], ["w"], value=weights), helper.make_node("MatMul", ["x", "w"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "constant", ends[:1], ends[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/net.onnx"
    onnx.save(proto, path, save_as_external_data=True, convert_attribute=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "a/w.bin").is_file()
    before = onnx_io.digest(path)
    model = workload.load(str(path), data=Data(Split({"x": X})))
    wanted = model.network.run({"x": X})["y"]
    workload.save(model, tmp_path / "saved")
    (tmp_path / "a/w.bin").write_bytes(bytes(64 * 64 * 4))
    assert onnx_io.digest(path) != before
    again = workload.load(str(tmp_path / "saved"))
    np.testing.assert_array_equal(again.network.run({"x": X})["y"], wanted)


def test_weights_that_are_inputs_as_well_as_in_old_files_are_weights(tmp_path):
    proto = onnx.load_from_string(mlp_onnx())
    proto.ir_version = 3
    proto.opset_import[0].version = 9
    for one in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
    onnx.save(proto, tmp_path / "old.onnx")
    model = workload.load(str(tmp_path / "old.onnx"), data=Data(Split({"x": X})))
    assert [spec.name for spec in model.inputs] == ["x"]
    small = compress(model, Recipe((("quantize", Quantize()),)))
    for one in (model, small):
        assert export(one, [device_profiles.of_format("onnx")], tmp_path / one.precision).first_error is None
