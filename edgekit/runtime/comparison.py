"""Two models on the same requests: how often both answer alike. Knows no HTTP and not who serves.

What is alike depends on the kind: detectors see the same kind of object best, classifiers have their largest score in
the same place, vectors point the same way, one number is near the other one. Answers in text are not compared.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError, HealthError
from edgekit.runtime.session import Session
from edgekit.runtime.telemetry import are_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.runtime.session import TextSession
    from edgekit.tensors import Array

    Answered = tuple[Session, Mapping[str, Array]]

log = logging.getLogger(__name__)

MAX_PENDING = 8
ALIKE_COSINE = 0.95
"""Two vectors with a cosine from here on are alike: rounding an encoder to int8 leaves 0.98 and more."""
ALIKE_SHARE = 0.05
"""Two numbers are alike that differ by at most this share of the larger one."""


@dataclass(frozen=True)
class Agreement:
    """How often the old and the new model answered alike: ``same`` of ``samples``.

    ``skipped`` requests were not compared: the other model was still busy, or ``failed`` on them, as by NaN.
    """

    samples: int = 0
    same: int = 0
    skipped: int = 0
    failed: int = 0

    @property
    def share(self) -> float:
        """From 0 to 1; 1 where nothing was compared."""
        return self.same / self.samples if self.samples else 1.0


class Comparison:
    """Runs another model on live requests in one thread of its own, never more than a few behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = self._samples = self._same = self._skipped = self._failed = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def compare(self, answered: Answered, other: Session | TextSession, inputs: Mapping[str, Array]) -> None:
        """Queue one request that a model has answered; skip it where the other cannot keep up."""
        with self._lock:
            if self._pending >= MAX_PENDING:
                self._skipped += 1
                return
            self._pending += 1
        try:
            self._thread.submit(self._compare, (answered[0], dict(answered[1])), other, dict(inputs))
        except RuntimeError:  # the comparison ended in this moment
            with self._lock:
                self._pending -= 1

    def agreement(self) -> Agreement:
        """Return the counts as they stand."""
        with self._lock:
            return Agreement(self._samples, self._same, self._skipped, self._failed)

    def settled(self, seconds: float) -> Agreement:
        """Return the counts with all that is queued by now, unless that takes longer than so many seconds."""
        with contextlib.suppress(RuntimeError, TimeoutError):  # the comparison ended in this moment, or lags
            self._thread.submit(int).result(seconds)
        return self.agreement()

    def finish(self) -> Agreement:
        """Compare what is queued, and end."""
        self._thread.shutdown(wait=True)
        return self.agreement()

    def _compare(self, answered: Answered, other: Session | TextSession, inputs: Mapping[str, Array]) -> None:
        samples, same, skipped, failed = 0, 0, 1, 1
        try:
            if isinstance(other, Session):
                samples, same = _same((other, _sound(other.run(inputs), inputs)), answered, inputs)
                skipped = 0
            failed = 0
        except EdgekitError:
            log.info("a request was not compared", exc_info=True)
        finally:  # whatever an engine raises: the next is compared
            with self._lock:
                self._pending -= 1
                self._samples += samples
                self._same += same
                self._skipped += skipped
                self._failed += failed


def _sound(outputs: dict[str, Array], inputs: Mapping[str, Array]) -> dict[str, Array]:
    if not are_finite(outputs.values()) and are_finite(inputs.values()):
        raise HealthError("the other model answered with NaN or infinity")
    return outputs


def _same(one: Answered, other: Answered, inputs: Mapping[str, Array]) -> tuple[int, int]:
    """Count the samples, and those on which both answer alike."""
    contracts = [session.contract for session, _ in (one, other)]
    if all(contract.detection for contract in contracts):
        return _same_objects(one, other)
    if all(contract.embedding and contract.text for contract in contracts):
        return _same_directions(*(session.vectors(inputs, outputs) for session, outputs in (one, other)))
    labelled = contracts[1].postprocess
    name = labelled.output if labelled else next(iter(other[1]))
    return _same_choices(one[1].get(name), other[1][name])


def _same_objects(one: Answered, other: Answered) -> tuple[int, int]:
    """Detectors agree where they see the same kind of object best, each by its own manifest, or both none."""
    best = [
        [objects[0].label if objects else None for objects in session.objects(outputs)]
        for session, outputs in (one, other)
    ]
    return len(best[1]), sum(before == now for before, now in zip(*best, strict=False))


def _same_directions(one: Array, other: Array) -> tuple[int, int]:
    import numpy as np

    if one.shape != other.shape:
        return len(other), 0
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return len(other), int(((one * other).sum(1) >= ALIKE_COSINE * lengths).sum())


def _same_choices(one: Array | None, other: Array) -> tuple[int, int]:
    """Count the samples, and those on which both have their largest score in the same place.

    One number a sample has but one place: it is compared itself. What is no number agrees with nothing but its like.
    """
    import numpy as np

    count = len(other) if other.ndim else 1
    if one is None or one.shape != other.shape or not other.size:
        return count, 0
    ours, theirs = (np.asarray(array, np.float64).reshape(count, -1) for array in (other, one))
    sound = [np.isfinite(rows).all(1) for rows in (ours, theirs)]
    if ours.shape[1] > 1:
        alike = ours.argmax(1) == theirs.argmax(1)
    else:
        with np.errstate(invalid="ignore"):  # infinity less infinity
            near = np.abs(ours - theirs) <= ALIKE_SHARE * np.maximum(np.abs(ours), np.abs(theirs))
        alike = near[:, 0] | ~sound[0]
    return count, int((alike & (sound[0] == sound[1])).sum())
