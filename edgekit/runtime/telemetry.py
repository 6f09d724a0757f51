"""What is counted of the requests to one model. Bounded memory; knows no HTTP and no clock."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgekit.tensors import Array

WINDOW = 1024
SMALL = 4096
BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the latency histogram in seconds."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts since the model began to serve; the percentiles are of its last ``WINDOW`` answers, in milliseconds.

    ``errors`` are the model's fault, ``refused`` the caller's (wrong inputs). ``recent_errors`` are of the last
    ``recent`` requests that were not refused; ``usual_p95_ms`` is of the model's first full window, 0 before.
    """

    digest: str
    requests: int = 0
    errors: int = 0
    refused: int = 0
    non_finite: int = 0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    usual_p95_ms: float = 0.0
    recent: int = 0
    recent_errors: int = 0
    by_kind: Mapping[str, int] = field(default_factory=dict)
    buckets: tuple[int, ...] = ()
    seconds: float = 0.0


class Histogram:
    """Counts of seconds by `BUCKETS`; the caller orders the calls."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class Telemetry:
    """Counts for one digest; safe to call from several threads."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self._lock = threading.Lock()
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._usual = 0.0
        self._failed: deque[bool] = deque(maxlen=WINDOW)
        self._times = Histogram()
        self._requests = self._errors = self._refused = self._non_finite = 0
        self._kinds: Counter[str] = Counter()

    def forget_latencies(self) -> None:
        """Begin the percentiles, and what is recent, anew; the counts go on."""
        with self._lock:
            self._window.clear()
            self._failed.clear()
            self._usual = 0.0

    def answered(self, seconds: float) -> None:
        """Count an answer and how long it took."""
        with self._lock:
            self._requests += 1
            self._window.append(seconds)
            self._failed.append(False)
            self._times.add(seconds)
            if not self._usual and len(self._window) == WINDOW:
                self._usual = percentile(sorted(self._window), 95)

    def failed(self, kind: str, *, by_caller: bool) -> None:
        """Count a request that ended in an error of that kind."""
        with self._lock:
            self._requests += 1
            self._kinds[kind] += 1
            if by_caller:
                self._refused += 1
            else:
                self._errors += 1
                self._failed.append(True)

    def saw_non_finite(self) -> None:
        """Count an answer that held NaN or infinity."""
        with self._lock:
            self._non_finite += 1

    def statistics(self) -> Statistics:
        """Return the counts as they stand."""
        with self._lock:
            ordered = sorted(self._window)
            return Statistics(
                digest=self.digest,
                requests=self._requests,
                errors=self._errors,
                refused=self._refused,
                non_finite=self._non_finite,
                p50_ms=1000 * percentile(ordered, 50),
                p95_ms=1000 * percentile(ordered, 95),
                p99_ms=1000 * percentile(ordered, 99),
                usual_p95_ms=1000 * self._usual,
                recent=len(self._failed),
                recent_errors=sum(self._failed),
                by_kind=dict(self._kinds),
                buckets=tuple(self._times.buckets),
                seconds=self._times.seconds,
            )


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Return the nearest rank: the least of sorted values that ``percent`` of all do not exceed; 0 for none."""
    if not ordered:
        return 0.0
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def are_finite(arrays: Iterable[Array]) -> bool:
    """Say whether no float among them is NaN or infinite."""
    return all(map(_is_finite, arrays))


def _is_finite(array: Array) -> bool:
    if array.dtype.kind != "f":
        return True
    import numpy as np

    # A sum is NaN or infinite if any part is, and cheap; it may also overflow, so a bad one is looked at closely.
    small = array.size <= SMALL and array.itemsize >= 4  # of squares: half the time, but more threads for large ones
    probe = np.vdot(array, array) if small else np.add.reduce(array, axis=None)
    return math.isfinite(probe) or bool(np.isfinite(array).all())
