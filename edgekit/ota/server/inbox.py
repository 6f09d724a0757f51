"""Messages that wait for the service: bounded in number and bytes, no sender takes all the room. Reads none of them."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING

from edgekit.ota.messages import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from edgekit.ota.channel import Arrival

MAX_COUNT = 20_000
MAX_BYTES = 64 << 20
MAX_OF_ONE = 1000
"""So many wait from one device, which is what its outbox may hold: a flood leaves room for the others."""


class Inbox:
    """A queue from the channel's thread to the service's."""

    def __init__(self) -> None:
        self._waiting: deque[Arrival] = deque()
        self._by_sender: Counter[str] = Counter()
        self._bytes = 0
        self._news = threading.Condition()

    def put(self, arrival: Arrival) -> bool:
        """Take a message, or say that there is no room for it."""
        sender, size = _sender(arrival), len(arrival.payload)
        with self._news:
            full = len(self._waiting) >= MAX_COUNT or self._bytes + size > MAX_BYTES
            if full or size > MAX_MESSAGE_BYTES or self._by_sender[sender] >= MAX_OF_ONE:
                return False
            self._waiting.append(arrival)
            self._by_sender[sender] += 1
            self._bytes += size
            self._news.notify_all()
        return True

    def drain(self, most: int, wait: float) -> list[Arrival]:
        """Return what has come, oldest first, after waiting up to ``wait`` seconds for something."""
        with self._news:
            self._news.wait_for(lambda: self._waiting, wait)
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            for arrival in taken:
                self._bytes -= len(arrival.payload)
                self._by_sender[_sender(arrival)] -= 1
            self._by_sender = +self._by_sender  # without those at zero
        return taken


def _sender(arrival: Arrival) -> str:
    return arrival.topic.rpartition("/")[0]
