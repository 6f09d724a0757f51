"""Requests that wait together are computed as one batch. Nobody waits for company that is not there.

While the engine computes, requests pile up; when it is free it takes all that fit, in their order. A request that finds
the engine free is computed at once, unless others are just being prepared: for those it waits a part of what a batch
takes, a window at most. Knows no HTTP.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError, HealthError
from edgekit.runtime import ports
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgekit.device_profiles import DeviceProfile
    from edgekit.runtime.session import Session
    from edgekit.tensors import Array

log = logging.getLogger(__name__)

PART = 0.25
"""Of a batch's time, what it may wait for requests that are being prepared."""
GAIN = 0.95
"""A batch that takes a sample no less than this part of its time alone is not worth the wait."""
TRIES = 5
TOLERANCE = 1e-3
"""Of the largest output: so much may company change an answer; kernels add in another order for another size."""
LONG_SECONDS = 0.5
"""Larger batches than one that takes so long are not tried: a request waits for the batch before it, too."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Samples in a batch at most, milliseconds that it may wait at most, and batches that are computed at once."""

    most: int = 8
    window_ms: float = 5.0
    lanes: int = 1

    @property
    def workers(self) -> int:
        """How many threads a server needs: one waits for each request of a batch."""
        return self.most * self.lanes


def of_class(profile: DeviceProfile | None, threads: int = 0) -> Batching | None:
    """Return what a hardware class says of batches, None where it says nothing; ``threads`` are those of the engine."""
    if profile is None or profile.runtime.batch < 2:
        return None
    lanes = max(1, len(os.sched_getaffinity(0)) // threads) if threads else 1
    return Batching(most=profile.runtime.batch, window_ms=profile.runtime.batch_window_ms, lanes=lanes)


class _Asked:
    """One request: what it gives, what it gets, and a lock that is released when it is its turn or it is answered."""

    __slots__ = ("count", "error", "inputs", "key", "leads", "outputs", "signal")

    def __init__(self, inputs: Mapping[str, Array], count: int) -> None:
        self.inputs = inputs
        self.count = count
        self.key = tuple((array.dtype.char, array.shape[1:]) for array in inputs.values())
        self.outputs: dict[str, Array] | None = None
        self.error: EdgekitError | None = None
        self.leads = False
        self.signal = threading.Lock()
        self.signal.acquire()


class Batcher:
    """Runs one session for many threads."""

    def __init__(self, session: Session, how: Batching) -> None:
        self._session = session
        self._how = how
        self._names = tuple(spec.name for spec in session.contract.inputs)
        self._queue: deque[_Asked] = deque()
        self._news = threading.Condition()
        self._computing = self._coming = 0
        self._seconds = 0.0
        self._sizes: Counter[int] = Counter()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Announce a request while its inputs are prepared."""
        with self._news:
            self._coming += 1
        try:
            yield
        finally:
            with self._news:
                self._coming -= 1
                self._news.notify()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one request, alone or in company; the same errors as `Session.run`."""
        count = ports.check_inputs(inputs, self._session.contract.inputs)
        asked = _Asked({name: inputs[name] for name in self._names}, count)
        with self._news:
            asked.leads = self._computing < self._how.lanes
            if asked.leads:
                self._computing += 1
            else:
                self._queue.append(asked)
                self._news.notify()
        if not asked.leads:
            asked.signal.acquire()  # given when it is answered, or when it leads
        if asked.leads:
            self._lead(asked)
        if asked.error:
            raise asked.error
        if asked.outputs is None:
            raise HealthError("what was computed together failed")
        return asked.outputs

    def sizes(self) -> Mapping[int, int]:
        """Return how many batches of each size were computed; a request beyond the bound counts as one above it."""
        with self._news:
            return dict(self._sizes)

    def _lead(self, first: _Asked) -> None:
        """Compute the batch of a request, then give the engine to the one that has waited the longest."""
        try:
            self._compute(self._taken(first))
        finally:
            with self._news:
                if self._queue:
                    following = self._queue.popleft()
                    following.leads = True
                    following.signal.release()
                else:
                    self._computing -= 1

    def _taken(self, first: _Asked) -> list[_Asked]:
        with self._news:
            until = time.perf_counter() + min(self._how.window_ms / 1000, PART * self._seconds)
            while self._coming and first.count + sum(one.count for one in self._queue) < self._how.most:
                if (left := until - time.perf_counter()) <= 0:
                    break
                self._news.wait(left)
            batch, others, room = [first], [], self._how.most - first.count
            while self._queue and room > 0:
                one = self._queue.popleft()
                if one.key == first.key and one.count <= room:
                    batch.append(one)
                    room -= one.count
                else:
                    others.append(one)
            self._queue.extendleft(reversed(others))
            self._sizes[min(sum(one.count for one in batch), self._how.most + 1)] += 1
        return batch

    def _compute(self, batch: Sequence[_Asked]) -> None:
        import numpy as np

        try:
            if len(batch) == 1:
                self._alone(batch[0])
                return
            joined = {name: np.concatenate([one.inputs[name] for one in batch]) for name in self._names}
            began = time.perf_counter()
            outputs = self._session.run(joined)
            self._seconds += (0.1 if self._seconds else 1) * (time.perf_counter() - began - self._seconds)
            at = 0
            for one in batch:
                one.outputs = {name: array[at : at + one.count] for name, array in outputs.items()}
                at += one.count
        except EdgekitError:  # one of them may spoil it for all
            for one in batch:
                self._alone(one)
        finally:
            for one in batch:
                if not one.leads:
                    one.signal.release()

    def _alone(self, one: _Asked) -> None:
        try:
            one.outputs = self._session.run(one.inputs)
        except EdgekitError as error:
            one.error = error


def batcher_for(session: Session, how: Batching) -> Batcher | None:
    """Return what runs a session in batches, of a size that was measured here; None where that is wrong or no gain.

    Wrong it is where a sample's answer depends on the others of its batch, as with activations that are quantized by
    what a batch holds; where that is so is found by asking.
    """
    contract, name = session.contract, session.contract.name
    specs = (*contract.inputs, *contract.outputs)
    if session.variant.batch != DYNAMIC or not all(spec.shape and spec.shape[0] == DYNAMIC for spec in specs):
        log.warning("%s is not computed in batches: its batch is fixed", name)
        return None
    if any(DYNAMIC in spec.shape[1:] for spec in contract.inputs):
        log.warning("%s is not computed in batches: its inputs have no fixed size", name)
        return None
    if not _is_independent(session):
        log.warning("%s is not computed in batches: a sample's answer depends on those beside it", name)
        return None
    best, alone = _fastest(session, how.most)
    if best == 1:
        log.warning("%s is not computed in batches: a sample takes no less time in company", name)
        return None
    log.info("%s is computed in batches of up to %d: %.2f ms a sample alone", name, best, 1000 * alone)
    return Batcher(session, Batching(most=best, window_ms=how.window_ms, lanes=how.lanes))


def _is_independent(session: Session) -> bool:
    import numpy as np

    given = ports.noise(session.contract.inputs, batch=4)
    alone = session.run({name: array[:1] for name, array in given.items()})
    for array in given.values():
        if array.dtype.kind == "f":
            array[1:] *= 100
    together = session.run(given)
    for name, array in alone.items():
        if array.dtype.kind not in "fiub":
            continue
        wanted, got = (np.asarray(one, np.float64) for one in (array, together[name][:1]))
        if not np.allclose(got, wanted, rtol=0, atol=TOLERANCE * float(np.abs(wanted).max(initial=0)), equal_nan=True):
            return False
    return True


def _fastest(session: Session, most: int) -> tuple[int, float]:
    """Return the batch size in which a sample takes the least time, 1 where none is a gain, and its time alone."""
    alone = _seconds(session, 1)
    best, least, size = 1, alone, 2
    while size <= most:
        seconds = _seconds(session, size)
        if seconds / size < least * (GAIN if best == 1 else 1):
            best, least = size, seconds / size
        if seconds > LONG_SECONDS:
            break
        size = most if size < most < 2 * size else 2 * size
    return best, alone


def _seconds(session: Session, size: int) -> float:
    given = ports.noise(session.contract.inputs, batch=size)
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        session.run(given)
        times.append(time.perf_counter() - began)
    return min(times)
