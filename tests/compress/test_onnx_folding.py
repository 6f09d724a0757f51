"""Batch normalization in a given ONNX file: folded where one layer alone feeds it, the same outputs, quantized well."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import workload
from edgekit.compress.onnx_folding import folded
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.model import Data, Split
from edgekit.progress import silent

RNG = np.random.default_rng(0)


def written(path, *, shared=False, bias=True):
    """Write Conv, BatchNormalization, Relu, Conv, BatchNormalization, mean, Gemm, BatchNormalization."""
    constants = {
        "w1": RNG.normal(size=(6, 3, 3, 3)),
        "b1": RNG.normal(size=6),
        "w2": RNG.normal(size=(4, 6, 1, 1)),
        "w3": RNG.normal(size=(4, 5)),
    }
    for name, size in (("n1", 6), ("n2", 4), ("n3", 5)):
        constants |= {f"{name}_{p}": RNG.uniform(0.1, 3, size) for p in ("gamma", "beta", "mean", "var")}

    def norm(name, source, target):
        parts = [f"{name}_{p}" for p in ("gamma", "beta", "mean", "var")]
        return helper.make_node("BatchNormalization", [source, *parts], [target], epsilon=0.01)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"] if bias else ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        norm("n1", "c1", "y1"),
        helper.make_node("Relu", ["y1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        norm("n2", "c2", "y2"),
        helper.make_node("Add", ["y2", "c2" if shared else "y2"], ["s2"]),
        helper.make_node("GlobalAveragePool", ["s2"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["g"]),
        norm("n3", "g", "scores"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items() if bias or n != "b1"],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    images = RNG.normal(size=(24, 3, 8, 8)).astype(np.float32)
    return workload.load(str(path), None, Data(Split({"x": images})))


@pytest.mark.parametrize("bias", [True, False])
def test_all_three_fold_and_the_outputs_stay(tmp_path, bias):
    model = written(tmp_path / "m.onnx", bias=bias)
    network, count = folded(model.network)
    assert count == 3
    proto = network.proto()
    onnx.checker.check_model(proto, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert not [t.name for t in proto.graph.initializer if t.name.startswith("n")], "their numbers are gone"
    inputs = model.data.calibration.inputs
    np.testing.assert_allclose(network.run(inputs)["scores"], model.network.run(inputs)["scores"], atol=1e-4)


def test_a_sum_that_somebody_else_reads_is_not_folded(tmp_path):
    model = written(tmp_path / "m.onnx", shared=True)
    network, count = folded(model.network)
    assert count == 2
    inputs = model.data.calibration.inputs
    np.testing.assert_allclose(network.run(inputs)["scores"], model.network.run(inputs)["scores"], atol=1e-4)


def test_a_file_without_any_comes_back_itself(tmp_path):
    once, _ = folded(written(tmp_path / "m.onnx").network)
    again, count = folded(once)
    assert again is once
    assert count == 0


def test_quantize_folds_the_file_that_was_given(tmp_path):
    model = written(tmp_path / "m.onnx")
    planned = Quantize().apply(model, silent)
    assert planned.lineage[-1].measured["folded"] == 3
    assert set(planned.plan.weights) == {"w1", "w2", "w3"}
    assert model.network.content is None, "the model that came in is untouched"
    inputs = model.data.calibration.inputs
    want, got = (n.run(inputs)["scores"] for n in (model.network, planned_network(planned)))
    assert 10 * np.log10(np.square(want).sum() / np.square(got - want).sum()) > 25
