"""How sure a figure is, from the samples that it was made of. Knows no metric and no model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.tensors import Array

SURE = 1.959963984540054
"""Standard deviations that hold 95 % of a normal distribution."""

RESAMPLES = 1000


def wilson(hits: float, samples: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927), which also holds near 0 and 1."""
    share, square = hits / samples, SURE**2
    middle = (share + square / (2 * samples)) / (1 + square / samples)
    reach = SURE / (1 + square / samples) * math.sqrt(share * (1 - share) / samples + square / (4 * samples**2))
    return middle - reach if hits > 0 else 0.0, middle + reach if hits < samples else 1.0


def bootstrap(rows: Array, figure: Callable[[Array], float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of ``figure`` over seeded resamples of the rows (Efron 1979)."""
    import numpy as np

    random = np.random.default_rng(0)
    found = [figure(rows[random.integers(0, len(rows), len(rows))]) for _ in range(resamples)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
