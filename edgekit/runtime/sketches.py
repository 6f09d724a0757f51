"""Counts what is drawn from a tensor's samples into the bins of its baseline. Bounded memory; judges nothing.

Keeps no input: a few numbers a sample until half a window is full, then their counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.baseline import Observed
    from edgekit.runtime.series import Drawn

HALF = 128
"""A window is two halves of so many samples."""
MARGIN = 0.1
"""Values may pass the extremes of the data by this share of their range."""


@dataclass(frozen=True)
class Window:
    """What was counted of a tensor: of so many samples, how many had values out of range, or NaN and infinity.

    ``counts`` are by series, of samples without NaN; ``sure`` is the sum of their confidences.
    """

    counts: tuple[tuple[int, ...], ...]
    samples: int = 0
    outside: int = 0
    non_finite: int = 0
    sure: float = 0.0

    @property
    def finite(self) -> int:
        """How many samples the series are of."""
        return self.samples - self.non_finite

    def __add__(self, other: Window) -> Window:
        pairs = zip(self.counts, other.counts, strict=True)
        return Window(
            tuple(tuple(a + b for a, b in zip(*pair, strict=True)) for pair in pairs),
            self.samples + other.samples,
            self.outside + other.outside,
            self.non_finite + other.non_finite,
            self.sure + other.sure,
        )


class Sketch:
    """Two halves of a window of one tensor: one that is counted, one that fills. The caller orders the calls."""

    def __init__(self, observed: Observed) -> None:
        import numpy as np

        self.observed = observed
        self._bounded = bool(observed.least)
        # Of columns the numbers are the values themselves.
        self._apart = len(observed.least) if observed.reading != "columns" else 0
        self._rows = np.empty((HALF, len(observed.series)))
        self._ends = np.empty((2, HALF, self._apart))
        self._filled = 0
        self._before = Window(tuple((0,) * len(one.counts) for one in observed.series))
        least, most = (np.array(bounds, np.float64) for bounds in (observed.least, observed.most))
        # A constant must not be out of range for its last digits, which differ from machine to machine.
        margin = MARGIN * (most - least) + 1e-5 * np.maximum(np.abs(least), np.abs(most))
        self._least, self._most = least - margin, most + margin

    def take(self, drawn: Drawn) -> None:
        """Keep the numbers of some samples; those that this half has no room for are left out."""
        here = slice(self._filled, min(HALF, self._filled + len(drawn.rows)))
        count = here.stop - here.start
        self._rows[here] = drawn.rows[:count]
        if self._apart:
            self._ends[0, here], self._ends[1, here] = drawn.least[:count], drawn.most[:count]
        self._filled = here.stop

    def turn(self) -> Window:
        """Return what this half and the one before counted, and begin the next."""
        import numpy as np

        rows = self._rows[: self._filled]
        least, most = self._ends[:, : self._filled] if self._apart else (rows, rows)
        finite = np.isfinite(rows).all(1)
        outside = ((least < self._least) | (most > self._most))[finite].any(1).sum() if self._bounded else 0
        rows = rows[finite]
        counts, sure = [], 0.0
        for number, one in enumerate(self.observed.series):
            places = np.searchsorted(one.edges, rows[:, number], side="left")
            counts.append(tuple(np.bincount(places, minlength=len(one.counts)).tolist()))
            if one.name == "confidence":
                sure = float(rows[:, number].sum())
        half = Window(tuple(counts), self._filled, int(outside), self._filled - len(rows), sure)
        window, self._before, self._filled = half + self._before, half, 0
        return window
