"""The fleet's server: takes reports, answers block requests, advances rollouts, publishes what devices should run.

Decides nothing itself (`rollout` does) and holds no private key (`publisher` does). What it says to a device is
retained desired state, computed from the store, so that a service killed at any instant goes on where it was.
"""

from __future__ import annotations

import fcntl
import logging
import queue
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError, MessageError, ResourceError, TransferError
from edgekit.ota import messages
from edgekit.ota.messages import BlockRequest, Desired, Health, Hello, Report
from edgekit.ota.server import publisher, repository
from edgekit.ota.server.fleet import DeviceState, expect, fold
from edgekit.ota.server.rollout import advance, live, wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import TextIOWrapper
    from pathlib import Path

    from edgekit.ota.channel import Arrival, Channel
    from edgekit.ota.server.rollout import Rollout
    from edgekit.ota.server.store import Store

log = logging.getLogger(__name__)

DATABASE = "fleet.sqlite"
MAX_WAITING = 20_000
BATCH = 500
TICK_SECONDS = 1.0
REFRESH_SECONDS = 86_400.0  # a timestamp lives for seven days
RETRY_SECONDS = 60.0


class Service:
    """The running server. ``counts`` says how many reports, blocks and dropped messages there were."""

    def __init__(self, folder: Path, channel: Channel, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.channel = channel
        self.store = store
        self.clock = clock
        self.counts: Counter[str] = Counter()
        self.fleet = store.devices()
        self._waiting: queue.Queue[Arrival] = queue.Queue(MAX_WAITING)
        self._reports: list[Arrival] = []  # taken but not yet in the store: kept while the disk refuses
        self._published: dict[str, bytes] = {}
        self._refresh_at = self._next_look = float("-inf")
        self._lock: TextIOWrapper | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgekit-fleet", daemon=True)

    def start(self) -> Service:
        """Subscribe and work in a thread of its own until `stop`.

        Raises:
            ResourceError: another service serves this folder; two would cut off each other's connection.
        """
        self._lock = (self.folder / ".service.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ResourceError(f"another server serves {self.folder}", "stop it first") from error
        self.subscribe()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Finish the present step and stop; the channel and the store stay open."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lock is not None:
            self._lock.close()

    def subscribe(self) -> None:
        """Ask the channel for every device's hello, reports and block requests."""
        for leaf in ("hello", "report", "request"):
            self.channel.subscribe(messages.topic(self.store.name, "+", leaf), self._arrived)

    def step(self, wait: float = 0.0) -> None:
        """Take what has arrived (waiting up to ``wait`` seconds for something), advance, publish what changed."""
        if len(self._reports) < BATCH:
            for arrival in self._drain(wait):
                self._sort(arrival)
        # Block requests come by the hundred during a wave; only news or the tick is worth a look at every device.
        if self._reports or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + TICK_SECONDS
            self._look()

    def _look(self) -> None:
        now = self.clock()
        changed: dict[str, DeviceState] = {}
        with self.store.transaction():
            for arrival in self._reports:
                self._fold(arrival, changed, now)
            rollouts = self._advance(changed, now)
            self.store.save_devices(changed.values())
        self._reports.clear()
        self.fleet.update(changed)
        self._publish(rollouts)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._refresh()
                self.step(TICK_SECONDS)
            except Exception:  # the loop that must not die: what failed is retried with the next step
                log.exception("a step of the fleet's service failed")
                self.counts["failed steps"] += 1
                self._stopping.wait(TICK_SECONDS)

    def _arrived(self, arrival: Arrival) -> None:
        try:
            self._waiting.put_nowait(arrival)
        except queue.Full:
            self.counts["dropped"] += 1

    def _drain(self, wait: float) -> list[Arrival]:
        arrivals: list[Arrival] = []
        try:
            arrivals.append(self._waiting.get(timeout=wait) if wait else self._waiting.get_nowait())
            while len(arrivals) < BATCH:
                arrivals.append(self._waiting.get_nowait())
        except queue.Empty:
            pass
        return arrivals

    def _sort(self, arrival: Arrival) -> None:
        if not arrival.topic.endswith("/request"):
            self._reports.append(arrival)
            return
        try:
            self._answer(arrival)
        except (MessageError, TransferError) as error:
            self._drop(arrival, error)

    def _answer(self, arrival: Arrival) -> None:
        device = messages.device_of(arrival.topic)
        own = messages.topic(self.store.name, device, "blocks")
        if arrival.reply_to != own:
            # Else a device could have the server write into the topics of another one.
            raise MessageError(f"{device} wants its blocks at {arrival.reply_to!r}, not {own!r}")
        block = repository.read_block(self.folder, messages.decode(arrival.payload, BlockRequest))
        self.channel.publish(own, messages.encode_block(block), correlation=arrival.correlation)
        self.counts["blocks"] += 1

    def _fold(self, arrival: Arrival, changed: dict[str, DeviceState], now: float) -> None:
        try:
            if not arrival.payload:
                return  # a retained hello that an operator cleared
            report = _parse(arrival)
        except MessageError as error:
            self._drop(arrival, error)
            return
        self.counts["reports"] += 1
        old = changed.get(report.device) or self.fleet.get(report.device) or DeviceState(id=report.device)
        new = changed[report.device] = fold(old, report, now)
        if isinstance(report, Hello):
            if (new.boot, new.online) != (old.boot, old.online):
                self._published.pop(report.device, None)  # say again what it should run: a broker may have forgotten
            return
        if not isinstance(report, Health):  # those come every minute and are only worth their last figures
            self.store.remember(report.device, arrival.payload, now)
        if new.outcome != old.outcome:
            self.store.note(new.deployment, f"{new.id} {new.outcome}{': ' if new.reason else ''}{new.reason}", now)

    def _advance(self, changed: dict[str, DeviceState], now: float) -> list[Rollout]:
        fleet = {**self.fleet, **changed}
        for rollout in live(self.store.rollouts()):
            self._advance_one(rollout, fleet, now)
        rollouts = self.store.rollouts()
        for device, state in fleet.items():
            asked = _asked(state, rollouts)
            if asked != state:
                changed[device] = asked
        return rollouts

    def _advance_one(self, rollout: Rollout, fleet: dict[str, DeviceState], now: float) -> None:
        step = advance(rollout, fleet, now)
        if step.assign:
            wave = f"wave {step.rollout.wave + 1} of {len(rollout.plan.waves)}"
            self.store.note(rollout.id, f"{wave} reaches {', '.join(step.assign)}", now)
        self.store.change(rollout.id, lambda _: step.rollout, now)

    def _publish(self, rollouts: Sequence[Rollout]) -> None:
        for device in self.fleet:
            payload = _desired(device, rollouts)
            if self._published.get(device) != payload:
                self.channel.publish(messages.topic(self.store.name, device, "desired"), payload, retain=True)
                self._published[device] = payload

    def _refresh(self) -> None:
        now = self.clock()
        if now < self._refresh_at:
            return
        try:
            publisher.refresh(self.folder, datetime.fromtimestamp(now, UTC))
            self._refresh_at = now + REFRESH_SECONDS
        except (EdgekitError, OSError) as error:
            # Devices go on with the metadata they have until it expires; a missing key must not stop the reports.
            log.warning("cannot sign the repository's timestamp anew: %s", error)
            self._refresh_at = now + RETRY_SECONDS

    def _drop(self, arrival: Arrival, error: Exception) -> None:
        self.counts["dropped"] += 1
        log.warning("dropped a message on %s: %s", arrival.topic, error)


def _parse(arrival: Arrival) -> Report:
    report: Report = messages.decode(arrival.payload, Report)  # type: ignore[arg-type]  # a union is a type to msgspec
    vouched = messages.device_of(arrival.topic)
    if report.device != vouched:
        raise MessageError(f"{vouched} reports as {report.device}", "check that device: it may be hostile")
    return report


def _asked(state: DeviceState, rollouts: Sequence[Rollout]) -> DeviceState:
    for rollout in reversed(rollouts):
        if assignment := rollout.assigned.get(state.id):
            return expect(state, rollout.id, assignment.attempt, rollout.plan.release(assignment.profile))
    return state


def _desired(device: str, rollouts: Sequence[Rollout]) -> bytes:
    rollout = wanted(device, rollouts)
    if rollout is None:
        return b""
    mine = rollout.assigned[device]
    release = rollout.plan.release(mine.profile)
    return messages.encode(
        Desired(deployment=rollout.id, attempt=mine.attempt, release=release, version=rollout.plan.version)
    )
