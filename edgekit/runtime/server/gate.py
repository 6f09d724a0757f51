"""Lets so many requests in and turns the others away at once: a queue without an end makes every answer late.

Knows no protocol and no model.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from edgekit.runtime.server.exchange import HttpError
from edgekit.runtime.telemetry import Histogram

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    Result = TypeVar("Result")

AT_ONCE_SECONDS = 0.0005
"""Work that takes less on average is not worth a thread: to wake one and to be woken takes a quarter of that."""
OUTLIER = 8
"""Times the average that one request may count for: a busy device interrupts some, three slow ones are no chance."""
AT_ONCE_BYTES = 16 << 10
"""Larger bodies say nothing of the average: a batch of a thousand may come after a thousand single samples."""
RETRY_SECONDS = 1.0
"""What a client that was turned away is told to wait at least."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes: connections, bytes of a body, requests of a model that compute and that wait, and seconds.

    After so many seconds a request is given up; the time of a generated text counts from piece to piece. They are also
    how long a body may take to arrive, and an answer to be read.
    """

    connections: int = 1024
    body: int = 64 << 20
    workers: int = 4
    queue: int = 64
    seconds: float = 60.0

    def for_batches(self, workers: int) -> Limits:
        """Return the same with so many threads at least."""
        return replace(self, workers=max(self.workers, workers))


class Gate:
    """Threads that compute, and those who wait for one. To be used from any event loop, HTTP's and gRPC's.

    Where ``is_elsewhere`` says so, work waits for another process, which may hang: the event loop never waits with it.
    """

    def __init__(self, limits: Limits, is_elsewhere: Callable[[], bool] = lambda: False) -> None:
        self.limits = limits
        self._is_elsewhere = is_elsewhere
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="inference")
        self._lock = threading.Lock()
        self._inside = 0
        self._average = self._average_of_small = 0.0
        self._waits = Histogram()
        self.turned_away = self.given_up = 0

    @property
    def waiting(self) -> int:
        """How many requests wait for a thread."""
        return max(0, self._inside - self.limits.workers)

    @property
    def inside(self) -> int:
        """How many requests compute or wait."""
        return self._inside

    def waits(self) -> tuple[tuple[int, ...], float]:
        """Return how long requests waited for a thread: counts by `telemetry.BUCKETS`, and all seconds together."""
        with self._lock:
            return tuple(self._waits.buckets), self._waits.seconds

    def start(self, work: Callable[[], Result], *, is_small: bool = False) -> Future[Result]:
        """Give work to a thread; ``is_small`` where its time tells of work that might be done at once.

        Raises:
            HttpError: 429 where as many wait already as may.
        """
        with self._lock:
            if self._inside >= self.limits.workers + self.limits.queue:
                self.turned_away += 1
                raise self._busy()
            self._inside += 1
        here = contextvars.copy_context()  # which trace the work belongs to
        future = self._threads.submit(here.run, self._timed, work, time.perf_counter(), is_small=is_small)
        future.add_done_callback(self._leave)
        return future

    def compute(self, work: Callable[[], Result], size: int) -> Result | Awaitable[Result]:
        """Do work on a body of so many bytes: at once, or in a thread.

        What is small, and is done sooner on average than a thread is woken, is done at once.

        Raises:
            HttpError: 429 where as many wait already as may; 504 where it takes too long. What has not begun is dropped
                then; an engine that computes cannot be stopped, and keeps its thread.
        """
        if (
            size <= AT_ONCE_BYTES
            and not self._inside
            and 0 < self._average_of_small < AT_ONCE_SECONDS
            and not self._is_elsewhere()
        ):
            return self._timed(work, time.perf_counter(), is_small=True)
        return self._awaited(self.start(work, is_small=size <= AT_ONCE_BYTES))

    async def _awaited(self, future: Future[Result]) -> Result:
        waiting = asyncio.wrap_future(future)
        late = False

        def give_up() -> None:
            nonlocal late
            late = True
            waiting.cancel()

        timer = asyncio.get_running_loop().call_later(self.limits.seconds, give_up)
        try:
            return await waiting
        except asyncio.CancelledError:
            if late:
                with self._lock:
                    self.given_up += 1
                raise HttpError(504, f"no answer within {self.limits.seconds:g} s") from None
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=True)

    def _timed(self, work: Callable[[], Result], asked: float, *, is_small: bool) -> Result:
        started = time.perf_counter()
        with self._lock:
            self._waits.add(started - asked)
        result = work()  # what is refused says nothing of how long the model takes
        spent = time.perf_counter() - started
        self._average = _followed(self._average, spent)
        if is_small:
            self._average_of_small = _followed(self._average_of_small, spent)
        return result

    def _leave(self, _: Future[Result]) -> None:
        with self._lock:
            self._inside -= 1

    def _busy(self) -> HttpError:
        seconds = max(RETRY_SECONDS, self._average * self.limits.queue / self.limits.workers)
        headers = ((b"retry-after", str(math.ceil(seconds)).encode()),)
        return HttpError(429, f"{self.limits.queue} requests wait already: come again later", "busy", headers)


def _followed(average: float, spent: float) -> float:
    return average + 0.1 * (min(spent, OUTLIER * average) - average) if average else spent
