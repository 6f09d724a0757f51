"""Two models on the same requests: how often both choose alike. Knows no HTTP and not who serves."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError
from edgekit.runtime.session import Session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.runtime.session import TextSession
    from edgekit.tensors import Array

    Answered = tuple[Session, Mapping[str, Array]]

log = logging.getLogger(__name__)

MAX_PENDING = 8


@dataclass(frozen=True)
class Agreement:
    """How often the old and the new model chose the same class: ``same`` of ``samples``.

    ``skipped`` requests were not compared: the other model was still busy, or failed on them.
    """

    samples: int = 0
    same: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        """From 0 to 1; 1 where nothing was compared."""
        return self.same / self.samples if self.samples else 1.0


class Comparison:
    """Runs another model on live requests in one thread of its own, never more than a few behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = self._samples = self._same = self._skipped = 0
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
            return Agreement(self._samples, self._same, self._skipped)

    def finish(self) -> Agreement:
        """Compare what is queued, and end."""
        self._thread.shutdown(wait=True)
        return self.agreement()

    def _compare(self, answered: Answered, other: Session | TextSession, inputs: Mapping[str, Array]) -> None:
        samples, same, skipped = 0, 0, 1
        try:
            if isinstance(other, Session):
                samples, same = _same((other, other.run(inputs)), answered)
            skipped = 0
        except EdgekitError:
            log.info("a request was not compared", exc_info=True)
        finally:  # whatever an engine raises: the next is compared
            with self._lock:
                self._pending -= 1
                self._samples += samples
                self._same += same
                self._skipped += skipped


def _same(one: Answered, other: Answered) -> tuple[int, int]:
    """Count the samples, and those on which both answer alike.

    Detectors do where they see the same kind of object best, each by its own manifest, or both none.
    """
    if not all(session.contract.detection for session, _ in (one, other)):
        return _same_choices(one[1], other[1])
    best = [
        [objects[0].label if objects else None for objects in session.objects(outputs)]
        for session, outputs in (one, other)
    ]
    return len(best[1]), sum(before == now for before, now in zip(*best, strict=False))


def _same_choices(one: Mapping[str, Array], other: Mapping[str, Array]) -> tuple[int, int]:
    """Count the samples, and those on which both have their largest score in the same place of the first output."""
    name = next(iter(other))
    ours, theirs = other[name], one.get(name)
    if theirs is None or theirs.shape != ours.shape or ours.ndim == 0:
        return len(ours) if ours.ndim else 1, 0
    flat = ours.reshape(len(ours), -1), theirs.reshape(len(ours), -1)
    return len(ours), int((flat[0].argmax(1) == flat[1].argmax(1)).sum())
