"""A broker inside the process, for tests, demos and single-machine use. Behaves like MQTT, loses nothing.

Retained messages, wildcards, wills and request/response; callbacks run on one thread per channel, as they
do with a real broker. Knows no network and no payload.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from edgekit.errors import TransferError
from edgekit.ota.channel import Arrival, matches

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.ota.channel import Back, Receipt, Will


class MemoryBroker:
    """Routes messages between the channels it handed out."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._retained: dict[str, Arrival] = {}
        self._channels: dict[str, MemoryChannel] = {}
        self._turn = 0

    def connect(self, client_id: str, *, will: Will | None = None) -> MemoryChannel:
        """Open a channel; one that had the same client id is cut off, as MQTT demands."""
        self.drop(client_id)
        channel = MemoryChannel(self, client_id, will)
        with self._lock:
            self._channels[client_id] = channel
        return channel

    def drop(self, client_id: str) -> None:
        """Cut a client off as a lost network would: its will is published at once."""
        with self._lock:
            channel = self._channels.pop(client_id, None)
        if channel is None:
            return
        channel.stop()
        if channel.will is not None:
            self.route(Arrival(channel.will.topic, channel.will.payload), retain=True)

    def forget(self, channel: MemoryChannel) -> None:
        """Remove a channel that said good-bye; its will is void."""
        with self._lock:
            if self._channels.get(channel.client_id) is channel:
                del self._channels[channel.client_id]

    def route(self, arrival: Arrival, *, retain: bool) -> None:
        """Give a message to everyone who wants it; keep it if asked, forget the kept one on an empty payload."""
        with self._lock:
            if retain and arrival.payload:
                self._retained[arrival.topic] = arrival
            elif retain:
                self._retained.pop(arrival.topic, None)
            for channel in self._channels.values():
                channel.offer(arrival)
            self._share(arrival)

    def _share(self, arrival: Arrival) -> None:
        """Give a message to one of each group that shares it, to one after the other."""
        groups: dict[str, list[MemoryChannel]] = {}
        for channel in self._channels.values():
            for pattern in channel.shared(arrival.topic):
                groups.setdefault(pattern, []).append(channel)
        for pattern, channels in groups.items():
            self._turn += 1
            channels[self._turn % len(channels)].deliver(pattern, arrival)

    def retained(self, pattern: str) -> list[Arrival]:
        """List the kept messages that match."""
        with self._lock:
            kept = [a for topic, a in sorted(self._retained.items()) if matches(pattern, topic)]
        return [Arrival(a.topic, a.payload, retained=True) for a in kept]

    def lock(self) -> threading.RLock:
        """Return the lock under which messages are routed."""
        return self._lock


class MemoryChannel:
    """A `Channel` of a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, client_id: str, will: Will | None) -> None:
        self.client_id = client_id
        self.will = will
        self._broker = broker
        self._open = True
        self._subscriptions: list[tuple[str, Callable[[Arrival], None]]] = []
        self._inbox: queue.SimpleQueue[tuple[Callable[[Arrival], None], Arrival] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, name=f"memory-{client_id}", daemon=True)
        self._thread.start()

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, reply_to: str = "", correlation: bytes = b""
    ) -> Receipt:
        """Hand a message over; the broker has it at once.

        Raises:
            TransferError: the channel is closed.
        """
        self._require_open()
        self._broker.route(Arrival(topic, payload, reply_to, correlation), retain=retain)
        return lambda _seconds: True

    def subscribe(self, pattern: str, on_arrival: Callable[[Arrival], None]) -> None:
        """Call ``on_arrival`` for each message that matches, retained ones first.

        Raises:
            TransferError: the channel is closed.
        """
        self._require_open()
        with self._broker.lock():
            for arrival in () if pattern.startswith("$share/") else self._broker.retained(pattern):
                self._inbox.put((on_arrival, arrival))
            self._subscriptions.append((pattern, on_arrival))

    def unsubscribe(self, pattern: str) -> None:
        """Call nobody any more for messages that match."""
        with self._broker.lock():
            self._subscriptions = [one for one in self._subscriptions if one[0] != pattern]

    def offer(self, arrival: Arrival) -> None:
        """Queue a message for every subscription of this channel's own that matches."""
        for pattern, on_arrival in self._subscriptions:
            if not pattern.startswith("$share/") and matches(pattern, arrival.topic):
                self._inbox.put((on_arrival, arrival))

    def shared(self, topic: str) -> list[str]:
        """List the patterns shared with others that match."""
        return [one for one, _ in self._subscriptions if one.startswith("$share/") and matches(one, topic)]

    def deliver(self, pattern: str, arrival: Arrival) -> None:
        """Queue a message for the subscriptions of one pattern."""
        for one, on_arrival in self._subscriptions:
            if one == pattern:
                self._inbox.put((on_arrival, arrival))

    def is_connected(self, seconds: float = 0.0) -> bool:
        """Say whether the channel is open; one that was cut off never comes back."""
        del seconds
        return self._open

    def when_back(self, call: Callable[[Back], None]) -> None:
        """Do nothing: see `is_connected`."""

    def close(self) -> None:
        """Say good-bye; later calls are errors."""
        self._broker.forget(self)
        self.stop()

    def stop(self) -> None:
        """End the delivery thread."""
        self._open = False
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _require_open(self) -> None:
        if not self._open:
            raise TransferError(f"the channel of {self.client_id} is closed", "connect again")

    def _deliver(self) -> None:
        while (delivery := self._inbox.get()) is not None:
            on_arrival, arrival = delivery
            on_arrival(arrival)
