"""How far two histograms lie apart, and how far they lie apart by chance. Pure arithmetic on counts.

Limits hold at a stated chance of a false alarm, so that small windows do not cry wolf.
"""

from __future__ import annotations

import math
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SMOOTHING = 0.5
"""Added to every bin (Jeffreys), so that an empty one does not make the index infinite."""


def kolmogorov_smirnov(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return the largest distance of the two distribution functions at the bins' edges, from 0 to 1.

    Between edges it may be larger, never at them: limits for whole samples hold for histograms too.
    """
    own, other = max(1, sum(ours)), max(1, sum(theirs))
    pairs = zip(accumulate(ours), accumulate(theirs), strict=True)
    return max(abs(a / own - b / other) for a, b in pairs)


def kolmogorov_smirnov_limit(ours: int, theirs: int, chance: float) -> float:
    """Return the distance that samples of these sizes from one distribution exceed with that chance.

    sqrt(-ln(chance / 2) / 2 * (1/n + 1/m)): the asymptotic distribution of Smirnov (1948), as Knuth, TAOCP 2, 3.3.1.
    """
    return math.sqrt(-math.log(chance / 2) / 2 * (1 / ours + 1 / theirs))


def stability_index(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return the population stability index, sum((p - q) ln(p / q)), less what chance alone adds; at least 0.

    Of one distribution it is (B - 1)(1/n + 1/m) on average for B bins (Yurdakul 2018), which is taken off.
    """
    own, other = (sum(counts) + SMOOTHING * len(counts) for counts in (ours, theirs))
    total = 0.0
    for ours_here, theirs_here in zip(ours, theirs, strict=True):
        p, q = (ours_here + SMOOTHING) / own, (theirs_here + SMOOTHING) / other
        total += (p - q) * math.log(p / q)
    return max(0.0, total - (len(ours) - 1) * _noise(sum(ours), sum(theirs)))


def stability_limit(bins: int, ours: int, theirs: int, chance: float) -> float:
    """Return what `stability_index` exceeds with that chance where nothing changed.

    The raw index over (1/n + 1/m) is distributed as chi-square with B - 1 degrees of freedom (Yurdakul 2018).
    """
    return max(0.0, chi_square(1 - chance, bins - 1) - (bins - 1)) * _noise(ours, theirs)


def share_limit(ours: int, theirs: int, bounds: int, chance: float) -> float:
    """Return the share of ``ours`` samples outside of the extremes of ``theirs`` that is exceeded with that chance.

    ``bounds`` extremes were taken. A new sample exceeds the largest of m with a chance that is Beta(1, m), so all of
    them together with at most a Gamma(bounds, 1/m), whose upper end is taken; how many of ours then do is binomial,
    bounded by Chernoff: exp(-n KL(share, chance of one)).
    """
    alone = min(0.5, chi_square(1 - chance / 2, 2 * bounds) / (2 * theirs))
    low, high = alone, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if ours * _relative_entropy(middle, alone) < -math.log(chance / 2):
            low = middle
        else:
            high = middle
    return high


def chi_square(probability: float, degrees: int) -> float:
    """Return a quantile of the chi-square distribution, by Wilson and Hilferty (1931)."""
    if degrees < 1:
        return 0.0
    step = 2 / (9 * degrees)
    quantile = 1 - step + NormalDist().inv_cdf(probability) * math.sqrt(step)
    return float(degrees * max(0.0, quantile) ** 3)


def _noise(ours: int, theirs: int) -> float:
    return 1 / max(1, ours) + 1 / max(1, theirs)


def _relative_entropy(share: float, chance: float) -> float:
    """Return the Kullback-Leibler divergence of two coins, 0 < ``chance`` <= ``share`` <= 1."""
    rest = (1 - share) * math.log((1 - share) / (1 - chance)) if share < 1 else 0.0
    return share * math.log(share / chance) + rest
