"""Carries reports from the outbox to the broker, in order, and takes out exactly what the broker acknowledged.

Knows a channel and bytes; decides nothing about what is reported.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

from edgekit.errors import TransferError

if TYPE_CHECKING:
    from edgekit.ota.channel import Channel, Receipt
    from edgekit.ota.device.outbox import Outbox

log = logging.getLogger(__name__)

WINDOW = 16
"""So many messages are on their way at once; MQTT keeps their order."""
RECEIPT_SECONDS = 5.0
"""A message without a receipt for so long is written to the disk; paho sends it again by itself."""
REFUSED_SECONDS = 30.0
GOODBYE_SECONDS = 2.0


class Courier:
    """Sends what is given to `send`, now or whenever the broker is there again; a thread of its own until `stop`."""

    def __init__(self, outbox: Outbox, channel: Channel, topic: str) -> None:
        self._outbox = outbox
        self._channel = channel
        self._topic = topic
        self._on_way: deque[tuple[int, Receipt]] = deque()
        self._news = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=f"edgekit-courier-{topic}", daemon=True)
        self._thread.start()

    def send(self, payload: bytes, *, is_final: bool) -> None:
        """Take a report; it is sent at least once, unless the outbox has to drop it."""
        self._outbox.put(payload, is_final=is_final)
        with self._news:
            self._news.notify_all()

    def stop(self) -> None:
        """Give what is on its way a moment; what is left waits on the disk for the next start."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        self._thread.join()
        self._outbox.save()

    def _work(self) -> None:
        while self._has_work():
            try:
                self._step()
            except TransferError as error:  # refused, or the channel is closed: from the oldest on, later
                log.warning("reports wait, %d of them: %s", len(self._outbox), error)
                self._on_way.clear()
                self._outbox.save()
                with self._news:
                    if self._stopping or self._news.wait_for(lambda: self._stopping, REFUSED_SECONDS):
                        return

    def _has_work(self) -> bool:
        """Wait for something to send; at the end send what can be sent at once."""
        with self._news:
            self._news.wait_for(lambda: self._stopping or len(self._outbox))
        return not self._stopping or (bool(len(self._outbox)) and self._channel.is_connected())

    def _step(self) -> None:
        while self._channel.is_connected() and len(self._on_way) < WINDOW:
            last = self._on_way[-1][0] if self._on_way else 0
            one = self._outbox.after(last)
            if one is None:
                break
            self._on_way.append((one.number, self._channel.publish(self._topic, one.payload)))
        if not self._on_way:
            self._outbox.save()
            self._channel.is_connected(RECEIPT_SECONDS)
            return
        number, receipt = self._on_way[0]
        if receipt(GOODBYE_SECONDS if self._stopping else RECEIPT_SECONDS):
            self._on_way.popleft()
            self._outbox.remove(number)
        elif self._stopping:
            raise TransferError("the device goes down", "they are told after the next start")
        else:
            self._outbox.save()
