"""From the values an activation took to the range that its integers cover. Knows no network and no format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgekit import grid
from edgekit.plan import Range

if TYPE_CHECKING:
    from edgekit.compress.calibration import Run
    from edgekit.progress import Progress
    from edgekit.tensors import Array

Observer = Literal["minmax", "percentile", "mse"]
BINS = 2048
KEPT = 0.9999
"""Share of the values that the percentile observer keeps, half of the rest cut at either end."""


def ranges(run: Run, observer: Observer, progress: Progress) -> dict[str, Range]:
    """Observe every activation of a run.

    ``minmax`` takes the extremes in one go. The others go twice, fill a histogram of 2,048 bins, and cut its ends:
    ``percentile`` keeps 99.99 % of the values; ``mse`` takes the cut that loses least when rounded to 8 bits
    (Krishnamoorthi 2018, section 3; Choukroun et al. 2019).
    """
    extremes = _extremes(run, progress)
    if observer == "minmax":
        return extremes
    cut = _percentile if observer == "percentile" else _least_error
    return {name: cut(counts, extremes[name]) for name, counts in _histograms(run, extremes, progress).items()}


def _extremes(run: Run, progress: Progress) -> dict[str, Range]:
    found: dict[str, Range] = {}

    def watch(name: str, values: Array) -> None:
        if values.size:
            seen = found.get(name, Range(float(values.flat[0]), float(values.flat[0])))
            found[name] = Range(min(seen.low, float(values.min())), max(seen.high, float(values.max())))

    run(watch, progress)
    return found


def _histograms(run: Run, extremes: dict[str, Range], progress: Progress) -> dict[str, Array]:
    import numpy as np

    counts: dict[str, Array] = {name: np.zeros(BINS, np.int64) for name in extremes}

    def watch(name: str, values: Array) -> None:
        limits = (extremes[name].low, extremes[name].high)
        if values.size and limits[0] < limits[1]:
            # float64: 2,048 bins between two neighbouring float32 values have no width in float32
            counts[name] += np.histogram(values.astype(np.float64), BINS, limits)[0]

    run(watch, progress)
    return counts


def _percentile(counts: Array, extremes: Range) -> Range:
    import numpy as np

    if extremes.low == extremes.high:
        return extremes
    edges = np.linspace(extremes.low, extremes.high, BINS + 1)
    share = np.cumsum(counts) / counts.sum()
    cut = (1 - KEPT) / 2
    low = edges[int(np.searchsorted(share, cut, side="right"))]
    high = edges[int(np.searchsorted(share, 1 - cut)) + 1]
    return Range(float(low), float(high))


def _least_error(counts: Array, extremes: Range) -> Range:
    import numpy as np

    if extremes.low == extremes.high:
        return extremes
    edges = np.linspace(extremes.low, extremes.high, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    shrunk = [Range(extremes.low * keep, extremes.high * keep) for keep in np.linspace(1.0, 0.3, 71)]
    best = min(shrunk, key=lambda r: float(counts @ (centres - _rounded(centres, r)) ** 2))
    return Range(float(best.low), float(best.high))


def _rounded(values: Array, limits: Range) -> Array:
    import numpy as np

    own = grid.activation_grid(limits)
    integers = np.clip(np.round(values / own.scale) + own.zero, own.lowest, own.highest)
    rounded: Array = (integers - own.zero) * own.scale
    return rounded
