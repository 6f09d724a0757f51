"""Observers as laws: what each range covers and loses, on arrays alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekit.compress.observers import ranges
from edgekit.progress import silent

ARRAYS = arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e4, 1e4, width=32))


def observed(observer, *batches):
    def run(watch, progress):
        for done, batch in enumerate(batches):
            watch("x", batch)
            progress("calibrate", done, len(batches))

    return ranges(run, observer, silent)["x"]


def loss(values, limits):
    low, high = min(limits.low, 0.0), max(limits.high, 0.0)
    scale = (high - low) / 255 or 1.0
    rounded = np.round((np.clip(values, low, high) - low) / scale) * scale + low
    return float(((values - rounded) ** 2).mean())


@given(st.lists(ARRAYS, min_size=1, max_size=4))
def test_min_max_covers_every_value_and_no_more(batches):
    whole = np.concatenate(batches)
    limits = observed("minmax", *batches)
    assert (limits.low, limits.high) == (whole.min(), whole.max())


@given(ARRAYS, st.sampled_from(["percentile", "mse"]))
def test_robust_observers_stay_inside_the_extremes(values, observer):
    limits = observed(observer, values)
    slack = 1e-6 * float(np.abs(values).max()) + 1e-12
    assert values.min() - slack <= limits.low <= limits.high <= values.max() + slack or 0 <= limits.low <= limits.high


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


def test_mse_loses_less_than_min_max_on_a_long_tail():
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    assert loss(values, observed("mse", values)) < 0.8 * loss(values, observed("minmax", values))


def test_mse_is_no_worse_than_min_max_where_there_is_no_tail():
    values = np.random.default_rng(0).uniform(-3, 5, size=50_000).astype(np.float32)
    assert loss(values, observed("mse", values)) <= 1.05 * loss(values, observed("minmax", values))


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_batches_together_are_seen_as_one(observer):
    values = np.random.default_rng(1).normal(size=4000).astype(np.float32)
    assert observed(observer, values) == observed(observer, *np.split(values, 8))


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_an_empty_batch_says_nothing(observer):
    values = np.array([1.0, 2.0], np.float32)
    assert observed(observer, values, values[:0]) == observed(observer, values)
