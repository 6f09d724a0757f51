"""Holds live requests against the baseline of their bundle: windows, limits, alerts. Knows no server and no fleet."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgekit.runtime import divergence, series
from edgekit.runtime.sketches import HALF, Sketch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edgekit.baseline import Baseline, Observed, Series
    from edgekit.runtime.session import Session
    from edgekit.runtime.sketches import Window
    from edgekit.tensors import Array

Kind = Literal[
    "input-drift", "output-drift", "confidence", "class-mix", "out-of-range", "non-finite-input",
    "errors", "latency", "throttled",
]  # fmt: skip
FALSE_ALARM = 1e-6
"""The chance that a window of the same distribution raises any alert: all its tests share it (Bonferroni)."""
LEAST_DISTANCE, LEAST_INDEX, LEAST_OUTSIDE = 0.1, 0.25, 0.05
"""What is less is no alert, however sure: a KS distance, a PSI (0.25 is "significant", Siddiqi 2006), a share."""
MOST_OF_A_BATCH = 4
SHARE = 0.02
"""Of one core's time: after a look that took t seconds the next is due t / SHARE later."""


@dataclass(frozen=True)
class Alert:
    """What is not as it was: ``value`` is above ``limit``, and was at ``since`` (Unix seconds) first."""

    kind: Kind
    what: str
    value: float
    limit: float
    since: float


class Above(NamedTuple):
    """A value that is above its limit, and of what it is."""

    kind: Kind
    what: str
    value: float
    limit: float


class Finding(NamedTuple):
    """The last window of one tensor: its farthest series by KS and by PSI, shares of samples out of range, with NaN."""

    role: Literal["input", "output"]
    tensor: str
    distance: float
    stability: float
    outside: float
    non_finite: float
    confidence: float | None


@dataclass(frozen=True)
class Findings:
    """What the last window says; without a window there are no ``tensors``. ``samples`` were looked at in all."""

    samples: int = 0
    tensors: tuple[Finding, ...] = ()
    above: tuple[Above, ...] = ()


class Drift:
    """The watch over one model. Safe to call from several threads: one looks, the others pass by."""

    def __init__(self, baseline: Baseline, variant: str) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.findings = Findings()
        self._shifts = baseline.shifts.get(variant, {})
        self._lock = threading.Lock()
        self._due = float("-inf")
        self._filled = self._samples = 0
        self._sketches = [Sketch(observed) for observed in baseline.tensors]
        tests = sum(len(one.series) + bool(one.least) for one in baseline.tensors)
        self._chance = FALSE_ALARM / max(1, tests)

    def observe(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Look at one answered request, or pass by where looking would take more than its share of a core."""
        started = self.clock()
        if started < self._due or not self._lock.acquire(blocking=False):
            return
        try:
            self._look(session, inputs, outputs)
            if self._filled >= HALF:
                self._judge()
        finally:
            ended = self.clock()
            self._due = ended + (ended - started) / SHARE
            self._lock.release()

    def _look(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        import numpy as np

        count = len(next(iter(inputs.values())))
        if count > 1:
            step = -(-count // MOST_OF_A_BATCH)
            inputs, outputs = (_every(step, arrays, count) for arrays in (inputs, outputs))
            count = len(range(0, count, step))
        for sketch in self._sketches:
            one = sketch.observed
            array = (inputs if one.role == "input" else outputs)[one.tensor]
            if array.size and len(array) == count:
                with np.errstate(all="ignore"):  # NaN and infinity are counted, not complained of
                    drawn = series.draw(one, session.contract, inputs, outputs)
                sketch.take(drawn)
        self._filled += count
        self._samples += count

    def _judge(self) -> None:
        self._filled = 0
        findings, above = [], []
        for sketch in self._sketches:
            window = sketch.turn()
            if window.samples:
                findings.append(_finding(sketch.observed, window))
                above += _worst(_above(sketch.observed, window, self._shifts, self._chance))
        self.findings = Findings(self._samples, tuple(findings), tuple(above))


def _every(step: int, arrays: Mapping[str, Array], count: int) -> dict[str, Array]:
    """Take some samples of a batch: those of one caller may hang together, and cost as much as any."""
    return {name: a[::step] if a.ndim and len(a) == count else a for name, a in arrays.items()}


def _finding(observed: Observed, window: Window) -> Finding:
    pairs = [
        (one, counts) for one, counts in zip(observed.series, window.counts, strict=True) if one.edges and window.finite
    ]
    ordered = [divergence.kolmogorov_smirnov(counts, one.counts) for one, counts in pairs if not one.classes]
    indices = [divergence.stability_index(counts, one.counts) for one, counts in pairs]
    has_confidence = window.finite and any(one.name == "confidence" for one in observed.series)
    return Finding(
        observed.role,
        observed.tensor,
        max(ordered, default=0.0),
        max(indices, default=0.0),
        window.outside / window.samples,
        window.non_finite / window.samples,
        window.sure / window.finite if has_confidence else None,
    )


def _above(observed: Observed, window: Window, shifts: Mapping[str, float], chance: float) -> Iterator[Above]:
    """Compare a window with the baseline; limits widen where there are few samples, or rounding moved the answers."""
    tensor = observed.tensor
    if observed.role == "input" and window.non_finite:
        yield Above("non-finite-input", tensor, window.non_finite / window.samples, 0.0)
    if not window.finite:
        return
    for one, counts in zip(observed.series, window.counts, strict=True):
        ours, theirs, what = window.finite, one.samples, f"{tensor}: {one.name}"
        if one.classes:
            value = divergence.stability_index(counts, one.counts)
            limit = max(LEAST_INDEX, divergence.stability_limit(len(counts), ours, theirs, chance))
        else:
            value = divergence.kolmogorov_smirnov(counts, one.counts)
            limit = max(LEAST_DISTANCE, divergence.kolmogorov_smirnov_limit(ours, theirs, chance))
        if value > limit + shifts.get(what, 0.0):
            yield Above(_kind(observed, one), what, value, limit + shifts.get(what, 0.0))
    if observed.least:
        share = window.outside / window.finite
        theirs = observed.series[0].samples
        limit = max(LEAST_OUTSIDE, divergence.share_limit(window.finite, theirs, 2 * len(observed.least), chance))
        if share > limit:
            yield Above("out-of-range", tensor, share, limit)


def _kind(observed: Observed, one: Series) -> Kind:
    if observed.role == "input":
        return "input-drift"
    if one.classes:
        return "class-mix"
    return "confidence" if one.name == "confidence" else "output-drift"


def _worst(found: Iterator[Above]) -> list[Above]:
    """Keep of each kind the one that is farthest above its limit."""
    worst: dict[Kind, Above] = {}
    for one in found:
        if one.kind not in worst or one.value - one.limit > worst[one.kind].value - worst[one.kind].limit:
            worst[one.kind] = one
    return list(worst.values())
