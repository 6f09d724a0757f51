"""The arithmetic of drift against SciPy, and its limits against chance itself."""

import math

import numpy as np
import pytest

from edgekit.runtime import divergence

stats = pytest.importorskip("scipy.stats")


def histogram(values, edges):
    return tuple(np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1).tolist())


def test_the_distance_is_scipys_where_the_bins_are_the_values():
    chance = np.random.default_rng(0)
    for _ in range(20):
        first, second = chance.integers(0, 9, 60), chance.integers(0, 7, 40)
        edges = np.arange(0, 9) + 0.5
        ours = divergence.kolmogorov_smirnov(histogram(first, edges), histogram(second, edges))
        assert ours == pytest.approx(stats.ks_2samp(first, second).statistic)


def test_the_limit_of_the_distance_is_that_of_the_asymptotic_distribution():
    limit = divergence.kolmogorov_smirnov_limit(256, 512, 1e-3)
    assert stats.kstwobign.sf(limit * math.sqrt(256 * 512 / 768)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("degrees", [2, 4, 7, 15, 31, 200])
@pytest.mark.parametrize("chance", [1e-2, 1e-4, 1e-6, 1e-8])
def test_quantiles_of_chi_square_are_never_below_scipys_and_near(degrees, chance):
    right = stats.chi2.isf(chance, degrees)
    assert 0.995 * right < divergence.chi_square(1 - chance, degrees) < 1.15 * right


def test_the_index_is_its_definition_less_its_mean():
    ours, theirs = (40, 30, 30), (25, 25, 50)
    p, q = ((np.array(c) + 0.5) / (100 + 1.5) for c in (ours, theirs))
    raw = float(((p - q) * np.log(p / q)).sum())
    assert divergence.stability_index(ours, theirs) == pytest.approx(raw - 2 * 0.02)
    assert divergence.stability_index((50, 50), (50, 50)) == 0
    assert divergence.stability_index((100, 0), (0, 100)) > 5


@pytest.mark.parametrize("size", [64, 512])
def test_limits_are_passed_by_chance_about_as_often_as_they_say(size):
    """20,000 pairs of samples of one distribution at a chance of 1 %: three standard deviations are 0.2 %."""
    chance = np.random.default_rng(size)
    distance = index = outside = 0
    rounds, wanted = 20_000, 0.01
    limits = {n: divergence.share_limit(n, size, 2, wanted) for n in (128, 256)}
    for number in range(rounds):
        data, window = chance.random(size), chance.random(128 if number % 2 else 256)
        edges = np.quantile(data, np.arange(1, 16) / 16)
        theirs, ours = histogram(data, edges), histogram(window, edges)
        limit = divergence.kolmogorov_smirnov_limit(len(window), size, wanted)
        distance += divergence.kolmogorov_smirnov(ours, theirs) > limit
        few = edges[3::4]
        theirs, ours = histogram(data, few), histogram(window, few)
        limit = divergence.stability_limit(len(few) + 1, len(window), size, wanted)
        index += divergence.stability_index(ours, theirs) > limit
        outside += np.mean((window < data.min()) | (window > data.max())) > limits[len(window)]
    assert 0.0005 < distance / rounds < wanted
    assert 0.003 < index / rounds < wanted + 0.003
    assert outside / rounds < wanted
