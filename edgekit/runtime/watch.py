"""What a host does with each answered request beside answering it, and what it raises an alert about.

Knows no HTTP and no update channel. Nothing here may fail a request.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, get_args

from edgekit.runtime import sensors
from edgekit.runtime.drift import Above, Alert, Drift, Findings, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgekit.runtime.decisions import DecisionLog
    from edgekit.runtime.sampling import Samples
    from edgekit.runtime.session import Session, TextSession
    from edgekit.runtime.telemetry import Statistics
    from edgekit.tensors import Array

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_REMEMBERED = 16
ERROR_SHARE, ENOUGH = 0.05, 50
"""Of at least so many recent requests, so many may fail by the model's fault."""
SLOWER = 2.0
"""The 95th percentile may be so many times that of the model's first full window."""


class Watch:
    """Looks at every answered request. Safe to call from several threads; several hosts may share one.

    ``decisions``: where each answer is logged, if anywhere; ``samples``: where some raw inputs are kept, if anywhere.
    """

    def __init__(self, decisions: DecisionLog | None = None, samples: Samples | None = None) -> None:
        self.decisions = decisions
        self.samples = samples
        self._lock = threading.Lock()
        self._drifts: OrderedDict[str, Drift] = OrderedDict()
        self._since: dict[tuple[str, Kind, str], float] = {}

    def observe(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Look at a request that the session has answered."""
        baseline = session.contract.baseline
        if baseline is not None:
            drift = self._drifts.get(session.digest) or self._begin(
                session.digest, Drift(baseline, session.variant.name)
            )
            drift.observe(session, inputs, outputs)
        if self.decisions is not None:
            self.decisions.note(session, inputs, outputs)
        if self.samples is not None:
            self.samples.consider(session, inputs, self.findings(session.digest).above)

    def said(self, session: TextSession, asked: bytes, text: str) -> None:
        """Look at what a language model has answered to a request's body."""
        if self.decisions is not None:
            self.decisions.note_text(session, asked, text)

    def close(self) -> None:
        """Write what is to be written; requests that are answered later leave no trace."""
        for one in (self.decisions, self.samples):
            if one is not None:
                one.close()

    def findings(self, digest: str) -> Findings:
        """Return what the last window of a bundle's requests says."""
        drift = self._drifts.get(digest)
        return drift.findings if drift else Findings()

    def alerts(self, counted: Statistics) -> tuple[Alert, ...]:
        """Return what is not as it was with a bundle and the device, given what was counted of its requests."""
        throttled = sensors.read().throttled
        above = [*self.findings(counted.digest).above, *_of_service(counted, throttled=bool(throttled))]
        now = time.time()
        with self._lock:
            before, digest = self._since, counted.digest
            others = {key: at for key, at in before.items() if key[0] != digest and key[0] in self._drifts}
            mine = {(digest, one.kind, one.what): before.get((digest, one.kind, one.what), now) for one in above}
            self._since = {**others, **mine}
        return tuple(Alert(*one, since=mine[digest, one.kind, one.what]) for one in above)

    def _begin(self, digest: str, drift: Drift) -> Drift:
        with self._lock:
            drift = self._drifts.setdefault(digest, drift)
            while len(self._drifts) > MAX_REMEMBERED:
                self._drifts.popitem(last=False)
            return drift


def _of_service(counted: Statistics, *, throttled: bool) -> Iterator[Above]:
    share = counted.recent_errors / max(1, counted.recent)
    if counted.recent >= ENOUGH and share > ERROR_SHARE:
        yield Above("errors", f"the last {counted.recent} requests", share, ERROR_SHARE)
    limit = SLOWER * counted.usual_p95_ms
    if limit and counted.p95_ms > limit:
        yield Above("latency", "95th percentile in ms", counted.p95_ms, limit)
    if throttled:
        yield Above("throttled", "the firmware slows the device", 1.0, 0.0)
