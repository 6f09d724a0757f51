"""Keeps one device at what its fleet wants: listens, updates one at a time, reports. Knows no engine.

The latest desired release wins; what fails in transit is tried again with growing, jittered pauses.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import edgekit
from edgekit.errors import EdgekitError, MessageError, TransferError, from_os
from edgekit.ota import messages
from edgekit.ota.channel import Will
from edgekit.ota.device import slots
from edgekit.ota.device.fetchers import ChannelFetcher, Patience
from edgekit.ota.device.update import recover, require_identifier, update
from edgekit.ota.messages import Desired, Failed, Health, Hello
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import TextIOWrapper

    from edgekit.ota.channel import Arrival, Channel
    from edgekit.ota.device.update import Device
    from edgekit.ota.messages import Report
    from edgekit.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vitals:
    """How the served model did since the last time it was asked."""

    requests: int
    errors: int
    p95_ms: float
    rss_mib: float = 0.0


@dataclass(frozen=True)
class Habits:
    """How the agent behaves in time: seconds between health reports and before it tries again."""

    health_seconds: float = 60.0
    first_pause: float = 1.0
    longest_pause: float = 300.0
    will_delay: int = 30
    patience: Patience = field(default_factory=Patience)


class Agent:
    """The device's end of the fleet: ``start`` with a way to connect, ``stop`` when the device goes down.

    ``dropped`` counts malformed messages. The state folder must have got its root (`trust.install_root`).
    """

    def __init__(
        self, fleet: str, device: Device, habits: Habits | None = None, vitals: Callable[[], Vitals] | None = None
    ) -> None:
        require_identifier(fleet)
        self.dropped = 0
        self.progress: Progress = silent
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self._fleet = fleet
        self._device = device
        self._habits = habits or Habits()
        self._vitals = vitals
        self._boot = secrets.token_hex(8)
        self._channel: Channel | None = None
        self._fetcher: ChannelFetcher | None = None
        self._lock: TextIOWrapper | None = None
        self._wanted: Desired | None = None
        self._asked_again = False
        self._news = threading.Condition()
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def start(self, connect: Callable[[Will], Channel]) -> None:
        """Serve what is installed, then connect, announce the device and obey what the fleet wants.

        Raises:
            ResourceError: another agent uses the state folder, or it is damaged.
            TransferError: the broker cannot be reached; what is installed serves all the same.
        """
        self._lock = slots.lock(self._device.state)
        try:
            self._come_up(connect)
        except BaseException:
            self._lock.close()  # so that the caller may try again
            raise

    def _come_up(self, connect: Callable[[Will], Channel]) -> None:
        settled = recover(self._device)
        offline = messages.encode(self._hello(online=False))
        channel = connect(Will(self._topic("hello"), offline, self._habits.will_delay))
        self._channel = channel
        self._fetcher = ChannelFetcher(channel, self._fleet, self._device.name, self._habits.patience)
        self._say_hello()
        if settled is not None:
            self._report(settled)
        self._begin(self._work, "update")
        if self._vitals is not None:
            self._begin(self._tell_health, "health")
        channel.subscribe(self._topic("hello"), self._on_hello)
        channel.subscribe(self._topic("desired"), self._on_desired)

    def stop(self) -> None:
        """Say good-bye and end; an update under way stops at the next block and goes on after the next start."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if self._fetcher is not None:
            self._fetcher.close()
        for thread in self._threads:
            thread.join()
        if self._channel is not None:
            self._publish(self._hello(online=False), "hello", retain=True)
            self._channel.close()
        if self._lock is not None:
            self._lock.close()

    def _begin(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=f"edgekit-{name}-{self._device.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _on_desired(self, arrival: Arrival) -> None:
        try:
            wanted = messages.decode(arrival.payload, Desired) if arrival.payload else None
        except MessageError as error:
            self.dropped += 1
            log.warning("dropped what came on %s: %s", arrival.topic, error)
            return
        with self._news:
            # The same wish once more: the server or the broker may have lost our word, so it is given again.
            self._wanted, self._asked_again = wanted, True
            self._news.notify_all()

    def _on_hello(self, arrival: Arrival) -> None:
        """Correct a will that the broker published although this device is back."""
        try:
            hello = messages.decode(arrival.payload, Hello) if arrival.payload else None
        except MessageError:
            self.dropped += 1
            hello = None
        if (hello is None or not hello.online) and not self._stopping:
            try:
                self._say_hello()
            except (EdgekitError, OSError) as error:  # the channel's thread must live: it brings the blocks as well
                log.warning("the device could not say that it is back: %s", error)

    def _work(self) -> None:
        handled: Desired | None = None
        failures = 0
        while (wanted := self._next(handled, failures)) is not None:
            try:
                failures = 0 if self._obey(wanted) else failures + 1
            except Exception:  # the loop that must not die: a device without an agent can only be fetched by hand
                log.exception("the update to %s failed", wanted.release)
                failures += 1
            handled = None if failures else wanted

    def _next(self, handled: Desired | None, failures: int) -> Desired | None:
        """Wait for a wish that is not handled, after a failure at least the pause; ``None``: stop."""
        with self._news:
            if failures:
                before = self._wanted
                self._news.wait_for(lambda: self._stopping or self._wanted != before, self._pause(failures))
            self._news.wait_for(lambda: self._stopping or self._is_news(handled))
            self._asked_again = False
            return None if self._stopping else self._wanted

    def _is_news(self, handled: Desired | None) -> bool:
        return self._wanted is not None and (self._wanted != handled or self._asked_again)

    def _pause(self, failures: int) -> float:
        # Full jitter: a fleet that failed together must not come back together.
        longest = min(self._habits.longest_pause, self._habits.first_pause * 2.0 ** min(failures, 20))
        return random.uniform(0, longest)  # noqa: S311  # spreads load, protects nothing

    def _obey(self, wanted: Desired) -> bool:
        assert self._fetcher is not None  # noqa: S101  # set before the thread starts
        try:
            outcome = update(self._device, wanted, self._fetcher, self.clock(), progress=self._watch(wanted))
        except (EdgekitError, OSError) as error:
            known = from_os(error, "update") if isinstance(error, OSError) else error
            if not self._is_outdated(wanted):
                self._report(self._failed(wanted, known))
            return False
        self._report(outcome)
        self._say_hello()
        return True

    def _watch(self, wanted: Desired) -> Progress:
        def watch(what: str, done: int, total: int) -> None:
            if self._is_outdated(wanted):
                raise TransferError(f"stopped fetching {wanted.release}", "something newer is wanted")
            self.progress(what, done, total)

        return watch

    def _is_outdated(self, wanted: Desired) -> bool:
        with self._news:
            return self._stopping or self._wanted != wanted

    def _failed(self, wanted: Desired, error: EdgekitError) -> Failed:
        log.warning("the update to %s failed and will be tried again: %s", wanted.release, error)
        return Failed(
            device=self._device.name,
            deployment=wanted.deployment,
            attempt=wanted.attempt,
            version=wanted.version,
            reason=error.message[:2000],
        )

    def _tell_health(self) -> None:
        while not self._stopped_within(self._habits.health_seconds):
            try:
                self._report_health()
            except (EdgekitError, OSError) as error:  # no file handle is left, say: the next report may come through
                log.warning("the health could not be told: %s", error)

    def _report_health(self) -> None:
        current = slots.load(self._device.state).current
        if current is None or self._vitals is None:
            return
        vitals = self._vitals()
        self._report(
            Health(
                device=self._device.name,
                bundle=current.bundle,
                requests=vitals.requests,
                errors=vitals.errors,
                p95_ms=vitals.p95_ms,
                rss_mib=vitals.rss_mib,
            )
        )

    def _stopped_within(self, seconds: float) -> bool:
        with self._news:
            return self._news.wait_for(lambda: self._stopping, seconds)

    def _hello(self, *, online: bool) -> Hello:
        current = slots.load(self._device.state).current
        return Hello(
            device=self._device.name,
            profile=self._device.profile,
            boot=self._boot,
            online=online,
            release=current.path if current else "",
            version=current.version if current else 0,
            bundle=current.bundle if current else "",
            agent=f"edgekit {edgekit.__version__}",
        )

    def _say_hello(self) -> None:
        self._publish(self._hello(online=True), "hello", retain=True)

    def _report(self, report: Report) -> None:
        self._publish(report, "report", retain=False)

    def _publish(self, report: Report, leaf: str, *, retain: bool) -> None:
        assert self._channel is not None  # noqa: S101  # set before anything is published
        try:
            self._channel.publish(self._topic(leaf), messages.encode(report), retain=retain)
        except TransferError as error:
            log.warning("a report could not be sent: %s", error)

    def _topic(self, leaf: str) -> str:
        return messages.topic(self._fleet, self._device.name, leaf)
