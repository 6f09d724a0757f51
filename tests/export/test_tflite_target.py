"""LiteRT: channel-last inputs described by ports, int8 inside and float outside, ranges that no average shrinks."""

import dataclasses

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from fakes.exportable import tied_model, tiny_model, with_plan

pytest.importorskip("litert_torch", reason="needs the export extra")

from edgekit import device_profiles, grid, plugins, runtime, workload
from edgekit.cli import cli
from edgekit.compress import compress, recipe
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.errors import ExportError, UsageError
from edgekit.export import PACKAGE, export, litert_file, litert_recipe, litert_weights
from edgekit.export.quiet import silence
from edgekit.export.targets import tflite
from edgekit.model import Data, OnnxNetwork, Split
from edgekit.plan import QuantizationPlan, Range, WeightRule
from edgekit.progress import silent

EXPORTER = plugins.load(PACKAGE, "tflite", "format")


def write(model, folder):
    return EXPORTER.export(model, device_profiles.load("pixel-8"), folder, silent)


def details(path):
    from ai_edge_litert.interpreter import Interpreter

    with silence():
        interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
    return interpreter


def test_pictures_are_channel_last_and_the_port_says_how(tiny, tmp_path):
    artifact = write(tiny, tmp_path)
    (port,) = artifact.inputs
    assert (port.name, port.axes, artifact.batch) == ("image", (0, 2, 3, 1), 1)
    assert details(tmp_path / artifact.main).get_input_details()[0]["shape"].tolist() == [1, 8, 8, 3]


def test_a_plan_makes_bytes_inside_and_leaves_floats_outside(tiny_int8, tmp_path):
    interpreter = details(tmp_path / write(tiny_int8, tmp_path).main)
    ends = interpreter.get_input_details() + interpreter.get_output_details()
    assert {d["dtype"] for d in ends} == {np.float32}
    assert sum(d["dtype"] is np.int8 for d in interpreter.get_tensor_details()) > 8


@pytest.mark.slow
def test_ranges_that_the_plan_lacks_are_the_extremes_of_all_samples_not_a_moving_average(tiny_int8, tmp_path):
    images = np.full((20, 3, 8, 8), 0.5, np.float32)
    images[7, 0, 0, 0] = 4.0  # one sample of twenty; a moving average with weight 0.05 would keep 0.7 of it
    split = dataclasses.replace(tiny_int8.data.calibration, inputs={"image": images}, labels=None)
    model = dataclasses.replace(
        tiny_int8,
        data=dataclasses.replace(tiny_int8.data, calibration=split),
        plan=msgspec.structs.replace(tiny_int8.plan, activations={}),
    )
    interpreter = details(tmp_path / write(model, tmp_path).main)
    scales = [d["quantization"][0] for d in interpreter.get_tensor_details() if d["shape"].tolist() == [1, 8, 8, 3]]
    assert max(scales) == pytest.approx(4.0 / 255, rel=1e-3)


def test_two_samples_ranges_join():
    one = {"x": {"min": np.array([1.0]), "max": np.array([2.0])}, "only": {"min": np.zeros(1)}}
    other = {"x": {"min": np.array([0.0]), "max": np.array([1.5])}}
    joined = tflite._wider(one, other)
    assert (joined["x"]["min"], joined["x"]["max"]) == ([0.0], [2.0])
    assert "only" in joined


def test_a_weight_only_plan_shrinks_the_file(tmp_path):
    import torch

    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    model = with_plan(tiny_model(wide))
    only = dataclasses.replace(model, plan=QuantizationPlan(8, "none", model.plan.weights, {}, "weight-only"))
    write(dataclasses.replace(model, plan=None), tmp_path)
    size = (tmp_path / "model.tflite").stat().st_size
    write(only, tmp_path)
    assert (tmp_path / "model.tflite").stat().st_size < 0.5 * size


@pytest.mark.parametrize(
    ("options", "floor"),
    [
        ({"activations": "none", "bits": 4, "weights": "mse"}, 75),
        ({"activations": "none", "bits": 8, "weights": "mse"}, 90),
        ({"activations": "dynamic"}, 45),
        ({"bits": 4, "weights": "mse"}, 40),
        ({"bits": 7}, 40),
    ],
    ids=str,
)
def test_the_file_computes_what_the_plan_says(tiny, tmp_path, options, floor):
    model = Quantize(**options).apply(tiny, silent)
    result = export(model, [device_profiles.load("pixel-8")], tmp_path / "b")
    assert result.first_error is None
    assert result.rows[0].variant.precision == model.precision
    inputs = model.data.calibration.head(4).inputs
    with runtime.load(tmp_path / "b") as session:
        got = session.run(inputs)["scores"]
    want = planned_network(model).run(inputs)["scores"]
    assert 10 * np.log10(np.square(want).sum() / np.square(got - want).sum()) > floor


def test_a_dead_channel_is_recovered_too(tmp_path):
    import torch

    model = tiny_model()
    with torch.no_grad():
        model.network.module.down.weight[3] = 0
    model = Quantize(activations="none", bits=4).apply(model, silent)
    result = export(model, [device_profiles.load("pixel-8")], tmp_path / "b")
    assert result.first_error is None
    assert result.rows[0].variant.parity.sqnr_db > 20


def test_one_scale_a_tensor_is_the_same_scale_for_every_channel(tmp_path):
    artifact = write(with_plan(tiny_model(), granularity="tensor"), tmp_path)
    layers = litert_file.read((tmp_path / artifact.main).read_bytes()).layers
    assert [layer.scales.max() / layer.scales.min() for layer in layers] == pytest.approx([1, 1, 1, 1], rel=1e-6)


def test_layers_that_the_plan_keeps_are_float_and_the_others_have_their_own_widths(tiny, tmp_path):
    model = Quantize(activations="none", bits=4, keep=("head.weight",)).apply(tiny, silent)
    rules = dict(model.plan.weights)
    rules["down.weight"] = msgspec.structs.replace(rules["down.weight"], bits=8, scales=b"")
    model = dataclasses.replace(model, plan=msgspec.structs.replace(model.plan, weights=rules))
    artifact = write(model, tmp_path)
    assert kinds(tmp_path / artifact.main) == [
        ("CONV_2D", "INT4"), ("DEPTHWISE_CONV_2D", "INT8"), ("CONV_2D", "INT8"), ("FULLY_CONNECTED", "FLOAT32"),
    ]  # fmt: skip
    assert "1 of 4 layers keep float weights (1 FULLY_CONNECTED)" in artifact.notes


def test_a_static_plan_leaves_its_kept_layer_in_float(tiny, tmp_path):
    model = Quantize(keep=("depthwise.weight",)).apply(tiny, silent)
    artifact = write(model, tmp_path)
    assert dict(kinds(tmp_path / artifact.main))["DEPTHWISE_CONV_2D"] == "FLOAT32"
    assert dict(kinds(tmp_path / artifact.main))["FULLY_CONNECTED"] == "INT8"


def test_a_table_that_is_multiplied_by_too_stays_with_the_plan(tmp_path):
    model = Quantize().apply(tied_model(), silent)
    artifact = write(model, tmp_path)
    assert dict(kinds(tmp_path / artifact.main))["FULLY_CONNECTED"] == "INT8"


def test_what_the_quantizer_refuses_is_said_and_not_raised_through(tiny_int8, tmp_path, monkeypatch):
    def refused(recipe, engine):
        raise ValueError("no such config")

    monkeypatch.setattr(litert_recipe.Recipe, "choose", refused)
    with pytest.raises(ExportError, match="quantizer does not take the plan: no such config"):
        write(tiny_int8, tmp_path)


def wide_matrices(group=32):
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    return Quantize(activations="dynamic", bits=4, granularity="group", group=group).apply(tiny_model(net), silent)


def test_blocks_of_four_bits_have_the_integers_of_the_plan(tmp_path):
    result = export(wide_matrices(), [device_profiles.load("pixel-8")], tmp_path / "b")
    assert result.first_error is None
    variant = result.rows[0].variant
    assert {dtype for _, dtype in kinds(tmp_path / "b" / variant.main)} == {"INT4"}
    assert any(note.startswith("2 weights have scales a block") for note in variant.notes)
    assert variant.parity.sqnr_db > 15


def test_blocks_that_litert_lacks_are_errors_that_name_the_weight(tiny, tmp_path):
    with pytest.raises(ExportError, match=r"'1.weight' has a scale for each 128 inputs and 192 of them"):
        write(wide_matrices(128), tmp_path)
    convolutions = Quantize(activations="dynamic", bits=4, granularity="group", group=32).apply(tiny, silent)
    with pytest.raises(ExportError, match=r"'stem.weight' has a scale for each 32 inputs and 4 bits in CONV_2D"):
        write(convolutions, tmp_path)


def of_io(kind):
    profile = device_profiles.load("pixel-8")
    return msgspec.structs.replace(profile, options={**profile.options, "io": kind})


def test_int8_ends_are_rounded_at_the_edge_and_callers_see_floats(tiny_int8, tmp_path):
    result = export(tiny_int8, [of_io("int8")], tmp_path / "b")
    assert result.first_error is None
    variant = result.rows[0].variant
    ends = (*variant.inputs, *variant.outputs)
    assert [(port.dtype, port.scale > 0) for port in ends] == [("int8", True)] * 2
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "b")]).stdout
    port, end = ends
    assert f"pixel-8: image lies in the file as {port.key}: axes 0, 2, 3, 1; int8, value (integer - " in shown
    assert f"scores lies in the file as {end.key}: int8, value (integer - {end.zero}) * {end.scale:.6g}" in shown
    found = details(tmp_path / "b" / variant.main)
    assert [d["dtype"] for d in (*found.get_input_details(), *found.get_output_details())] == [np.int8] * 2
    inputs = tiny_int8.data.calibration.head(4).inputs
    with runtime.load(tmp_path / "b") as session:
        got = session.run(inputs)["scores"]
    want = planned_network(tiny_int8).run(inputs)["scores"]
    assert got.dtype == np.float32
    assert 10 * np.log10(np.square(want).sum() / np.square(got - want).sum()) > 30


def test_int8_ends_need_integer_activations(tiny, tmp_path):
    model = Quantize(activations="dynamic").apply(tiny, silent)
    with pytest.raises(UsageError, match="without integer activations"):
        EXPORTER.export(model, of_io("int8"), tmp_path, silent)
    with pytest.raises(UsageError, match=r"options.io is 'int4'"):
        EXPORTER.export(model, of_io("int4"), tmp_path, silent)


def test_a_layer_whose_numbers_are_not_those_of_the_plan_is_an_error(tiny_int8, tmp_path):
    held = _exactly(tiny_int8, tmp_path)
    floats = litert_file.read((tmp_path / "model.tflite").read_bytes())
    with pytest.raises(ExportError, match="is a float in the LiteRT file and integers in the plan"):
        litert_weights.check(held, floats.layers)


def _exactly(model, folder):
    """Return what each layer holds, of the file that is written from the rounded network."""
    network = litert_recipe.on_the_grid(model, model.network)
    write(dataclasses.replace(model, network=network, plan=None), folder)
    return tflite._held(
        model.network, model.plan.weights, litert_file.read((folder / "model.tflite").read_bytes()).layers
    )


def test_a_factor_in_a_channel_multiplies_its_scale():
    value = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    factor = np.array([[2.0], [-0.5], [1.0]], np.float32)
    layer = litert_file.Layer("FULLY_CONNECTED", "y", "w", "FLOAT32", value * factor)
    rule = grid.with_scales(WeightRule(), np.ones((3, 1), np.float32))
    one = litert_weights.held([layer], {"head.weight": value}, {"head.weight": rule})["y"]
    assert litert_weights.channel_scales(one).ravel().tolist() == pytest.approx([2.0, 0.5, 1.0])
    assert (one.integers * one.scales).ravel().tolist() == pytest.approx((value * factor).ravel().tolist())


def test_what_litert_cannot_hold_is_refused(tiny, tmp_path):
    import torch

    class Zeta(torch.nn.Module):
        def forward(self, image):
            return torch.special.zeta(image + 2, image + 1).mean((2, 3))

    with pytest.raises(ExportError, match="no LiteRT form"):
        write(tiny_model(Zeta()), tmp_path)
    with pytest.raises(ExportError, match="no PyTorch network") as caught:
        write(dataclasses.replace(tiny, network=OnnxNetwork(tmp_path / "m.onnx")), tmp_path)
    assert "Python workload" in caught.value.hint
    groups = Quantize(activations="none", bits=4, granularity="group", group=32).apply(tiny, silent)
    with pytest.raises(ExportError, match=r"'stem.weight' has a scale for each 32 inputs") as caught:
        write(groups, tmp_path)
    assert "channel" in caught.value.hint
    half = dataclasses.replace(tiny, plan=QuantizationPlan(16, "none", {}, {}, "float16"))
    with pytest.raises(ExportError, match="16-bit floats"):
        write(half, tmp_path)
    with pytest.raises(UsageError, match="no data"):
        write(dataclasses.replace(tiny, data=None), tmp_path)


def test_the_converters_say_nothing(tiny_int8, tmp_path, capfd):
    write(tiny_int8, tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("with_a_plan", [False, True])
def test_token_numbers_of_64_bits_are_narrowed_on_the_way_into_the_file(tmp_path, with_a_plan):
    import torch
    from torch import nn

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    tokens = np.random.default_rng(0).integers(0, 20, (16, 5))
    model = workload.from_module("words", Words().eval(), Data(Split({"tokens": tokens})))
    model = compress(model, recipe.default()) if with_a_plan else model
    (row,) = export(model, [device_profiles.load("pixel-8")], tmp_path / "b").rows
    assert row.error is None, row.error.message
    assert (row.variant.inputs[0].dtype, row.variant.parity.status) == ("int32", "checked")


def kinds(path):
    """List each layer of a file with the type of its weights."""
    from ai_edge_litert import schema_py_generated as schema

    types = {number: name for name, number in vars(schema.TensorType).items() if not name.startswith("_")}
    codes = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    tensors = model.subgraphs[0].tensors
    named = [(codes[model.operatorCodes[one.opcodeIndex].builtinCode], one) for one in model.subgraphs[0].operators]
    widened = {one.outputs[0]: one.inputs[0] for kind, one in named if kind == "DEQUANTIZE"}
    return [
        (kind, types[tensors[widened.get(one.inputs[1], one.inputs[1])].type])
        for kind, one in named
        if kind in litert_file.WEIGHTED
    ]


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight-only"])
def test_depthwise_layers_of_four_bits_are_stored_in_eight_not_left_in_float(tiny, tmp_path, scheme):
    model = with_plan(tiny, bits=4)
    model = dataclasses.replace(model, plan=msgspec.structs.replace(model.plan, scheme=scheme))
    artifact = write(model, tmp_path)
    assert kinds(tmp_path / artifact.main) == [
        ("CONV_2D", "INT4"), ("DEPTHWISE_CONV_2D", "INT8"), ("CONV_2D", "INT4"), ("FULLY_CONNECTED", "INT4"),
    ]  # fmt: skip
    assert any(
        note.startswith("1 depthwise layers are stored in 8 bits: LiteRT has no narrower kernel")
        for note in artifact.notes
    )
    assert artifact.operators["DEPTHWISE_CONV_2D"] == 1


def test_a_file_with_nothing_but_float_layers_is_no_answer_to_a_plan(tiny, tiny_int8, tmp_path):
    found = litert_file.read((tmp_path / write(tiny, tmp_path).main).read_bytes())
    assert found.note() == "4 of 4 layers keep float weights (2 CONV_2D, 1 DEPTHWISE_CONV_2D, 1 FULLY_CONNECTED)"
    with pytest.raises(ExportError, match="leaves every layer of tiny in float"):
        tflite._told(tiny_int8, {}, found)


def test_the_ranges_of_the_plan_are_those_of_the_file(tiny_int8, tmp_path):
    found = {name: Range(3 * limits.low, 3 * limits.high) for name, limits in tiny_int8.plan.activations.items()}
    wide = dataclasses.replace(tiny_int8, plan=msgspec.structs.replace(tiny_int8.plan, activations=found))
    scales = []
    for place, model in (("a", tiny_int8), ("b", wide)):
        (tmp_path / place).mkdir()
        artifact = write(model, tmp_path / place)
        assert "activation ranges: 8 from the plan, 1 measured on the data" in artifact.notes
        details_of = details(tmp_path / place / artifact.main).get_tensor_details()
        scales.append({d["name"]: d["quantization"][0] for d in details_of if d["dtype"] is np.int8})
    ratios = [scales[1][name] / scale for name, scale in scales[0].items() if scale]
    assert sum(ratio == pytest.approx(3, rel=1e-3) for ratio in ratios) >= 6
