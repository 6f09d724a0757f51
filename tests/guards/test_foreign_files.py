"""Files from anywhere that a person gives to edgekit: looked at as those of a bundle are."""

import pytest
from fakes import gguf_files
from fakes.bundles import mlp_onnx

from edgekit import workload
from edgekit.errors import UsageError

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


def apart(location):
    proto = onnx.load_from_string(mlp_onnx())
    weight = proto.graph.initializer[0]
    content = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    weight.external_data.add(key="length", value=str(len(content)))
    return proto.SerializeToString(), content


def test_a_foreign_graph_may_have_its_weights_beside_it(tmp_path):
    graph, content = apart("m.data")
    (tmp_path / "m.onnx").write_bytes(graph)
    (tmp_path / "m.data").write_bytes(content)
    assert workload.load(str(tmp_path / "m.onnx")).inputs[0].name == "x"


@pytest.mark.attack("external-data escape")
def test_a_foreign_graph_that_reads_out_of_its_folder_is_refused_unopened(tmp_path):
    graph, content = apart("../secret")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/m.onnx").write_bytes(graph)
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(UsageError, match=r"no valid ONNX model: m\.onnx, byte \d+: it reads '\.\./secret'"):
        workload.load(str(tmp_path / "inside/m.onnx"))


@pytest.mark.attack("truncated GGUF")
@pytest.mark.attack("oversized GGUF")
@pytest.mark.parametrize(
    "content", [b"GGUF", gguf_files.model([("w", (32,), 0, 0)]), gguf_files.model([], counts=(9, 9))]
)
def test_a_foreign_gguf_that_is_cut_or_lies_is_refused(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UsageError, match="is no GGUF file"):
        workload.load(str(tmp_path / "m.gguf"))
