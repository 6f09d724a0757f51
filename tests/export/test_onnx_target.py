"""ONNX and TensorRT files: the plan's ranges land in the scales, names and opset are the promised ones."""

import dataclasses
import importlib.util

import msgspec
import numpy as np
import onnx
import pytest
import torch
from fakes.exportable import tied_model, tiny_model, with_plan
from onnx import numpy_helper

from edgekit import bundle, device_profiles, load, onnx_io, plugins, workload
from edgekit.errors import BundleError, ExportError, UsageError
from edgekit.export import PACKAGE, export, onnx_file, onnx_weights
from edgekit.model import Data, OnnxNetwork, Split
from edgekit.plan import QuantizationPlan, Range
from edgekit.progress import silent


def lower(model, folder, target="x86-64", **options):
    profile = device_profiles.load(target)
    profile = msgspec.structs.replace(profile, options={**profile.options, **options})
    exporter = plugins.load(PACKAGE, profile.format, "format")
    folder.mkdir(exist_ok=True)
    artifact = exporter.export(model, profile, folder, silent)
    return onnx.load(folder / artifact.main), artifact


def constants(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def activation_scales(proto):
    """Return scale and zero point by the value that each QuantizeLinear rounds."""
    values = constants(proto)
    return {
        n.input[0]: (float(values[n.input[1]]), int(values[n.input[2]]))
        for n in proto.graph.node
        if n.op_type == "QuantizeLinear"
    }


def test_the_plans_ranges_are_the_scales_of_the_file(tiny_int8, tmp_path):
    # Ranges that no calibration could give: 3 wider than measured.
    wide = {n: Range(3 * r.low, 3 * r.high) for n, r in tiny_int8.plan.activations.items()}
    model = dataclasses.replace(tiny_int8, plan=msgspec.structs.replace(tiny_int8.plan, activations=wide))
    scales = activation_scales(lower(model, tmp_path)[0])
    names = {"image": "image", "relu": "relu", "relu6": "relu6", "relu_1": "relu_1", "mean": "mean"}
    checked = 0
    for node, value in names.items():
        if node in wide and value in scales:
            low, high = min(0.0, wide[node].low), max(0.0, wide[node].high)
            assert scales[value][0] == pytest.approx((high - low) / 255, rel=1e-5), node
            checked += 1
    assert checked >= 4


def test_every_range_of_a_saved_and_loaded_model_is_found_again(tiny_int8, tmp_path):
    workload.save(tiny_int8, tmp_path / "model")
    loaded = workload.load(str(tmp_path / "model"))
    for model in (tiny_int8, loaded):
        note = lower(model, tmp_path / "file")[1].notes[0]
        assert note.endswith("0 measured on the calibration data"), note


def test_a_sum_is_found_although_torch_renames_it(tiny_int8, tmp_path):
    graph = onnx_file.float_graph(tiny_int8, 21)
    assert graph.values["add"].startswith("add_")
    assert graph.values["mul"] == "scores"
    made = {name for node in graph.proto.graph.node for name in node.output} | {"image"}
    assert {graph.values[name] for name in tiny_int8.plan.activations} <= made


def test_missing_ranges_are_measured_on_the_calibration_data(tiny_int8, tmp_path):
    few = {"image": Range(0.0, 1.0)}
    model = dataclasses.replace(tiny_int8, plan=msgspec.structs.replace(tiny_int8.plan, activations=few))
    scales = activation_scales(lower(model, tmp_path)[0])
    want = tiny_int8.plan.activations["relu_1"]
    assert scales["relu_1"][0] == pytest.approx(want.high / 255, rel=1e-3)


def test_weights_are_signed_bytes_with_one_scale_a_channel(tiny_int8, tmp_path):
    proto, _ = lower(tiny_int8, tmp_path)
    values = constants(proto)
    weight = tiny_int8.network.module.down.weight.detach().numpy()
    assert values["down.weight_quantized"].dtype == np.int8
    want = np.abs(weight).max((1, 2, 3)) / 127
    np.testing.assert_allclose(values["down.weight_scale"], want, rtol=1e-2)


def test_one_scale_a_tensor_where_the_plan_says_so(tmp_path):
    proto, _ = lower(with_plan(tiny_model(), granularity="tensor"), tmp_path)
    assert constants(proto)["down.weight_scale"].size == 1


def test_a_layer_the_plan_leaves_out_stays_float(tmp_path):
    model = with_plan(tiny_model(), weights=["stem.weight", "down.weight"])
    values = constants(lower(model, tmp_path)[0])
    assert values["depthwise.weight"].dtype == np.float32
    assert "down.weight_quantized" in values


def test_tensorrt_gets_symmetric_signed_integers_and_float_biases(tiny_int8, tmp_path):
    proto, artifact = lower(tiny_int8, tmp_path, "jetson-orin-nano")
    values = constants(proto)
    points = [values[n.input[2]] for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(p.dtype == np.int8 and not p.any() for p in points)
    assert values["down.bias"].dtype == np.float32
    assert max(o.version for o in proto.opset_import if not o.domain) == 20
    assert any("the device builds the TensorRT engine of this file itself" in note for note in artifact.notes)


def test_cpus_get_unsigned_activations_unless_the_profile_says_otherwise(tiny_int8, tmp_path):
    def kinds(proto):
        values = constants(proto)
        return {values[n.input[2]].dtype.name for n in proto.graph.node if n.op_type == "QuantizeLinear"}

    assert kinds(lower(tiny_int8, tmp_path)[0]) == {"uint8"}
    assert kinds(lower(tiny_int8, tmp_path, target="raspberry-pi-5", activations="int8")[0]) == {"int8"}
    with pytest.raises(ExportError, match="in float"):  # kernels of x86 take unsigned activations alone
        lower(tiny_int8, tmp_path, activations="int8")
    with pytest.raises(UsageError, match="'uint4'"):
        lower(tiny_int8, tmp_path, activations="uint4")


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_the_opset_is_the_one_asked_for(tiny, tmp_path, opset):
    proto, artifact = lower(tiny, tmp_path, opset=opset)
    assert [o.version for o in proto.opset_import if not o.domain] == [opset]
    assert artifact.requires["opset"] == str(opset)


def test_an_opset_that_torch_ignores_is_an_error(tiny, tmp_path):
    with pytest.raises(ExportError, match=r"opset 13 was asked for, torch.onnx wrote 18"):
        lower(tiny, tmp_path, opset=13)


def test_names_are_public_the_batch_is_dynamic_and_nothing_tells_of_this_machine(tiny, tmp_path):
    proto, artifact = lower(tiny, tmp_path)
    assert [i.name for i in proto.graph.input] == ["image"]
    assert [o.name for o in proto.graph.output] == ["scores"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert artifact.batch == -1
    data = (tmp_path / "model.onnx").read_bytes()
    assert __file__.encode() not in data
    assert b"stack_trace" not in data


@pytest.mark.parametrize("planned", [False, True])
def test_every_value_has_a_shape_and_nothing_is_left_to_fold(tiny, tiny_int8, tmp_path, planned):
    proto, _ = lower(tiny_int8 if planned else tiny, tmp_path)
    told = {v.name for v in (*proto.graph.value_info, *proto.graph.output)}
    assert {name for node in proto.graph.node for name in node.output} <= told
    read = {name for node in proto.graph.node for name in node.input}
    weights = {one.name for one in proto.graph.initializer}
    assert weights <= read
    rounded = {"QuantizeLinear", "DequantizeLinear"}  # of weights: they lie in the file as integers
    assert all(set(node.input) - weights for node in proto.graph.node if node.op_type not in rounded)
    assert not {node.op_type for node in proto.graph.node} & {"Identity", "Constant"}


def test_constants_of_recurrent_layers_are_computed_beforehand(tmp_path):
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = torch.nn.GRU(8, 64, batch_first=True)

        def forward(self, x):
            return self.gru(x)[0]

    torch.manual_seed(0)
    data = Data(Split({"x": np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)}))
    proto, _ = lower(workload.from_module("gru", Recurrent().eval(), data), tmp_path)
    weights = {one.name for one in proto.graph.initializer}
    assert "GRU" in {node.op_type for node in proto.graph.node}
    assert all(set(node.input) - weights for node in proto.graph.node)


@pytest.mark.slow
def test_weights_of_a_large_model_lie_beside_it(tiny, tiny_int8, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_io, "LARGE", 1000)
    monkeypatch.setattr(onnx_io, "PAGE", 64)
    for model in (tiny, tiny_int8):
        folder = tmp_path / model.precision
        profiles = [device_profiles.load("x86-64"), device_profiles.load("jetson-orin-nano")]
        if importlib.util.find_spec("openvino"):
            profiles.append(device_profiles.of_format("openvino"))
        done = export(model, profiles, folder)
        assert done.first_error is None
        variants = {v.name: v for v in bundle.read(folder).manifest.variants}
        assert variants["x86-64"].files == ("x86-64/model.onnx", "x86-64/model.onnx.data")
        assert variants["x86-64"].parity.status == "checked"
        shut = onnx.load(folder / "x86-64/model.onnx", load_external_data=False)
        offsets = [int(e.value) for t in shut.graph.initializer for e in t.external_data if e.key == "offset"]
        kept = [numpy_helper.to_array(t).nbytes for t in shut.graph.initializer if not t.external_data]
        assert offsets
        assert max(kept) < onnx_io.PAGE
        assert all(offset % 64 == 0 for offset in offsets)
        inputs = model.data.calibration.head(2).inputs
        with load(folder, variant="x86-64") as session:
            found = session.run(inputs)["scores"]
        monkeypatch.setattr(onnx_io, "LARGE", 1 << 30)
        assert export(model, profiles[:1], tmp_path / "whole").first_error is None
        with load(tmp_path / "whole") as session:
            np.testing.assert_array_equal(session.run(inputs)["scores"], found)
        monkeypatch.setattr(onnx_io, "LARGE", 1000)
        (folder / "x86-64/model.onnx.data").write_bytes(b"")
        with pytest.raises(BundleError):
            load(folder, variant="x86-64")


def test_a_weight_that_became_a_transposed_copy_is_known_by_its_values(tmp_path):
    import torch

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(8, 8)

        def forward(self, image):
            return self.project(image).mean((1, 2))  # rank 4: torch.onnx writes MatMul with a transposed constant

    model = with_plan(tiny_model(Tokens()))
    prepared = onnx_weights.Weights(onnx_file.float_graph(model, 21).proto)
    assert [item.name for item in onnx_weights.planned_nodes(prepared, model, model.plan)] == ["project.weight"]
    for granularity, scales in (("tensor", 1), ("channel", 8)):
        proto, _ = lower(with_plan(tiny_model(Tokens()), granularity=granularity), tmp_path)
        values = constants(proto)
        (weight,) = (name for name, value in values.items() if value.dtype == np.int8 and value.ndim == 2)
        assert values[weight.replace("_quantized", "_scale")].size == scales


def test_a_table_that_is_looked_up_and_multiplied_by_is_quantized_where_it_is_multiplied(tmp_path):
    model = with_plan(tied_model(), weights=["head.weight"])
    proto, _ = lower(model, tmp_path)
    found = constants(proto)
    assert [a.dtype.name for a in found.values() if a.shape == (12, 8)] == ["float32"]
    (integers,) = (a for a in found.values() if a.dtype == np.int8 and a.shape == (8, 12))
    assert integers.any()
    assert not [n for n in proto.graph.node if n.op_type == "Transpose"]


def test_a_planned_weight_that_the_graph_lacks_is_named(tiny_int8, tmp_path):
    rules = {**tiny_int8.plan.weights, "ghost.weight": tiny_int8.plan.weights["stem.weight"]}
    model = dataclasses.replace(tiny_int8, plan=msgspec.structs.replace(tiny_int8.plan, weights=rules))
    with pytest.raises(ExportError, match=r"'ghost.weight', which no ONNX node uses"):
        lower(model, tmp_path)


def test_a_language_model_is_refused_with_the_way_out(tiny, tmp_path):
    from edgekit.model import LlamaFolder

    with pytest.raises(ExportError, match="language model") as caught:
        lower(dataclasses.replace(tiny, network=LlamaFolder(tmp_path)), tmp_path)
    assert "llama-cpp" in caught.value.hint


def test_an_onnx_file_keeps_its_names_and_can_be_quantized(tiny, tmp_path):
    proto, _ = lower(tiny, tmp_path / "float")
    source = tmp_path / "float" / "model.onnx"
    model = dataclasses.replace(tiny, network=OnnxNetwork(source))
    copied, artifact = lower(model, tmp_path / "copy")
    assert copied == proto
    weights = {n: r for n, r in with_plan(tiny).plan.weights.items() if n in constants(proto)}
    plan = QuantizationPlan(8, "minmax", weights, {"relu_1": Range(0.0, 9.0)})
    quantized, _ = lower(dataclasses.replace(model, plan=plan), tmp_path / "int8")
    assert activation_scales(quantized)["relu_1"][0] == pytest.approx(9 / 255)
    assert artifact.batch == -1


def test_control_flow_on_values_is_refused_before_anything_is_written(tiny, tmp_path):
    import torch

    class Branch(torch.nn.Module):
        def forward(self, image):
            return image.mean((2, 3)) if image.sum() > 0 else image.amax((2, 3))

    with pytest.raises(ExportError, match=r"depends on the values of a tensor \(test_onnx_target\.py:\d+, return"):
        lower(tiny_model(Branch()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_an_onnx_form_is_named(tmp_path):
    import torch

    class Digamma(torch.nn.Module):
        def forward(self, image):
            return torch.special.zeta(image + 2, image + 1).mean((2, 3))

    with pytest.raises(ExportError, match="zeta"):
        lower(tiny_model(Digamma()), tmp_path)
