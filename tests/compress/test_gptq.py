"""GPTQ: less error in each layer's output than rounding to nearest, always on the plan's grid."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import grid, workload
from edgekit.compress.evaluate import top1
from edgekit.compress.layers import layers
from edgekit.compress.passes.gptq import Gptq
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.rounding import canonical
from edgekit.compress.rows import some_rows
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
nn = torch.nn
FAST = {"samples": 48, "rows": 1024}


@functools.cache
def planned(bits=3, **options):
    return Quantize(bits=bits, activations="none", weights="mse", **options).apply(digits.model(), silent)


@functools.cache
def refined():
    return Gptq(**FAST).apply(planned(), silent)


def output_error(model, reference):
    images = reference.data.test.inputs
    found = planned_network(model).run(images)["scores"]
    return float(np.square(found - reference.network.run(images)["scores"]).mean())


def assert_on_grid(model):
    for layer in layers(model):
        rule = model.plan.weights[layer.weight]
        assert rule.scales
        np.testing.assert_array_equal(grid.rounded(layer.values, canonical(rule)), layer.values)


def test_three_bit_weights_answer_nearer_to_the_float_network_on_pictures_never_seen():
    nearest, ours = output_error(planned(), digits.model()), output_error(refined(), digits.model())
    assert ours < 0.5 * nearest
    test = digits.model().data.test
    assert top1(planned_network(refined()), test) > top1(planned_network(planned()), test) - 0.005
    measured = refined().lineage[-1].measured
    assert measured["error"] < 0.7 * measured["nearest_error"]
    assert measured["layers"] == len(refined().plan.weights)


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ({}, {"sweeps": 2}),
        ({"granularity": "group", "group": 32}, {}),
        ({"granularity": "tensor"}, {"order": "stored", "bias": False}),
        ({"bits": 4}, {"asymmetric": False}),
    ],
)
def test_every_way_leaves_weights_on_the_grid_and_beats_nearest(plan, options):
    start = planned(**plan)
    result = Gptq(**FAST, **options).apply(start, silent)
    assert_on_grid(result)
    assert result.plan.precision == start.plan.precision
    assert output_error(result, digits.model()) < output_error(start, digits.model())


def test_the_plan_keeps_its_scales_unless_they_are_to_be_fitted():
    fitted = Gptq(**FAST, scales="fit", sweeps=1).apply(planned(), silent)
    assert refined().plan == planned().plan
    assert fitted.plan != planned().plan
    assert fitted.plan.activations == planned().plan.activations
    assert fitted.lineage[-1].measured["error"] < refined().lineage[-1].measured["error"]
    assert_on_grid(fitted)


def test_sweeps_never_raise_the_error_that_they_minimize():
    errors = [
        Gptq(**FAST, sweeps=n, asymmetric=False).apply(planned(), silent).lineage[-1].measured["error"]
        for n in (0, 1, 4)
    ]
    assert errors[0] > errors[1] > errors[2] * 0.999


def mixed():
    """Depthwise and grouped convolutions, one dimension, a transposed one, no bias, and a channel that is dead."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.Conv2d(6, 12, 3, groups=6, dilation=2, padding=(1, 2), bias=False),
        nn.Conv2d(12, 8, 1, groups=2),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(2),
        nn.Conv1d(4, 4, 3),
        nn.Linear(30, 5),
    )
    images = np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)
    images[:, 1] = 0
    return workload.from_module("mixed", network.eval(), Data(Split({"x": images})))


def only(outputs):
    (found,) = outputs.values()
    return found


def test_all_kinds_of_convolutions_are_solved_and_those_without_a_matrix_are_counted():
    model = Quantize(bits=4, activations="none").apply(mixed(), silent)
    result = Gptq(**FAST).apply(model, silent)
    assert_on_grid(result)
    assert result.lineage[-1].measured["skipped_layers"] == 1
    inputs = model.data.calibration.inputs
    truth = only(model.network.run(inputs))
    nearest, ours = (np.square(only(planned_network(m).run(inputs)) - truth).mean() for m in (model, result))
    assert ours < 0.5 * nearest


def test_rows_are_rows_of_the_laid_out_matrix_and_the_same_in_both_worlds():
    for layer in (found for found in layers(mixed()) if found.kind != "transposed"):
        channels = layer.values.shape[1] * layer.groups
        size = {2: (4, channels), 3: (4, channels, 10), 4: (4, channels, 7, 6)}[layer.values.ndim]
        batch = torch.randn(size)
        rows = some_rows(layer, [batch], [batch + 1], 40, seed=0)
        everything = {tuple(row.tolist()) for row in layer.columns(batch).transpose(0, 1).flatten(1)}
        drawn = rows.floats.transpose(0, 1).flatten(1)
        assert 4 <= len(drawn) <= 40
        assert all(tuple(row.tolist()) in everything for row in drawn)
        inside = rows.planned - rows.floats
        assert bool(((inside - 1).abs() < 1e-5).logical_or(rows.floats == 0).all())


def test_the_same_seed_gives_the_same_bytes():
    again = Gptq(**FAST).apply(planned(), silent)
    assert again.plan == refined().plan
    for one, other in zip(layers(again), layers(refined()), strict=True):
        assert one.values.tobytes() == other.values.tobytes()


def test_the_model_that_came_in_is_untouched():
    start = planned()
    before = {layer.weight: layer.values.copy() for layer in layers(start)}
    Gptq(**FAST).apply(start, silent)
    for layer in layers(start):
        np.testing.assert_array_equal(layer.values, before[layer.weight])


def test_an_onnx_file_becomes_what_its_pytorch_twin_becomes():
    file = workload.load(str(digits.onnx_file()), None, digits.example().data())
    start = Quantize(bits=3, activations="none", weights="mse").apply(file, silent)
    result = Gptq(**FAST).apply(start, silent)
    assert_on_grid(result)
    images = digits.model().data.test.inputs
    mine, twin = (planned_network(m).run(images)["scores"] for m in (result, refined()))
    apart, lost = np.square(mine - twin).mean(), output_error(planned(), digits.model())
    assert apart < 0.2 * lost
    assert output_error(result, digits.model()) < 0.5 * lost


def test_static_activations_are_taken_as_planned():
    start = Quantize(bits=4).apply(digits.model(), silent)
    result = Gptq(**FAST).apply(start, silent)
    assert result.plan.activations == start.plan.activations
    assert output_error(result, digits.model()) < output_error(start, digits.model())


def test_without_a_plan_or_data_it_says_what_to_do():
    with pytest.raises(CompressionError, match="no plan") as caught:
        Gptq().apply(digits.model(), silent)
    assert "put quantize before it" in caught.value.hint
    with pytest.raises(CompressionError, match="no calibration data"):
        Gptq().apply(replace(planned(), data=None), silent)
