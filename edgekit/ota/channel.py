"""The seam between OTA and whatever carries its messages. Knows topics and bytes, no broker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Receipt = Callable[[float], bool]
"""Called with seconds: waits at most so long and says whether the broker has the message; TransferError: it refused."""


@dataclass(frozen=True)
class Arrival:
    """A message as it came: still untrusted, unparsed bytes."""

    topic: str
    payload: bytes
    reply_to: str = ""
    correlation: bytes = b""
    retained: bool = False


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when a connection is lost for longer than the delay."""

    topic: str
    payload: bytes
    delay_seconds: int = 30


@dataclass(frozen=True)
class Back:
    """A lost connection came back: when (by ``time.monotonic``), and whether the broker remembers us."""

    at: float
    is_remembered: bool


class Channel(Protocol):
    """Publish and subscribe with retained messages and request/response, at least once delivery."""

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, reply_to: str = "", correlation: bytes = b""
    ) -> Receipt:
        """Hand a message over; returns when it is queued.

        A question or an answer (``reply_to``, ``correlation``) may get lost with the connection: ask again.

        Raises:
            TransferError: the channel is closed or its queue is full.
        """
        ...

    def subscribe(self, pattern: str, on_arrival: Callable[[Arrival], None]) -> None:
        """Call ``on_arrival`` for each message that matches (``+`` and ``#`` as in MQTT), retained ones first.

        After ``$share/NAME/`` a pattern is shared: each message goes to one of those who share, and no retained ones.
        """
        ...

    def unsubscribe(self, pattern: str) -> None:
        """Call nobody any more for messages that match; nothing where nobody asked for them."""
        ...

    def is_connected(self, seconds: float = 0.0) -> bool:
        """Say whether there is a connection, after at most so many seconds."""
        ...

    def when_back(self, call: Callable[[Back], None]) -> None:
        """Call whenever a lost connection came back."""
        ...

    def close(self) -> None:
        """Say good-bye; later calls are errors."""
        ...


def matches(pattern: str, topic: str) -> bool:
    """Say whether an MQTT topic filter, shared or not, covers a topic (MQTT 5, clauses 4.7 and 4.8.2)."""
    if pattern.startswith("$share/"):
        pattern = pattern.split("/", 2)[2]
    wanted, got = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted.pop()
        got = got[: len(wanted)]
    return len(wanted) == len(got) and all(want in ("+", part) for want, part in zip(wanted, got, strict=True))
