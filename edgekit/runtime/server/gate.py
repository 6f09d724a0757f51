"""Lets so many requests in and turns the others away at once: a queue without an end makes every answer late.

Knows no protocol and no model.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgekit.runtime.server.exchange import HttpError
from edgekit.runtime.telemetry import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    Result = TypeVar("Result")

AT_ONCE_SECONDS = 0.0005
"""Work that takes less on average is not worth a thread: to wake one and to be woken takes a quarter of that."""
AT_ONCE_BYTES = 16 << 10
"""Larger bodies say nothing of the average: a batch of a thousand may come after a thousand single samples."""
RETRY_SECONDS = 1.0
"""What a client that was turned away is told to wait at least."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes: bytes of a body, requests that compute and that wait, and seconds until one is given up.

    The time of a generated text counts from piece to piece.
    """

    body: int = 64 << 20
    workers: int = 4
    queue: int = 64
    seconds: float = 60.0


class Gate:
    """Threads that compute, and those who wait for one. To be used from one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="inference")
        self._lock = threading.Lock()
        self._inside = 0
        self._average = 0.0
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

    def start(self, work: Callable[[], Result]) -> Future[Result]:
        """Give work to a thread.

        Raises:
            HttpError: 429 where as many wait already as may.
        """
        with self._lock:
            if self._inside >= self.limits.workers + self.limits.queue:
                self.turned_away += 1
                raise self._busy()
            self._inside += 1
        future = self._threads.submit(self._timed, work, time.perf_counter())
        future.add_done_callback(self._leave)
        return future

    async def compute(self, work: Callable[[], Result], size: int) -> Result:
        """Give work on a body of so many bytes to a thread and wait for its result.

        What is small, and is done sooner on average than a thread is woken, is done at once.

        Raises:
            HttpError: 429 where as many wait already as may; 504 where it takes too long. What has not begun is dropped
                then; an engine that computes cannot be stopped, and keeps its thread.
        """
        if size <= AT_ONCE_BYTES and not self._inside and 0 < self._average < AT_ONCE_SECONDS:
            return self._timed(work, time.perf_counter())
        future = self.start(work)
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
                self.given_up += 1
                raise HttpError(504, f"no answer within {self.limits.seconds:g} s") from None
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=True)

    def _timed(self, work: Callable[[], Result], asked: float) -> Result:
        started = time.perf_counter()
        with self._lock:
            self._waits.add(started - asked)
        result = work()  # what is refused says nothing of how long the model takes
        spent = time.perf_counter() - started
        self._average += (0.1 if self._average else 1) * (spent - self._average)
        return result

    def _leave(self, _: Future[Result]) -> None:
        with self._lock:
            self._inside -= 1

    def _busy(self) -> HttpError:
        seconds = max(RETRY_SECONDS, self._average * self.limits.queue / self.limits.workers)
        headers = ((b"retry-after", str(math.ceil(seconds)).encode()),)
        return HttpError(429, f"{self.limits.queue} requests wait already: come again later", "busy", headers)
