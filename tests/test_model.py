"""Splits, batches and networks: what every pass and exporter relies on."""

import shutil

import numpy as np
import pytest
from fakes import digits
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import InputError, UsageError
from edgekit.model import Data, LlamaFolder, Model, OnnxNetwork, Split, run_batched


@given(st.integers(1, 40), st.integers(1, 50))
def test_batches_are_the_split_in_order(count, size):
    split = Split({"x": np.arange(count)}, np.arange(count) * 2)
    parts = list(split.batches(size))
    assert all(0 < len(part) <= size for part in parts)
    assert np.concatenate([part.inputs["x"] for part in parts]).tolist() == list(range(count))
    assert np.concatenate([part.labels for part in parts]).tolist() == [2 * n for n in range(count)]


def test_a_head_keeps_labels_beside_their_samples():
    split = Split({"x": np.arange(5)}, np.arange(5) + 7)
    assert (split.head(2).inputs["x"].tolist(), split.head(2).labels.tolist()) == ([0, 1], [7, 8])
    assert len(split.head(99)) == 5
    assert Split({"x": np.arange(5)}).head(2).labels is None


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [({}, None), ({"x": np.zeros(2), "y": np.zeros(3)}, None), ({"x": np.zeros(2)}, np.zeros(3))],
)
def test_arrays_of_several_lengths_are_no_split(inputs, labels):
    with pytest.raises(UsageError, match="arrays of one length"):
        Split(inputs, labels)


@pytest.mark.parametrize("size", [1, 7, 400, 999])
def test_the_size_of_a_batch_changes_nothing(size):
    model = digits.model()
    split = model.data.test.head(50)
    whole = model.network.run(split.inputs)["scores"]
    np.testing.assert_allclose(run_batched(model.network, split, size)["scores"], whole, atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_network_that_gives_nan_or_infinity_is_noticed(poison):
    class Poisoned:
        def run(self, inputs):
            return {"scores": np.array([[1.0, poison]] * len(inputs["x"]))}

    with pytest.raises(InputError, match="output 'scores' holds NaN or infinity"):
        run_batched(Poisoned(), Split({"x": np.zeros(3)}))


def test_an_onnx_file_that_changed_is_opened_again(tmp_path):
    import onnx

    path = tmp_path / "m.onnx"
    shutil.copyfile(digits.onnx_file(), path)
    images = digits.model().data.test.head(2).inputs
    first = OnnxNetwork(path).run(images)["scores"]
    proto = onnx.load(path)
    bias = next(t for t in proto.graph.initializer if t.name == "classifier.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(proto, path)
    np.testing.assert_allclose(OnnxNetwork(path).run(images)["scores"], first + 1, atol=1e-4)


def test_precision_follows_the_plan():
    assert Model(name="m", task="tensor", network=digits.model().network).precision == "fp32"
    assert digits.quantized().precision == "int8"


def test_a_llama_folder_computes_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    outputs = LlamaFolder(tmp_path).run({"input_ids": np.array([[1, 2, 3]])})
    assert outputs["logits"].shape == (1, 3, 20)
    assert np.isfinite(outputs["logits"]).all()


def test_scores_come_before_the_label_that_a_classifier_names_first(tmp_path):
    from edgekit import workload
    from edgekit.compress.evaluate import top1

    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    rows = helper.make_tensor_value_info("rows", kinds.FLOAT, ["n", 3])
    label = helper.make_tensor_value_info("label", kinds.INT64, ["n"])
    scores = helper.make_tensor_value_info("scores", kinds.FLOAT, ["n", 3])
    nodes = [
        helper.make_node("Identity", ["rows"], ["scores"]),
        helper.make_node("ArgMax", ["rows"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", [rows], [label, scores])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    picked = Split({"rows": np.eye(3, dtype=np.float32)}, np.array([0, 1, 0]))
    model = workload.load(str(tmp_path / "m.onnx"), None, Data(picked))
    assert [spec.name for spec in model.outputs] == ["scores", "label"]
    assert top1(model.network, picked) == pytest.approx(2 / 3)
