"""How much a row of yes and no speaks against a share that was believed. Mathematics only.

The e-value of a row is the wealth of somebody who bets on each answer at odds that are fair where the share is the
believed one: a mixture of likelihood ratios (Robbins 1970, "Statistical Methods Related to the Law of the Iterated
Logarithm"; Howard, Ramdas, McAuliffe and Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence
sequences"). Where the share is the believed one or less, that wealth is a supermartingale, so it ever comes to
1/alpha with a probability of at most alpha, however often one looks (Ville 1939). The mean of e-values is one again,
whatever their dependence (Vovk and Wang 2021, "E-values: calibration, combination and applications").
"""

from __future__ import annotations

import math
from functools import lru_cache

POINTS = 16
HIGHEST = 0.999
OF_95_PERCENT = 1.6449


@lru_cache(maxsize=1 << 16)
def e_value(hits: int, tries: int, believed: float, rise: float) -> float:
    """Return the e-value of ``hits`` among ``tries`` against a share of at most ``believed``.

    Half of the wealth is bet on a share that is higher by ``rise``, the other half evenly on all from half of that
    rise on.
    """
    logs = [
        math.log(weight) + hits * math.log(share / believed) + (tries - hits) * math.log((1 - share) / (1 - believed))
        for share, weight in _bets(believed, rise)
    ]
    top = max(logs)
    return math.exp(min(700.0, top + math.log(sum(math.exp(one - top) for one in logs))))


@lru_cache(maxsize=256)
def _bets(believed: float, rise: float) -> tuple[tuple[float, float], ...]:
    first, low = min(HIGHEST, believed + rise), min(HIGHEST, believed + rise / 2)
    step = (HIGHEST - low) / POINTS
    return ((first, 0.5), *((low + step * (i + 0.5), 0.5 / POINTS) for i in range(POINTS)))


def upper_bound(hits: int, tries: int) -> float:
    """Return what a share is below with a confidence of 95 % (Wilson 1927); 1 where nothing is known."""
    if not tries:
        return 1.0
    z, share = OF_95_PERCENT, hits / tries
    spread = z * math.sqrt(share * (1 - share) / tries + z * z / (4 * tries * tries))
    return min(1.0, (share + z * z / (2 * tries) + spread) / (1 + z * z / tries))


def power(tries: int, share: float, believed: float, rise: float, *, bound: float) -> float:
    """Return the probability that the e-value comes to ``bound`` within so many tries, where the share is the true one.

    Exact: the distribution of the hits of rows that have not come there yet, one try after the other.
    """
    alive, caught = {0: 1.0}, 0.0
    for count in range(1, tries + 1):
        after: dict[int, float] = {}
        for hits, chance in alive.items():
            after[hits] = after.get(hits, 0.0) + chance * (1 - share)
            after[hits + 1] = after.get(hits + 1, 0.0) + chance * share
        over = [hits for hits in after if e_value(hits, count, believed, rise) >= bound]
        caught += sum(after.pop(hits) for hits in over)
        alive = {hits: chance for hits, chance in after.items() if chance > 1e-12}
    return caught
