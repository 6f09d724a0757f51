"""The seam between OTA and whatever carries its messages. Knows topics and bytes, no broker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


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


class Channel(Protocol):
    """Publish and subscribe with retained messages and request/response, at least once delivery."""

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, reply_to: str = "", correlation: bytes = b""
    ) -> None:
        """Hand a message over; returns when it is queued.

        Raises:
            TransferError: the channel is closed or its queue is full.
        """
        ...

    def subscribe(self, pattern: str, on_arrival: Callable[[Arrival], None]) -> None:
        """Call ``on_arrival`` for each message that matches (``+`` and ``#`` as in MQTT), retained ones first."""
        ...

    def close(self) -> None:
        """Say good-bye; later calls are errors."""
        ...


def matches(pattern: str, topic: str) -> bool:
    """Say whether an MQTT topic filter covers a topic (MQTT 5, clause 4.7)."""
    wanted, got = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted.pop()
        got = got[: len(wanted)]
    return len(wanted) == len(got) and all(want in ("+", part) for want, part in zip(wanted, got, strict=True))
