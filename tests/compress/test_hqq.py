"""HQQ: zero points and scales that leave less of the l_p error than symmetric ones, without data."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import grid, workload
from edgekit.compress.layers import layers
from edgekit.compress.passes.hqq import Hqq
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.rounding import canonical
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.plan import WeightRule
from edgekit.progress import silent

pytest.importorskip("torch")
GROUPS = {"granularity": "group", "group": 32}


@functools.cache
def planned(bits=3, **options):
    return Quantize(bits=bits, activations="none", **options).apply(digits.model(), silent)


def norm(values, rule, p=0.7):
    return float((np.abs(values - grid.rounded(values, rule)).astype(np.float64) ** p).sum())


@pytest.mark.parametrize("plan", [GROUPS, {}, {"granularity": "tensor"}])
def test_weights_lie_on_a_grid_with_zeros_that_loses_less_than_the_symmetric_one(plan):
    start = planned(**plan)
    result = Hqq().apply(replace(start, data=None), silent)
    floats = {layer.weight: layer.values for layer in layers(start)}
    for layer in layers(result):
        rule, before = (canonical(m.plan.weights[layer.weight]) for m in (result, start))
        assert len(rule.zeros) == len(rule.scales)
        zeros = np.frombuffer(rule.zeros, "<i4")
        assert zeros.min() >= 0
        assert zeros.max() <= 7
        np.testing.assert_array_equal(grid.rounded(layer.values, rule), layer.values)
        assert norm(floats[layer.weight], rule) <= norm(floats[layer.weight], before) * 1.001
    assert result.lineage[-1].measured["norm_ratio"] < 0.9


def test_the_network_answers_nearer_to_the_float_one():
    images = digits.model().data.test.inputs
    truth = digits.model().network.run(images)["scores"]
    start = planned(bits=4, weights="mse", **GROUPS)
    nearest, ours = (
        np.square(planned_network(m).run(images)["scores"] - truth).mean() for m in (start, Hqq().apply(start, silent))
    )
    assert ours < 0.7 * nearest


def test_weights_that_are_all_above_zero_need_no_integers_below_it():
    values = np.random.default_rng(0).uniform(1, 2, (4, 64)).astype(np.float32)
    rule = WeightRule(bits=4)
    found = Hqq().solved(values, rule)
    assert norm(values, found) < 0.75 * norm(values, rule)


def test_an_outlier_does_not_widen_the_steps_of_all_others():
    values = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32)
    values[0, 7] = 40
    rule = WeightRule(bits=4)
    error = np.abs(values - grid.rounded(values, Hqq(p=0.5).solved(values, rule)))
    widest = np.abs(values - grid.rounded(values, rule))
    assert np.median(error) < 0.5 * np.median(widest)


def test_a_channel_of_zeros_stays_zero():
    values = np.zeros((2, 40), np.float32)
    rule = Hqq().solved(values, WeightRule(bits=4, granularity="group", group=32))
    np.testing.assert_array_equal(grid.rounded(values, rule), values)


def test_an_onnx_file_becomes_what_its_pytorch_twin_becomes():
    file = workload.load(str(digits.onnx_file()), None, digits.example().data())
    mine = Hqq().apply(Quantize(bits=3, activations="none", **GROUPS).apply(file, silent), silent)
    twin = Hqq().apply(planned(**GROUPS), silent)
    images = digits.model().data.test.inputs
    first, second = (planned_network(m).run(images)["scores"] for m in (mine, twin))
    np.testing.assert_allclose(first, second, atol=0.02 * np.abs(first).max())


def test_without_a_plan_it_says_what_to_do():
    with pytest.raises(CompressionError, match="no plan") as caught:
        Hqq().apply(digits.model(), silent)
    assert "put quantize before it" in caught.value.hint
