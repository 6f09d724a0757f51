"""Every scheme of a plan as an ONNX file: the integers are the plan's, and the file computes what the plan says."""

import dataclasses

import msgspec
import numpy as np
import onnx
import pytest
from fakes.exportable import tiny_model
from onnx import numpy_helper

from edgekit import device_profiles, grid, plugins, workload
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError, ExportError, UsageError
from edgekit.export import PACKAGE, export, kernels, qdq
from edgekit.plan import QuantizationPlan, WeightRule
from edgekit.progress import silent

onnxruntime = pytest.importorskip("onnxruntime")

SCHEMES = {
    "int8": {},
    "int8 a tensor": {"granularity": "tensor"},
    "int8 inputs": {"cover": "inputs"},
    "7 bits": {"bits": 7},
    "w4a8": {"bits": 4, "weights": "mse"},
    "one left float": {"keep": ("depthwise.weight",)},
    "w4a8 one left float": {"bits": 4, "weights": "mse", "keep": ("head.weight",)},
    "int8-weights": {"activations": "none"},
    "int4-weights": {"activations": "none", "bits": 4, "weights": "mse"},
    "int4 with zero points": {"activations": "none", "bits": 4, "weights": "mse", "symmetric": False},
    "int4 groups with zero points": {
        "activations": "none",
        "bits": 4,
        "granularity": "group",
        "group": 32,
        "symmetric": False,
    },
    "int8 with zero points": {"activations": "none", "symmetric": False},
    "int4 a tensor": {"activations": "none", "bits": 4, "granularity": "tensor"},
    "int4 groups": {"activations": "none", "bits": 4, "granularity": "group", "group": 32},
    "3 bits": {"activations": "none", "bits": 3},
    "int8-dynamic": {"activations": "dynamic"},
    "int4-dynamic groups": {"activations": "dynamic", "bits": 4, "granularity": "group", "group": 32},
}


@pytest.fixture(scope="module", params=SCHEMES)
def planned(request, tiny):
    return Quantize(**SCHEMES[request.param]).apply(tiny, silent)


def lower(model, folder, target="x86-64", **options):
    profile = device_profiles.load(target)
    profile = msgspec.structs.replace(profile, options={**profile.options, **options})
    artifact = plugins.load(PACKAGE, profile.format, "format").export(model, profile, folder, silent)
    return folder / artifact.main, artifact


def run(path, inputs):
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.x64quantprecision", "1")  # x86 without dot products cuts sums off else
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))[0]


def sqnr(got, want):
    return 10 * np.log10(np.square(want).sum() / max(np.square(got - want).sum(), 1e-12))


def test_a_plan_that_covers_inputs_leaves_every_other_value_float(tiny, tmp_path):
    """Engines that find a pair around a sum compute it in integers, whatever its range."""
    counts = {}
    for cover in ("inputs", "all"):
        made = Quantize(cover=cover).apply(tiny, silent)
        graph = onnx.load(lower(made, tmp_path)[0]).graph
        counts[cover] = sum(node.op_type == "QuantizeLinear" for node in graph.node)
        if cover == "inputs":
            assert counts[cover] <= len(made.plan.activations)
    assert counts["inputs"] < counts["all"]


def test_the_integers_in_the_file_are_those_of_the_plan(planned, tmp_path):
    path, artifact = lower(planned, tmp_path)
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    assert artifact.precision == planned.precision
    for name, rule in planned.plan.weights.items():
        weight = planned.network.module.get_parameter(name).detach().numpy()
        want = grid.quantized(weight, rule)
        got = numpy_helper.to_array(stored[f"{name}_quantized"]).astype(np.int32)
        if got.shape != weight.shape and got.ndim == 2 and weight.ndim == 2:
            got = got.T  # as MatMul reads it
        np.testing.assert_array_equal(got.reshape(want.shape), want, err_msg=name)
        scales = numpy_helper.to_array(stored[f"{name}_scale"])
        want_scales = grid.scales_of(weight, rule)
        turned = scales.T if scales.shape == want_scales.T.shape != want_scales.shape else scales
        np.testing.assert_array_equal(turned.reshape(-1), want_scales.reshape(-1))
        packed = rule.bits <= 4 and (planned.plan.scheme == "weight-only" or rule.granularity == "group")
        if planned.plan.scheme != "static":
            assert (
                stored[f"{name}_quantized"].data_type
                == (onnx.TensorProto.UINT4 if rule.zeros else onnx.TensorProto.INT4)
            ) == packed
        assert name not in stored, "the float weight is gone"


def test_the_file_computes_what_the_plan_says(planned, tmp_path):
    path, _ = lower(planned, tmp_path)
    inputs = planned.data.calibration.inputs
    want = next(iter(planned_network(planned).run(inputs).values()))
    true = next(iter(planned.network.run(inputs).values()))
    got = run(path, inputs)
    floor = {"weight-only": 90, "dynamic": 35, "static": 33}[planned.plan.scheme]
    if any(rule.granularity == "group" and rule.bits <= 4 for rule in planned.plan.weights.values()):
        floor = 35  # MatMulNBits rounds its input to 8 bits
    assert sqnr(got, want) > floor
    assert sqnr(got, want) > sqnr(got, true) + 3, "the file is nearer to the plan than to the float model"


def test_a_planned_model_passes_its_parity_check_and_names_its_precision(planned, tmp_path):
    result = export(planned, [device_profiles.load("x86-64")], tmp_path / "bundle")
    variant = result.rows[0].variant
    assert result.first_error is None
    assert variant.parity.status == "checked"
    assert variant.precision == planned.precision


def test_a_matrix_with_groups_can_be_fused_to_a_kernel_for_four_bits(tmp_path):
    import torch

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(64, 8, bias=False)

        def forward(self, image):
            return self.project(image.reshape(-1, 3, 64)).mean(1)

    model = Quantize(activations="none", bits=4, granularity="group", group=32).apply(tiny_model(Tokens()), silent)
    path, _ = lower(model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    inputs = model.data.calibration.inputs
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert "MatMulNBits" in {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    want = next(iter(planned_network(model).run(inputs).values()))
    assert sqnr(session.run(None, dict(inputs))[0], want) > 40  # its kernel rounds the input to 8 bits


def optimized_operators(path):
    return [node.op_type for node in kernels.optimized(path).graph.node]


def test_a_linear_layer_with_groups_gets_the_kernel_of_a_matmul(tiny, tmp_path):
    for activations in ("none", "dynamic"):
        options = {"activations": activations, "bits": 4, "granularity": "group", "group": 32}
        model = Quantize(**options, keep=("stem.weight", "depthwise.weight", "down.weight")).apply(tiny, silent)
        path, artifact = lower(model, tmp_path)
        assert "Gemm" not in {node.op_type for node in onnx.load(path).graph.node}
        assert "MatMulNBits" in optimized_operators(path)
        assert any(note.startswith("1 of 4 ") for note in artifact.notes)


def test_weights_of_four_bits_lie_in_four_and_run_as_eight(tiny, tmp_path):
    model = Quantize(bits=4, weights="mse").apply(tiny, silent)
    path, artifact = lower(model, tmp_path)
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    for name in model.plan.weights:
        assert stored[f"{name}_quantized"].data_type == onnx.TensorProto.INT4
        count = model.network.module.get_parameter(name).numel()
        assert len(stored[f"{name}_quantized"].raw_data) == (count + 1) // 2
    found = optimized_operators(path)
    assert found.count("QLinearConv") == 3
    assert found.count("QGemm") == 1
    assert any("stored in 4 bits" in note for note in artifact.notes)
    assert any(note.startswith("4 of 4 convolutions") for note in artifact.notes)


def test_tensorrt_gets_weights_of_four_bits_in_eight(tiny, tmp_path):
    model = Quantize(bits=4).apply(tiny, silent)
    path, artifact = lower(model, tmp_path, target="jetson-orin-nano")
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    assert {stored[f"{name}_quantized"].data_type for name in model.plan.weights} == {onnx.TensorProto.INT8}
    assert any("are stored in 8" in note for note in artifact.notes)


@pytest.mark.parametrize("kept", ["depthwise.weight", "down.weight", "head.weight"])
def test_a_layer_that_the_plan_leaves_float_stays_float_in_the_engine(tiny, tmp_path, kept):
    """ONNX Runtime quantizes float weights behind a pair, with one scale a tensor, where nobody asked it to."""
    model = Quantize(keep=(kept,)).apply(tiny, silent)
    path, artifact = lower(model, tmp_path)
    found = optimized_operators(path)
    assert sum(operator in kernels.FLOAT for operator in found) == 1
    assert any(note.startswith("3 of 4 ") for note in artifact.notes)
    inputs = model.data.calibration.inputs
    assert sqnr(run(path, inputs), next(iter(planned_network(model).run(inputs).values()))) > 33


def test_a_plan_that_would_run_in_float_is_refused_by_the_nodes_name(tiny, tmp_path):
    model = Quantize(bits=4, granularity="group", group=32).apply(tiny, silent)
    with pytest.raises(ExportError, match=r"'stem.weight' is planned in integers.* node 'node_conv2d'"):
        lower(model, tmp_path)


def test_a_convolution_whose_pair_is_lost_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(qdq, "fused_away", lambda graph: {n.output[0] for n in graph.node if n.op_type == "Relu"})
    with pytest.raises(ExportError, match="would compute node"):
        lower(Quantize().apply(tiny, silent), tmp_path)


def test_what_no_kernel_is_made_for_is_told(tmp_path):
    import torch

    class Up(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.up = torch.nn.ConvTranspose2d(8, 4, 2, stride=2)

        def forward(self, image):
            return self.up(torch.relu(self.down(image))).flatten(1)

    model = Quantize().apply(tiny_model(Up()), silent)
    _, artifact = lower(model, tmp_path)
    assert any("there is none for up.weight (ConvTranspose)" in note for note in artifact.notes), artifact.notes


def test_zero_points_make_unsigned_integers(tiny, tmp_path):
    weight = tiny.network.module.down.weight.detach().numpy()
    low, high = weight.min(axis=(1, 2, 3)), weight.max(axis=(1, 2, 3))
    scales = ((high - low) / 15).astype(np.float32)[:, None]
    rule = grid.with_scales(WeightRule(bits=4), scales, np.round(-low[:, None] / scales))
    plan = QuantizationPlan(4, "none", {"down.weight": rule}, {}, "weight-only")
    model = dataclasses.replace(tiny, plan=plan)
    path, _ = lower(model, tmp_path)
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    assert stored["down.weight_quantized"].data_type == onnx.TensorProto.UINT4
    inputs = tiny.data.calibration.inputs
    assert sqnr(run(path, inputs), next(iter(planned_network(model).run(inputs).values()))) > 90


def test_the_bias_of_a_dead_channel_survives(tmp_path):
    import torch

    model = tiny_model()
    with torch.no_grad():
        model.network.module.down.weight[3] = 1e-20
        model.network.module.down.weight[4] = 0
        model.network.module.down.bias[3:5] = 2.0
    planned = Quantize().apply(model, silent)
    path, _ = lower(planned, tmp_path)
    inputs = model.data.calibration.inputs
    assert sqnr(run(path, inputs), next(iter(planned_network(planned).run(inputs).values()))) > 33


def test_tensorrt_is_given_static_plans_only(tiny, tmp_path):
    for options in ({"activations": "none"}, {"activations": "dynamic"}):
        model = Quantize(**options).apply(tiny, silent)
        with pytest.raises(ExportError, match="TensorRT") as caught:
            lower(model, tmp_path, "jetson-orin-nano")
        assert "static" in caught.value.hint
    model = Quantize(bits=4, granularity="group", group=32).apply(tiny, silent)
    with pytest.raises(ExportError, match="scale a group"):
        lower(model, tmp_path, "jetson-orin-nano")


def test_half_precision_keeps_floats_outside(tiny, tmp_path):
    model = dataclasses.replace(tiny, plan=QuantizationPlan(16, "none", {}, {}, "float16"))
    path, artifact = lower(model, tmp_path)
    proto = onnx.load(path)
    assert {t.data_type for t in proto.graph.initializer if t.name.endswith("weight")} == {onnx.TensorProto.FLOAT16}
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert artifact.precision == "fp16"
    inputs = tiny.data.calibration.inputs
    assert 35 < sqnr(run(path, inputs), next(iter(tiny.network.run(inputs).values()))) < 90


def test_an_onnx_file_of_an_old_opset_is_brought_up(tiny, tmp_path):
    (tmp_path / "float").mkdir()
    old, artifact = lower(tiny, tmp_path / "float", opset=18)
    assert artifact.requires["opset"] == "18"
    model = workload.load(str(old), None, tiny.data)
    planned = Quantize(activations="none", bits=4).apply(model, silent)
    path, artifact = lower(planned, tmp_path)
    assert int(artifact.requires["opset"]) >= 21
    inputs = tiny.data.calibration.inputs
    assert sqnr(run(path, inputs), next(iter(planned_network(planned).run(inputs).values()))) > 90


def test_a_plan_for_another_network_is_refused(tiny, tmp_path):
    planned = Quantize().apply(tiny, silent)
    rule = planned.plan.weights["stem.weight"]
    weights = {**planned.plan.weights, "down.weight": msgspec.structs.replace(rule, axis=0)}
    broken = msgspec.structs.replace(planned.plan, weights=weights)
    with pytest.raises(CompressionError, match=r"holds 8 scales .* it needs 16"):
        lower(dataclasses.replace(planned, plan=broken), tmp_path)


def test_a_float_network_is_written_in_halves_and_told_where_that_is_slow(tiny, tiny_int8, tmp_path):
    profiles = [device_profiles.load(name) for name in ("x86-64", "raspberry-pi-5")]
    done = export(tiny, profiles, tmp_path / "half", precision="fp16")
    assert done.first_error is None
    slow, fast = (row.variant for row in done.rows)
    assert {slow.precision, fast.precision} == {"fp16"}
    assert slow.parity.status == "checked"
    assert any("computes halves in float on x86" in note for note in slow.notes)
    assert not any("computes halves in float" in note for note in fast.notes)
    proto = onnx.load(tmp_path / "half" / slow.main)
    kinds = {t.data_type for t in proto.graph.initializer if t.dims}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds
    assert {v.type.tensor_type.elem_type for v in proto.graph.input} == {onnx.TensorProto.FLOAT}
    with pytest.raises(UsageError, match="cannot be exported as fp16"):
        export(tiny_int8, profiles, tmp_path / "none", precision="fp16")
