"""From the values an activation took to the range that its integers cover. Knows no network and no format."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from edgekit import grid
from edgekit.plan import Range

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.compress.calibration import Run
    from edgekit.progress import Progress
    from edgekit.tensors import Array

Observer = Literal["minmax", "average", "percentile", "entropy", "mse"]
BINS = 4096
MOMENTUM = 0.99
KEPT = 99.99
CHUNK = 1 << 18
"""Values that are sorted into bins at once: what fits into a processor's cache."""


def ranges(run: Run, observer: Observer, progress: Progress, percentile: float = KEPT) -> dict[str, Range]:
    """Observe every activation in one go through the samples.

    ``minmax`` takes the extremes; ``average`` the moving average of the extremes of each sample, weight 0.01
    (Jacob et al. 2018, section 3.1). The others cut the ends off a histogram: ``percentile`` keeps so many percent of
    the values, half of the rest cut at either end (Wu et al. 2020, section 3.2); ``entropy`` takes the cut whose
    rounded distribution tells least apart from the true one (Migacz 2017); ``mse`` the cut that loses the least squared
    error when rounded to 8 bits (Nagel et al. 2021, section 3.1; Choukroun et al. 2019).
    """
    if observer in ("minmax", "average"):
        return _Extremes(run, progress, is_average=observer == "average").ranges
    cut: dict[str, Callable[[Histogram], Range]] = {
        "percentile": lambda histogram: _percentile(histogram, percentile),
        "entropy": _least_divergence,
        "mse": _least_error,
    }
    seen = _histograms(run, progress)
    return {name: h.extremes if h.is_point else cut[observer](h) for name, h in seen.items()}


class _Extremes:
    """The smallest and largest value of each activation, of all samples or averaged over them."""

    def __init__(self, run: Run, progress: Progress, *, is_average: bool) -> None:
        self._averages: dict[str, _Average] = {}
        self.ranges: dict[str, Range] = {}
        run(self._average if is_average else self._widen, progress)
        self.ranges |= {name: average.range() for name, average in self._averages.items()}

    def _widen(self, name: str, values: Array) -> None:
        if values.size:
            low, high = float(values.min()), float(values.max())
            seen = self.ranges.get(name)
            self.ranges[name] = Range(min(seen.low, low), max(seen.high, high)) if seen else Range(low, high)

    def _average(self, name: str, values: Array) -> None:
        if values.size:
            own = self._averages.setdefault(name, _Average())
            rows = values.reshape(len(values) if values.ndim else 1, -1)
            for low, high in zip(rows.min(axis=1), rows.max(axis=1), strict=True):
                own.add(float(low), float(high))


class _Average:
    """A moving average that starts without a bias towards its first value, as Adam's (Kingma and Ba 2015)."""

    def __init__(self) -> None:
        self.low = self.high = self.weight = 0.0

    def add(self, low: float, high: float) -> None:
        self.low += (1 - MOMENTUM) * (low - self.low)
        self.high += (1 - MOMENTUM) * (high - self.high)
        self.weight += (1 - MOMENTUM) * (1 - self.weight)

    def range(self) -> Range:
        return Range(self.low / self.weight, self.high / self.weight)


class Histogram:
    """Counts of values in bins whose width is a power of two, so that it grows without moving a value.

    However the values come in batches, the bins end up the same: 2,048 to 4,096 from the smallest to the largest.
    """

    def __init__(self) -> None:
        import numpy as np

        self._counts = np.zeros(BINS, np.int64)
        self._first = 0
        self._exponent = -200
        self.extremes = Range(math.inf, -math.inf)

    @property
    def is_point(self) -> bool:
        """Say whether all values were the same."""
        return self.extremes.low == self.extremes.high

    def add(self, values: Array) -> None:
        """Count float values."""
        import numpy as np

        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        self._grow(Range(min(low, self.extremes.low), max(high, self.extremes.high)))
        flat = values.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            scaled = np.ldexp(flat[start : start + CHUNK].astype(np.float64), -self._exponent)
            self._counts += np.bincount(np.floor(scaled).astype(np.int64) - self._first, minlength=BINS)

    def bins(self) -> tuple[Array, Array]:
        """Return the counts from the first to the last bin in use, and the edges of the bins inside the extremes."""
        import numpy as np

        last = _bin(self.extremes.high, self._exponent) - self._first
        edges = np.ldexp(np.arange(last + 2, dtype=np.float64) + self._first, self._exponent)
        edges[0], edges[-1] = self.extremes.low, self.extremes.high
        return self._counts[: last + 1], edges

    def _grow(self, extremes: Range) -> None:
        import numpy as np

        exponent = max(self._exponent, math.frexp(max(abs(extremes.low), abs(extremes.high)))[1] - 24, -149)
        while _bin(extremes.high, exponent) - _bin(extremes.low, exponent) >= BINS:
            exponent += 1
        first = _bin(extremes.low, exponent)
        used = np.flatnonzero(self._counts)
        moved = np.zeros(BINS, np.int64)
        if used.size:
            np.add.at(moved, ((used + self._first) >> (exponent - self._exponent)) - first, self._counts[used])
        self._counts, self._first, self._exponent, self.extremes = moved, first, exponent, extremes


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _histograms(run: Run, progress: Progress) -> dict[str, Histogram]:
    found: dict[str, Histogram] = {}

    def watch(name: str, values: Array) -> None:
        if values.size:
            found.setdefault(name, Histogram()).add(values)

    run(watch, progress)
    return found


def _percentile(histogram: Histogram, kept: float) -> Range:
    import numpy as np

    counts, edges = histogram.bins()
    share = np.cumsum(counts) / counts.sum()
    cut = (1 - kept / 100) / 2
    low = edges[int(np.searchsorted(share, cut, side="right"))]
    high = edges[min(int(np.searchsorted(share, 1 - cut)), len(counts) - 1) + 1]
    return Range(float(low), float(high))


def _least_error(histogram: Histogram) -> Range:
    """Shrink both ends together, then each alone."""
    import numpy as np

    counts, edges = histogram.bins()
    used = np.flatnonzero(counts)
    counts, centres = counts[used], ((edges[:-1] + edges[1:]) / 2)[used]

    def error(limits: Range) -> float:
        return float(counts @ (centres - _rounded(centres, limits)) ** 2)

    widest = histogram.extremes
    best = min((Range(widest.low * k, widest.high * k) for k in np.linspace(1.0, 0.3, 36)), key=error)
    shares = np.linspace(1.25, 0.1, 47)
    best = min((best, *(Range(max(best.low * k, widest.low), best.high) for k in shares)), key=error)
    best = min((best, *(Range(best.low, min(best.high * k, widest.high)) for k in shares)), key=error)
    return Range(float(best.low), float(best.high))


def _least_divergence(histogram: Histogram) -> Range:
    """Try narrower and narrower cuts around zero, none below a twentieth of the widest value."""
    import numpy as np

    counts, edges = histogram.bins()
    counts, centres = _without_zeros(counts, edges), (edges[:-1] + edges[1:]) / 2
    widest = histogram.extremes
    most = max(abs(widest.low), abs(widest.high))
    cuts = [Range(max(widest.low, -t), min(widest.high, t)) for t in np.linspace(1.0, 0.05, 96) * most]
    best = min((c for c in cuts if c.low < c.high), key=lambda c: _divergence(counts, centres, c), default=widest)
    return Range(float(best.low), float(best.high))


def _without_zeros(counts: Array, edges: Array) -> Array:
    """Give the bin that holds zero no more than its neighbours hold.

    Every cut rounds zero without an error. A bin of zeros, as a ReLU fills, would tell of the width of the bins
    around it alone, and the more zeros there are the narrower a cut would look best.
    """
    import numpy as np

    level = counts.copy()
    for zero in np.flatnonzero((edges[:-1] <= 0) & (edges[1:] > 0)):
        level[zero] = min(counts[zero], max(*counts[max(zero - 1, 0) : zero], *counts[zero + 1 : zero + 2], 0))
    return level


def _divergence(counts: Array, centres: Array, limits: Range) -> float:
    """Return the Kullback-Leibler divergence of the values, clipped, from what 256 integers tell of them.

    An integer tells only how many values it stands for: they spread evenly over its bins that hold any. What was
    clipped belongs to the true distribution and not to the rounded one, so that clipping costs. Counts of one even
    distribution differ by chance: what that adds on the average is taken off, half a value for each bin that an integer
    has beyond its first (Miller 1955), else few values would be cut as if their noise were a shape.
    """
    import numpy as np

    inside = (centres >= limits.low) & (centres <= limits.high)
    if not counts[inside].any():
        return math.inf
    kept = counts[inside].astype(np.float64)
    true = kept.copy()
    true[0] += counts[centres < limits.low].sum()
    true[-1] += counts[centres > limits.high].sum()
    own = grid.activation_grid(limits)
    integers = np.clip(np.round(centres[inside] / own.scale) + own.zero, own.lowest, own.highest).astype(np.int64)
    total = np.bincount(integers, kept, minlength=256)
    filled = np.bincount(integers, kept > 0, minlength=256)
    told = np.where(kept > 0, (total / np.maximum(filled, 1))[integers], 0.0)
    chance = np.maximum(filled - 1, 0).sum() / (2 * true.sum())
    true, told = true / true.sum(), told / told.sum()
    some = true > 0
    return float(np.sum(true[some] * np.log(true[some] / np.maximum(told[some], 1e-4 / len(kept)))) - chance)


def _rounded(values: Array, limits: Range) -> Array:
    import numpy as np

    own = grid.activation_grid(limits)
    integers = np.clip(np.round(values / own.scale) + own.zero, own.lowest, own.highest)
    rounded: Array = (integers - own.zero) * own.scale
    return rounded
