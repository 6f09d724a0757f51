"""LiteRT: channel-last inputs described by ports, int8 inside and float outside, ranges that no average shrinks."""

import dataclasses

import msgspec
import numpy as np
import pytest
from fakes.exportable import tiny_model, with_plan

pytest.importorskip("litert_torch", reason="needs the export extra")

from edgekit import device_profiles, plugins, runtime, workload
from edgekit.compress import compress, recipe
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.errors import ExportError, UsageError
from edgekit.export import PACKAGE, export, litert_file, litert_recipe
from edgekit.export.quiet import silence
from edgekit.export.targets import tflite
from edgekit.model import Data, OnnxNetwork, Split
from edgekit.plan import QuantizationPlan, Range
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


def test_two_runs_give_the_same_bytes(tiny_int8, tmp_path):
    write(tiny_int8, tmp_path)
    first = (tmp_path / "model.tflite").read_bytes()
    write(tiny_int8, tmp_path)
    assert (tmp_path / "model.tflite").read_bytes() == first


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


def test_what_litert_changes_of_the_plan_is_noted(tmp_path):
    notes = write(with_plan(tiny_model(), granularity="tensor"), tmp_path).notes
    assert any("4 weights are per channel here" in note for note in notes)


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
    partly = Quantize(activations="none", bits=4, keep=("head.weight",)).apply(tiny, silent)
    with pytest.raises(ExportError, match=r"leaves 'head.weight' in float beside weights of 4 bits"):
        write(partly, tmp_path)
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
    assert any(note.startswith("1 depthwise layers of 4 bits are stored in 8") for note in artifact.notes)
    assert artifact.operators["DEPTHWISE_CONV_2D"] == 1


def test_layers_that_stay_in_float_are_told(tiny, tmp_path):
    found = litert_file.read((tmp_path / write(tiny, tmp_path).main).read_bytes())
    assert (found.integer, found.floats) == (0, ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D", "FULLY_CONNECTED"))
    half = dataclasses.replace(found, integer=4)
    assert half.note() == "4 of 8 layers keep float weights (2 CONV_2D, 1 DEPTHWISE_CONV_2D, 1 FULLY_CONNECTED)"
    with pytest.raises(ExportError, match="leaves every layer of tiny in float"):
        tflite._told(tiny, litert_recipe.Recipe("static", 8, shows_scales=True), found)


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
