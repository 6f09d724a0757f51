"""Keeps one device at what its fleet wants: listens, updates one at a time, reports. Knows no engine.

The latest desired release wins; what fails in transit is tried again with growing, jittered pauses.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError, MessageError, TransferError, UsageError, from_os
from edgekit.ota import messages
from edgekit.ota.channel import Will
from edgekit.ota.device import clock, slots, words
from edgekit.ota.device.courier import Courier
from edgekit.ota.device.fetchers import ChannelFetcher, Patience
from edgekit.ota.device.gate import Held
from edgekit.ota.device.outbox import Outbox
from edgekit.ota.device.sources import Fallback
from edgekit.ota.device.trust import Unproven
from edgekit.ota.device.update import recover, require_identifier, retreat, update
from edgekit.ota.device.wishes import OWN, Wishes
from edgekit.ota.messages import (
    MAX_ALERTS,
    MAX_GROUPS,
    Desired,
    Drift,
    Failed,
    Health,
    Hello,
    Installed,
    Refused,
    RolledBack,
)
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from io import TextIOWrapper

    from edgekit.ota.channel import Arrival, Back, Channel
    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.device.policy import Hold
    from edgekit.ota.device.update import Device
    from edgekit.ota.messages import Alert, Report
    from edgekit.progress import Progress

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""So often an agent that waits looks whether its clock was set."""


@dataclass(frozen=True)
class Vitals:
    """How the served model did since the last time it was asked, and what is not as it was."""

    requests: int
    errors: int
    p95_ms: float
    rss_mib: float = 0.0
    alerts: tuple[Alert, ...] = ()


@dataclass(frozen=True)
class _Broken:
    """A bundle that serves and does not do any more."""

    bundle: str
    reason: str


@dataclass(frozen=True)
class Habits:
    """How the agent behaves in time: seconds between health reports, looks at its policy, and before it tries again.

    Without a connection it reports its health less often: each report wears the flash. One in a ``hurry`` downloads at
    once, whatever spread the fleet asks for. ``longest_alarm`` is the longest pause where what came was not what was
    signed: whoever sends a wrong blob again and again must not use up a link that is paid by the byte.
    """

    health_seconds: float = 60.0
    offline_health_seconds: float = 900.0
    look_seconds: float = 30.0
    first_pause: float = 1.0
    longest_pause: float = 300.0
    longest_alarm: float = 3600.0
    will_delay: int = 30
    hurry: bool = False
    patience: Patience = field(default_factory=Patience)


class Agent:
    """The device's end of the fleet: ``start`` with a way to connect, ``stop`` when the device goes down.

    ``dropped`` counts malformed and replayed messages. The state folder must have got its root (`trust.install_root`).
    """

    def __init__(
        self,
        fleet: str,
        device: Device,
        habits: Habits | None = None,
        vitals: Callable[[], Vitals] | None = None,
        *,
        groups: Sequence[str] = (),
    ) -> None:
        for name in (fleet, *groups):
            require_identifier(name)
        if len(groups) > MAX_GROUPS:
            raise UsageError(f"{len(groups)} groups are too many", f"a device is in at most {MAX_GROUPS}")
        self.dropped = 0
        self.progress: Progress = silent
        self.listen: Callable[[Report], None] = lambda _: None
        self.repository: Fetcher | None = None  # preferred to the channel for all bytes, metadata as well
        self.clock: Callable[[], datetime] = device.gate.clock
        self._fleet = fleet
        self._device = device
        self._habits = habits or Habits()
        self._vitals = vitals
        self._boot = secrets.token_hex(8)
        self._told = 0  # how many health reports of this boot
        self._alerted = False  # since this boot, or before it and not told yet
        self._channel: Channel | None = None
        self._outbox: Outbox | None = None
        self._courier: Courier | None = None
        self._groups = groups
        self._wishes = Wishes(device.state / "wishes.json", device.name, groups)
        self._fetcher: ChannelFetcher | None = None
        self._lock: TextIOWrapper | None = None
        self._wanted: Desired | None = None
        self._broken: _Broken | None = None
        self._asked_again = False
        self._longest = self._habits.longest_pause
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
        self._stopping = False
        self._device.gate.pause = self._undisturbed
        self._device.gate.is_stopped = lambda: self._stopping
        self._outbox = Outbox(self._device.state / "outbox")
        self._alerted = len(self._outbox) > 0
        try:
            self._come_up(connect)
        except BaseException:
            self._lock.close()  # so that the caller may try again
            raise

    def _come_up(self, connect: Callable[[Will], Channel]) -> None:
        settled = recover(self._device)
        offline = messages.encode(self._hello(online=False))
        channel = connect(Will(self._topic("hello"), offline, self._habits.will_delay))
        assert self._outbox is not None  # noqa: S101  # the caller opened it
        self._channel = channel
        self._courier = Courier(self._outbox, channel, self._topic("report"))
        patience = self._habits.patience.within(self._device.gate.policy.bandwidth)
        self._fetcher = ChannelFetcher(channel, self._fleet, self._device.name, patience)
        self._say_hello()
        if settled is not None:
            self._report(settled)
        self._begin(self._work, "update")
        if self._vitals is not None:
            self._begin(self._tell_health, "health")
        channel.when_back(self._on_back)
        channel.subscribe(self._topic("hello"), self._on_hello)
        channel.subscribe(self._topic("desired"), lambda arrival: self._on_desired(OWN, arrival))
        for group in self._groups:
            topic = messages.group_topic(self._fleet, group)
            channel.subscribe(topic, lambda arrival, group=group: self._on_desired(group, arrival))  # type: ignore[misc]  # mypy infers no lambda with a default

    def stop(self) -> None:
        """Say good-bye and end; an update under way stops at the next block and goes on after the next start."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        if self._fetcher is not None:
            self._fetcher.close()
        for thread in self._threads:
            thread.join()
        if self._courier is not None:
            self._courier.stop()
        if self._channel is not None:
            self._publish_hello(self._hello(online=False))
            self._channel.close()
        if self._lock is not None:
            self._lock.close()

    def give_up(self, bundle: str, reason: str) -> None:
        """Let the device go back to what served before ``bundle``, if that serves; returns at once.

        A download under way waits for it. Where nothing is left to go back to, the bundle serves on.
        """
        with self._news:
            self._broken = _Broken(bundle, reason)
            self._news.notify_all()

    def _begin(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=f"edgekit-{name}-{self._device.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _on_desired(self, group: str, arrival: Arrival) -> None:
        try:
            wish = messages.decode(arrival.payload, Desired) if arrival.payload else None
            self._wishes.take(group, wish, self.clock().timestamp())
        except MessageError as error:
            self.dropped += 1
            log.warning("dropped what came on %s: %s", arrival.topic, error)
            return
        with self._news:
            # The same wish once more: the server or the broker may have lost our word, so it is given again.
            self._wanted, self._asked_again = self._wishes.chosen(self._device.profile), True
            self._news.notify_all()

    def _on_hello(self, arrival: Arrival) -> None:
        """Correct a will that the broker published although this device is back."""
        try:
            hello = messages.decode(arrival.payload, Hello) if arrival.payload else None
        except MessageError:
            self.dropped += 1
            hello = None
        if hello is None or not hello.online:
            self._say_that_it_is_back()

    def _on_back(self, back: Back) -> None:
        if not back.is_remembered:  # nor may the broker have the hello any more
            self._say_that_it_is_back()

    def _say_that_it_is_back(self) -> None:
        if self._stopping:
            return
        try:
            self._say_hello()
        except (EdgekitError, OSError) as error:  # the channel's thread must live: it brings the blocks as well
            log.warning("the device could not say that it is back: %s", error)

    def _work(self) -> None:
        handled: Desired | None = None
        failures = 0
        while (task := self._next(handled, failures)) is not None:
            try:
                done = self._retreat(task) if isinstance(task, _Broken) else self._obey(task)
                failures = 0 if done else failures + 1
            except Exception:  # the loop that must not die: a device without an agent can only be fetched by hand
                log.exception("%s failed", task)
                failures += 1
            if isinstance(task, Desired):
                handled = None if failures else task

    def _next(self, handled: Desired | None, failures: int) -> Desired | _Broken | None:
        """Wait for a wish that is not handled, after a failure at least the pause; ``None``: stop.

        A bundle that does not do any more comes before every wish.
        """
        with self._news:
            if failures:
                self._wait_out(self._pause(failures))
            while True:
                self._news.wait_for(lambda: self._is_urgent or self._is_news(handled))
                while not self._is_urgent and (left := self._seconds_left()):
                    self._news.wait(left)
                if self._is_urgent or self._wanted is not None:  # else it was taken back before its turn
                    break
            if self._stopping:
                return None
            if self._broken is not None:
                broken, self._broken = self._broken, None
                return broken
            self._asked_again = False
            return self._wanted

    def _wait_out(self, seconds: float) -> None:
        """Wait until the pause is over, something else comes, or the clock was set: it may be what failed."""
        before, looked, end = self._wanted, self._clocks(), time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not clock.has_jumped(looked, self._clocks()):
            if self._news.wait_for(lambda: self._is_urgent or self._wanted != before, min(left, LOOK_SECONDS)):
                return

    def _clocks(self) -> tuple[float, float]:
        return self.clock().timestamp(), time.monotonic()

    @property
    def _is_urgent(self) -> bool:
        return self._stopping or self._broken is not None

    def _is_news(self, handled: Desired | None) -> bool:
        return self._wanted is not None and (self._wanted != handled or self._asked_again)

    def _seconds_left(self) -> float:
        if self._wanted is None or self._habits.hurry:
            return 0.0
        return self._wishes.seconds_left(self._wanted, self.clock().timestamp())

    def _pause(self, failures: int) -> float:
        # Full jitter: a fleet that failed together must not come back together.
        longest = min(self._longest, self._habits.first_pause * 2.0 ** min(failures, 20))
        return random.uniform(0, longest)  # noqa: S311  # spreads load, protects nothing

    def _obey(self, wanted: Desired) -> bool:
        assert self._fetcher is not None  # noqa: S101  # set before the thread starts
        fetcher = Fallback(self.repository, self._fetcher) if self.repository else self._fetcher
        try:
            outcome = update(self._device, wanted, fetcher, self.clock(), progress=self._watch(wanted))
        except Held as error:
            held, size = error.hold, error.size
        except (EdgekitError, OSError) as error:
            known = from_os(error, "update") if isinstance(error, OSError) else error
            is_alarm = isinstance(known, Unproven)
            self._longest = self._habits.longest_alarm if is_alarm else self._habits.longest_pause
            if not self._is_outdated(wanted):
                self._report(self._failed(wanted, known))
            return False
        else:
            self._report(outcome)
            if isinstance(outcome, Installed) and (choice := words.chosen(self._device)):
                self._report(choice)
            self._say_hello()
            return True
        self._hold_on(wanted, held, size)  # not above: the error would keep the connection open
        return False

    def _retreat(self, broken: _Broken) -> bool:
        outcome = retreat(self._device, broken.bundle, broken.reason)
        if outcome is not None:
            self._report(outcome)
            self._say_hello()
        return True

    def _watch(self, wanted: Desired) -> Progress:
        def watch(what: str, done: int, total: int) -> None:
            if self._is_outdated(wanted):
                raise TransferError(f"stopped fetching {wanted.release}", "something else comes first")
            self.progress(what, done, total)

        return watch

    def _is_outdated(self, wanted: Desired) -> bool:
        with self._news:
            return self._is_urgent or self._wanted != wanted

    def _failed(self, wanted: Desired, error: EdgekitError) -> Failed:
        if isinstance(error, Unproven):
            log.error("ALARM: %s is not installed, and will be tried again: %s", wanted.release, error)
        else:
            log.warning("the update to %s failed and will be tried again: %s", wanted.release, error)
        return words.failed(self._device, wanted, error)

    def _hold_on(self, wanted: Desired, held: Hold, size: int) -> None:
        """Tell why, once, and wait until the policy lets it go on, or something else comes first."""
        self._report(words.waiting(self._device, wanted, held))
        while not self._is_outdated(wanted) and self._device.gate.hold(size) is not None:
            self._undisturbed(self._habits.look_seconds, wanted)

    def _undisturbed(self, seconds: float, wanted: Desired | None = None) -> None:
        """Let time pass, or less where something comes first."""
        with self._news:
            wish = wanted or self._wanted
            self._news.wait_for(lambda: self._is_urgent or self._wanted != wish, seconds)

    def _tell_health(self) -> None:
        waited = 0.0
        while not self._stopped_within(self._habits.health_seconds):
            waited += self._habits.health_seconds
            if not self._is_connected and waited < self._habits.offline_health_seconds:
                continue
            try:
                waited = 0.0
                self._report_health()
            except (EdgekitError, OSError) as error:  # no file handle is left, say: the next report may come through
                log.warning("the health could not be told: %s", error)

    def _report_health(self) -> None:
        state = slots.load(self._device.state)
        current = state.current
        if current is None or state.dark or self._vitals is None:
            return
        vitals = self._vitals()
        self._alerted = self._alerted or bool(vitals.alerts)
        if self._alerted:
            self._report(Drift(device=self._device.name, bundle=current.bundle, alerts=vitals.alerts[:MAX_ALERTS]))
        self._told += 1
        self._report(
            Health(
                device=self._device.name,
                bundle=current.bundle,
                requests=vitals.requests,
                errors=vitals.errors,
                p95_ms=vitals.p95_ms,
                rss_mib=vitals.rss_mib,
                dropped=0 if self._outbox is None else self._outbox.dropped,  # one that is empty is false
                boot=self._boot,
                number=self._told,
            )
        )

    def _stopped_within(self, seconds: float) -> bool:
        with self._news:
            return self._news.wait_for(lambda: self._stopping, seconds)

    def _hello(self, *, online: bool) -> Hello:
        return words.hello(self._device, self._boot, self._wishes.revisions, online=online)

    @property
    def _is_connected(self) -> bool:
        return self._channel is not None and self._channel.is_connected()

    def _say_hello(self) -> None:
        self._publish_hello(self._hello(online=True))

    def _publish_hello(self, hello: Hello) -> None:
        assert self._channel is not None  # noqa: S101  # set before anything is published
        try:
            self._channel.publish(self._topic("hello"), messages.encode(hello), retain=True)
        except TransferError as error:
            log.warning("the device could not say hello: %s", error)

    def _report(self, report: Report) -> None:
        assert self._courier is not None  # noqa: S101  # set before anything is reported
        self._courier.send(messages.encode(report), is_final=isinstance(report, Installed | RolledBack | Refused))
        self.listen(report)

    def _topic(self, leaf: str) -> str:
        return messages.topic(self._fleet, self._device.name, leaf)
