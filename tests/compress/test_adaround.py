"""AdaRound: learned rounding errs less than rounding to nearest, behind the clamp that follows, on the plan's grid."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import grid, workload
from edgekit.compress.clamps import clamps
from edgekit.compress.layers import layers
from edgekit.compress.passes.adaround import Adaround
from edgekit.compress.passes.gptq import Gptq
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.rounding import canonical
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
nn = torch.nn
FAST = {"samples": 48, "rows": 1024, "iterations": 100, "batch": 256, "lr": 0.1}


@functools.cache
def planned(bits=3, **options):
    return Quantize(bits=bits, activations="none", weights="mse", **options).apply(digits.model(), silent)


@functools.cache
def refined():
    return Adaround(**FAST).apply(planned(), silent)


def only(outputs):
    (found,) = outputs.values()
    return found


def output_error(model, reference):
    inputs = reference.data.test.inputs
    return float(np.square(only(planned_network(model).run(inputs)) - only(reference.network.run(inputs))).mean())


def assert_on_grid(model):
    for layer in layers(model):
        rule = model.plan.weights[layer.weight]
        assert rule.scales
        np.testing.assert_array_equal(grid.rounded(layer.values, canonical(rule)), layer.values)


def test_three_bit_weights_answer_nearer_to_the_float_network_on_pictures_never_seen():
    assert output_error(refined(), digits.model()) < 0.5 * output_error(planned(), digits.model())
    measured = refined().lineage[-1].measured
    assert measured["error"] < 0.8 * measured["nearest_error"]
    assert refined().plan == planned().plan
    assert_on_grid(refined())


def clamped(bound):
    """One layer of inputs that move together, behind whose bias a ReLU cuts most outputs off."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 40), bound).eval()
    with torch.no_grad():
        network[0].bias.sub_(1.0)
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2600, 24)) + random.normal(size=(2600, 4)) @ random.normal(size=(4, 24))
    known, unseen = np.split(inputs.astype(np.float32), [2000])
    return workload.from_module("net", network, Data(Split({"x": known}), test=Split({"x": unseen})))


def test_learning_that_knows_the_clamp_behind_a_layer_beats_gptq_and_learning_that_does_not():
    model, free = clamped(nn.ReLU()), clamped(nn.Identity())
    start, other = (Quantize(bits=2, activations="none", weights="mse").apply(m, silent) for m in (model, free))
    learned, solved = (kind(samples=2000).apply(start, silent) for kind in (Adaround, Gptq))
    assert output_error(learned, model) < 0.95 * output_error(solved, model) < output_error(start, model)
    inputs = model.data.test.inputs
    blind = np.maximum(only(planned_network(Adaround(samples=2000).apply(other, silent)).run(inputs)), 0)
    assert output_error(learned, model) < np.square(blind - only(model.network.run(inputs))).mean()


def test_weights_that_never_decide_are_no_worse_than_rounded_to_nearest():
    start = planned()
    hasty = Adaround(**{**FAST, "iterations": 1}).apply(start, silent)
    assert_on_grid(hasty)
    assert hasty.lineage[-1].measured["error"] <= hasty.lineage[-1].measured["nearest_error"] * 1.001


@pytest.mark.parametrize(
    ("module", "bounds"),
    [
        (nn.ReLU(), (0.0, np.inf)),
        (nn.ReLU6(), (0.0, 6.0)),
        (nn.Hardtanh(), (-1.0, 1.0)),
        (nn.Hardtanh(-0.5, 2.0), (-0.5, 2.0)),
        (nn.Tanh(), None),
    ],
)
def test_bounds_are_those_of_the_clamp_behind_a_layer_in_both_kinds_of_networks(module, bounds, tmp_path):
    model = clamped(module)
    assert list(clamps(model).values()) == ([] if bounds is None else [bounds])
    path = tmp_path / "net.onnx"
    torch.onnx.export(workload.trace(model), f=path, dynamo=True, external_data=False, verbose=False)
    file = workload.load(str(path), None, None)
    assert list(clamps(file).values()) == ([] if bounds is None else [bounds])


@pytest.mark.parametrize(("plan", "options"), [({"granularity": "group", "group": 32}, {}), ({}, {"bias": False})])
def test_groups_and_kept_biases_stay_on_the_grid_and_beat_nearest(plan, options):
    start = planned(**plan)
    result = Adaround(**FAST, **options).apply(start, silent)
    assert_on_grid(result)
    assert output_error(result, digits.model()) < output_error(start, digits.model())
    kept = [np.array_equal(a.offsets, b.offsets) for a, b in zip(layers(start), layers(result), strict=True)]
    assert all(kept) == (not options.get("bias", True))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    again, other = (Adaround(**FAST, seed=seed).apply(planned(), silent) for seed in (0, 1))
    mine, same, different = ([layer.values.tobytes() for layer in layers(m)] for m in (refined(), again, other))
    assert mine == same
    assert mine != different


def test_an_onnx_file_becomes_nearly_what_its_pytorch_twin_becomes():
    file = workload.load(str(digits.onnx_file()), None, digits.example().data())
    start = Quantize(bits=3, activations="none", weights="mse").apply(file, silent)
    result = Adaround(**FAST).apply(start, silent)
    assert_on_grid(result)
    assert output_error(result, digits.model()) < 0.5 * output_error(planned(), digits.model())


def test_without_a_plan_or_data_it_says_what_to_do():
    with pytest.raises(CompressionError, match="no plan") as caught:
        Adaround().apply(digits.model(), silent)
    assert "put quantize before it" in caught.value.hint
    with pytest.raises(CompressionError, match="no calibration data"):
        Adaround().apply(replace(planned(), data=None), silent)
