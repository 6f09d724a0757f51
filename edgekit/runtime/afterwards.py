"""Does what a request need not wait for, in one thread, in order, within bounds. Knows nothing of what it does."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_WAITING = 8192
MAX_BYTES = 64 << 20
PAUSE = 0.05
"""Seconds between two rounds: a thread that wakes for each request takes Python's lock from those who compute."""


class Afterwards:
    """Work that waits for its turn; what would pass the bounds is refused. `close` does what waits, and ends.

    The work must not raise.
    """

    def __init__(self, name: str) -> None:
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None], size: int) -> bool:
        """Let work wait that holds so many bytes; false where there is no room for it, or the end has come."""
        with self._lock:
            full = len(self._waiting) >= MAX_WAITING or self._bytes + size > MAX_BYTES
            if full or self._closing.is_set():
                return False
            self._waiting.append((work, size))
            self._bytes += size
        if not self._news.is_set():
            self._news.set()
        return True

    def close(self) -> None:
        """Do all that waits, then end; what is put later is refused."""
        with self._lock:
            self._closing.set()
        self._news.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            while self._waiting:
                work, size = self._waiting.popleft()
                work()
                del work
                with self._lock:
                    self._bytes -= size
            if self._closing.wait(PAUSE) and not self._waiting:
                return
            if self._closing.is_set():
                self._news.set()
