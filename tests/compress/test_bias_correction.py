"""Bias correction: the mean output of every layer becomes what it was in float, and accuracy comes back."""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import evaluate
from edgekit.compress.layer import Layer
from edgekit.compress.layers import layers
from edgekit.compress.passes.bias_correction import BiasCorrection
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.rounding import planned_weight
from edgekit.compress.simulation import planned_network
from edgekit.compress.walking import walk
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")


UP = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "output_padding": (1, 0)}
BLEND = ("analytic", "empirical", "blended")


def corrected(model, **options):
    return BiasCorrection(**options).apply(model, silent)


def two_bits(model, **options):
    return Quantize(bits=2, weights="mse", **options).apply(model, silent)


def mean_differences(model, reference):
    """Return for each layer how far its mean planned output lies from the mean of the reference, at most."""
    wanted, found = {}, {}

    def note(into, values_of):
        def visit(layer, floats, planned):
            inputs = torch.cat(list(floats if into is wanted else planned))
            offsets = None if layer.offsets is None else torch.from_numpy(layer.offsets)
            made = layer.compute(inputs, torch.from_numpy(values_of(layer)), offsets)
            into[layer.weight] = made.movedim(1, 0).flatten(1).mean(1)

        return visit

    samples = model.data.calibration
    walk(reference, samples, note(wanted, lambda layer: layer.values), silent)
    walk(model, samples, note(found, lambda layer: planned_weight(layer, model.plan)), silent)
    return {name: float((found[name] - wanted[name]).abs().max()) for name in wanted}


def test_every_layer_has_the_mean_output_of_the_float_network_again():
    rough = two_bits(digits.model())
    before, after = (mean_differences(model, rough) for model in (rough, corrected(rough, method="empirical")))
    assert max(before.values()) > 0.3
    assert max(after.values()) < 1e-3
    assert len(after) == 7


def test_it_brings_a_two_bit_network_back_by_many_points():
    rough = two_bits(digits.model())
    validation = rough.data.validation
    result = corrected(rough, method="empirical")
    before, after = (evaluate.top1(planned_network(model), validation) for model in (rough, result))
    assert before < 0.3
    assert after > before + 0.4


def test_the_blend_lies_a_quarter_of_the_way_from_the_analytic_to_the_empirical_shift_in_the_second_layer():
    """The first layers' shifts are equal, so the second sees the same inputs as soon as the first is the same."""
    torch.manual_seed(0)
    samples = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    rough = two_bits(workload.from_module("two", module, Data(Split({"x": samples}))), activations="none")
    found = {m: [layer.offsets for layer in layers(corrected(rough, method=m))] for m in BLEND}
    analytic, empirical, blended = (found[method] for method in BLEND)
    np.testing.assert_allclose(analytic[0], empirical[0], atol=1e-6)
    assert np.abs(analytic[1] - empirical[1]).max() > 0.01
    np.testing.assert_allclose(blended[1], 0.75 * analytic[1] + 0.25 * empirical[1], atol=1e-6)


def test_the_analytic_way_takes_out_what_a_single_layer_rounds_away():
    """With one layer only there is nothing before it, so both ways have to find the same shift."""
    torch.manual_seed(0)
    samples = np.random.default_rng(0).uniform(0, 1, (32, 3, 6, 6)).astype(np.float32)
    model = workload.from_module("one", torch.nn.Conv2d(3, 5, 3, padding=1), Data(Split({"x": samples})))
    rough = two_bits(model, activations="none")
    truth = model.network.run({"x": samples})
    for method in ("analytic", "empirical", "blended"):
        made = planned_network(corrected(rough, method=method)).run({"x": samples})
        for name, values in made.items():
            np.testing.assert_allclose(values.mean((0, 2, 3)), truth[name].mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "weight", "geometry"),
    [
        ("conv", (6, 4, 3, 3), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        ("conv", (6, 2, 3, 3), {"stride": (1, 1), "padding": (0, 1, 1, 2), "dilation": (1, 1), "groups": 2}),
        ("conv", (4, 1, 5), {"stride": (3,), "padding": (2,), "dilation": (1,), "groups": 4}),
        ("conv", (2, 4, 2, 2, 2), {"stride": (1, 2, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1)}),
        (
            "transposed",
            (3, 4, 3, 3),
            UP,
        ),
        ("linear", (6, 4), {}),
    ],
)
def test_the_mean_output_follows_from_the_mean_input(kind, weight, geometry):
    random = np.random.default_rng(0)
    values = random.normal(size=weight).astype(np.float32)
    layer = Layer(weight="w", bias=None, node="y", source="x", kind=kind, values=values, offsets=None, **geometry)
    shape = (8, 5, 4) if kind == "linear" else (8, 4, *(9, 8, 7)[: len(weight) - 2])
    samples = random.normal(size=shape).astype(np.float32)
    made = layer.compute(torch.from_numpy(samples), torch.from_numpy(values), None).numpy()
    channels = made.ndim - 1 if kind == "linear" else 1
    wanted = np.moveaxis(made, channels, 0).reshape(made.shape[channels], -1).mean(1)
    np.testing.assert_allclose(layer.mean_output(samples.mean(0), values), wanted, atol=1e-5)


def test_an_onnx_file_is_quantized_and_corrected_without_pytorch():
    """Its import takes longer than both passes."""
    code = """
import sys
from pathlib import Path
import numpy as np
from edgekit import workload
from edgekit.compress.passes.bias_correction import BiasCorrection
from edgekit.compress.passes.quantize import Quantize
from edgekit.model import Data, Split
from edgekit.progress import silent
data = Data(Split(dict(np.load(sys.argv[2]))))
model = Quantize().apply(workload.load(sys.argv[1], None, data), silent)
made = BiasCorrection(method="analytic").apply(model, silent)
assert made.lineage[-1].measured["layers"] == 7, made.lineage
assert "torch" not in sys.modules
"""
    calibration = digits.example().data().calibration
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "c.npz"), **calibration.inputs)
        subprocess.run([sys.executable, "-c", code, str(digits.onnx_file()), f"{folder}/c.npz"], check=True)


def test_a_convolution_without_bias_gets_one_and_the_plan_stays():
    torch.manual_seed(0)
    samples = np.random.default_rng(0).uniform(0, 1, (8, 2, 5, 5)).astype(np.float32)
    module = torch.nn.Conv2d(2, 3, 3, bias=False)
    rough = two_bits(workload.from_module("bare", module, Data(Split({"x": samples}))))
    result = corrected(rough)
    assert module.bias is None, "the model that came in is untouched"
    assert result.network.module.bias is not None
    assert result.plan == rough.plan
    assert result.lineage[-1].measured["layers"] == 1


def test_an_onnx_file_is_corrected_like_its_pytorch_twin():
    model = workload.load(str(digits.onnx_file()), None, digits.example().data())
    result, twin = (corrected(two_bits(m)) for m in (model, digits.model()))
    for mine, theirs in zip(layers(result), layers(twin), strict=True):
        np.testing.assert_allclose(mine.offsets, theirs.offsets, atol=2e-3)


def test_a_matmul_that_can_hold_no_bias_is_left_alone_and_counted(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, tensor = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), "w")
    shapes = [helper.make_tensor_value_info(name, tensor, ["n", size]) for name, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", shapes[:1], shapes[1:], [weight])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    samples = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    rough = two_bits(workload.load(str(path), None, Data(Split({"x": samples}))))
    measured = corrected(rough).lineage[-1].measured
    assert (measured["layers"], measured["skipped_layers"]) == (0, 1)


def test_without_a_plan_or_data_it_says_what_to_do():
    with pytest.raises(CompressionError, match="no plan with integer weights") as caught:
        corrected(digits.model())
    assert "put quantize before" in caught.value.hint
    with pytest.raises(CompressionError, match="no calibration data"):
        corrected(replace(digits.quantized(), data=None))
