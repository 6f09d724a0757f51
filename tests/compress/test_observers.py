"""Observers as laws: what each range covers and loses, on arrays alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekit.compress.observers import Histogram, ranges
from edgekit.progress import silent

PATIENT = settings(deadline=None)
"""A machine with other work to do pauses a test now and then."""
ARRAYS = arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e4, 1e4, width=32))


def observed(observer, *batches, **options):
    def run(watch, progress):
        for done, batch in enumerate(batches):
            watch("x", batch)
            progress("calibrate", done, len(batches))

    return ranges(run, observer, silent, **options)["x"]


def loss(values, limits):
    low, high = min(limits.low, 0.0), max(limits.high, 0.0)
    scale = (high - low) / 255 or 1.0
    rounded = np.round((np.clip(values, low, high) - low) / scale) * scale + low
    return float(((values - rounded) ** 2).mean())


@PATIENT
@given(st.lists(ARRAYS, min_size=1, max_size=4))
def test_min_max_covers_every_value_and_no_more(batches):
    whole = np.concatenate(batches)
    limits = observed("minmax", *batches)
    assert (limits.low, limits.high) == (whole.min(), whole.max())


@PATIENT
@given(ARRAYS, st.sampled_from(["average", "percentile", "entropy", "mse"]))
def test_robust_observers_stay_inside_the_extremes(values, observer):
    limits = observed(observer, values)
    slack = 1e-6 * float(np.abs(values).max()) + 1e-12
    assert values.min() - slack <= limits.low <= limits.high <= values.max() + slack or 0 <= limits.low <= limits.high


@PATIENT
@given(ARRAYS)
def test_the_percentile_keeps_what_it_promises(values):
    limits = observed("percentile", values)
    width = (float(values.max()) - float(values.min())) / 2048
    inside = (values >= limits.low - width - 1e-6) & (values <= limits.high + width + 1e-6)
    assert inside.mean() >= 0.9998


def test_the_percentile_cuts_as_much_as_it_promises_and_half_of_it_at_either_end():
    values = np.linspace(0.0, 1.0, 1_000_000, dtype=np.float32) ** 32  # dense near 0, thin near 1
    limits = observed("percentile", np.concatenate([values, -values]))
    cut = float(np.mean(values > limits.high)) / 2
    assert 0.00002 <= cut <= 0.00005
    assert limits.low == pytest.approx(-limits.high, abs=2 / 2048)


def test_the_percentile_is_an_option():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    wide, narrow = observed("percentile", values, percentile=99.9), observed("percentile", values, percentile=90.0)
    assert narrow.high == pytest.approx(1.645, abs=0.02)
    assert narrow.low == pytest.approx(-1.645, abs=0.02)
    assert wide.high == pytest.approx(3.29, abs=0.15)


def test_the_average_forgets_what_one_sample_shows_and_starts_without_a_bias():
    values = np.ones((50, 4), np.float32)
    values[:, 0] = -3
    for few in (values[:1], values):
        limits = observed("average", few)
        assert (limits.low, limits.high) == pytest.approx((-3, 1))
    values[7, 1] = 1000
    limits = observed("average", values)
    assert limits.low == pytest.approx(-3)
    assert 1 < limits.high < 30


def test_entropy_cuts_far_outliers_and_keeps_what_has_none():
    normal = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    far = np.concatenate([normal, np.float32([60, -80])])
    limits = observed("entropy", far)
    assert 3 < limits.high < 12
    assert -12 < limits.low < -3
    even = np.random.default_rng(0).uniform(0, 5, size=200_000).astype(np.float32)
    assert observed("entropy", even).high > 4.8
    assert observed("entropy", even).low >= 0


def test_mse_cuts_only_the_side_that_has_a_tail():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-10, 0, 1_000_000), [40.0]]).astype(np.float32)
    limits = observed("mse", values)
    assert limits.low == pytest.approx(-10, rel=0.05)
    assert limits.high < 20


@PATIENT
@given(st.lists(ARRAYS, min_size=1, max_size=4))
def test_a_histogram_grows_without_losing_or_moving_a_value(batches):
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    whole = np.concatenate(batches).astype(np.float64)
    counts, edges = histogram.bins()
    assert counts.sum() == whole.size
    assert (edges[0], edges[-1]) == (whole.min(), whole.max())
    if not histogram.is_point:
        below = np.array([(whole < edge).sum() for edge in edges[1:-1]])
        np.testing.assert_array_equal(np.cumsum(counts)[:-1], below)


def test_mse_loses_less_than_min_max_on_a_long_tail():
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    assert loss(values, observed("mse", values)) < 0.8 * loss(values, observed("minmax", values))


def test_mse_is_no_worse_than_min_max_where_there_is_no_tail():
    values = np.random.default_rng(0).uniform(-3, 5, size=50_000).astype(np.float32)
    assert loss(values, observed("mse", values)) <= 1.05 * loss(values, observed("minmax", values))


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "entropy", "mse"])
def test_batches_together_are_seen_as_one(observer):
    values = np.random.default_rng(1).normal(size=4000).astype(np.float32)
    assert observed(observer, values) == observed(observer, *np.split(values, 8))


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "entropy", "mse"])
def test_an_empty_batch_says_nothing(observer):
    values = np.array([1.0, 2.0], np.float32)
    assert observed(observer, values, values[:0]) == observed(observer, values)


def of_onnx_runtime(values, bins):
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method="entropy", symmetric=False, num_bins=bins, num_quantized_bins=128, percentile=99.99, scenario="same"
    )
    collector.collect({"x": values})
    low, high = collector.compute_collection_result()["x"][:2]
    return float(low), float(high)


@pytest.mark.parametrize("count", [2_000, 20_000, 200_000])
@pytest.mark.parametrize("shape", ["half-normal", "relu", "mostly zeros", "normal"])
def test_entropy_keeps_what_has_no_outliers_however_few_the_values_and_however_many_the_zeros(shape, count, capsys):
    values = np.random.default_rng(0).normal(size=count).astype(np.float32)
    shapes = {
        "half-normal": np.abs(values),
        "relu": np.maximum(values, 0),
        "mostly zeros": np.maximum(values - 1, 0),
        "normal": values,
    }
    values = shapes[shape]
    limits = observed("entropy", values)
    assert loss(values, limits) <= 2.2 * loss(values, observed("minmax", values))
    low, high = of_onnx_runtime(values, 128)
    capsys.readouterr()  # what the peer prints
    assert limits.high == pytest.approx(high, rel=0.15)
    assert limits.low == pytest.approx(low, rel=0.15, abs=0)


def test_entropy_of_a_relu_cuts_far_outliers_and_loses_nothing_of_the_rest(capsys):
    relu = np.maximum(np.random.default_rng(0).normal(size=200_000), 0).astype(np.float32)
    far = np.concatenate([relu, np.float32([20, 25, 30])])
    limits, (_, high) = observed("entropy", far), of_onnx_runtime(far, 2048)
    capsys.readouterr()  # what the peer prints
    assert limits.low == 0
    assert relu.max() <= limits.high < 2 * relu.max()
    assert high / 2 < limits.high < 2 * high
    assert loss(relu, limits) < 2 * loss(relu, observed("minmax", relu))
