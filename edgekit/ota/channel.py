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
