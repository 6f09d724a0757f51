"""The fleet's server: takes reports, answers block requests, advances rollouts, publishes what devices should run.

Decides nothing itself (`rollout` does) and holds no private key (`keys` does). What it says to a device is
retained desired state, computed from the store, so that a service killed at any instant goes on where it was.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import EdgekitError, MessageError, ResourceError, TransferError, UsageError
from edgekit.ota import messages
from edgekit.ota.messages import (
    BlockRequest,
    Chosen,
    Desired,
    Failed,
    Hello,
    Installed,
    Refused,
    Report,
    RolledBack,
    Waiting,
)
from edgekit.ota.server import publisher, repository, whereabouts
from edgekit.ota.server.fleet import DeviceState, expect, fold, model_of, tell
from edgekit.ota.server.inbox import Inbox
from edgekit.ota.server.keys import CLOSED
from edgekit.ota.server.labels import labelled
from edgekit.ota.server.rollout import advance, live, wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from io import TextIOWrapper
    from pathlib import Path

    from edgekit.ota.channel import Arrival, Back, Channel
    from edgekit.ota.server.keys import Unlock
    from edgekit.ota.server.plan import Plan
    from edgekit.ota.server.post import Post
    from edgekit.ota.server.rollout import Rollout
    from edgekit.ota.server.store import Group, Store

log = logging.getLogger(__name__)

DATABASE = whereabouts.SQLITE
BATCH = 500
LOGGED = 1000
TICK_SECONDS = 1.0
REFRESH_SECONDS = 86_400.0  # a timestamp lives for seven days
RETRY_SECONDS = 60.0
SHARE = "$share/edgekit/"
"""What workers subscribe to with this before it goes to one of them (MQTT 5, clause 4.8.2)."""
KEPT = (Chosen, Failed, Installed, Refused, RolledBack, Waiting)
"""What is said once, and belongs to a device's history."""


class Service:
    """The running server. ``counts`` says how many reports, blocks and dropped messages there were."""

    def __init__(
        self,
        folder: Path,
        channel: Channel,
        store: Store,
        clock: Callable[[], float] = time.time,
        *,
        unlock: Unlock = CLOSED,
    ) -> None:
        self._unlock = unlock
        self.folder = folder
        self.channel = channel
        self.store = store
        self.clock = clock
        self.counts: Counter[str] = Counter()
        self._stamp, self.fleet = store.news(0)
        self._post: Post | None = None
        self._leads = True
        self._waiting = Inbox()
        self._reports: list[Arrival] = []  # taken but not yet in the store: kept while the disk refuses
        self._published: dict[str, tuple[str, int]] = {}  # by topic: the wish and its revision
        self._forgotten = False
        self._refresh_at = self._next_look = float("-inf")
        self._lock: TextIOWrapper | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgekit-fleet", daemon=True)

    def join(self, post: Post) -> Service:
        """Be one of several workers that share the database and split what devices say, before `start`."""
        self._post, self._leads = post, False
        return self

    def start(self) -> Service:
        """Subscribe and work in a thread of its own until `stop`.

        Raises:
            ResourceError: another service serves this folder, and they share no work: see `join`.
        """
        if self._post is None:
            self._lock_folder()
        self.subscribe()
        self._thread.start()
        return self

    def _lock_folder(self) -> None:
        self._lock = (self.folder / ".service.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ResourceError(f"another server serves {self.folder}", "stop it first") from error

    def stop(self) -> None:
        """Finish the present step and stop; the channel and the store stay open."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
            if self._post is not None:
                self._post.resign()
        if self._lock is not None:
            self._lock.close()

    def subscribe(self) -> None:
        """Ask the channel for every device's hello, reports and block requests.

        Workers share reports and requests. A broker gives no retained message to who shares, and an older hello must
        not be taken after a newer one: so who leads takes them all.
        """
        self.channel.when_back(self._on_back)
        for leaf in ("report", "request"):
            topic = messages.topic(self.store.name, "+", leaf)
            self.channel.subscribe(f"{SHARE}{topic}" if self._post else topic, self._arrived)
        if self._post is None:
            self.channel.subscribe(self._hellos, self._arrived)

    def step(self, wait: float = 0.0) -> None:
        """Take what has arrived (waiting up to ``wait`` seconds for something), advance, publish what changed."""
        if len(self._reports) < BATCH:
            for arrival in self._waiting.drain(BATCH, wait):
                self._sort(arrival)
        # Block requests come by the hundred during a wave; only news or the tick is worth a look at every device.
        if self._reports or time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + TICK_SECONDS
            self._look()

    def _look(self) -> None:
        now = self.clock()
        if self._post is not None:
            self._post.renew()
        changed: dict[str, DeviceState] = {}
        groups: Mapping[str, Group] = {}
        with self.store.transaction():
            leads = self._post is None or self._post.confirm()
            self._catch_up()
            self._take(changed, now)
            if leads:
                groups = self.store.groups()
                self._advance(changed, groups, now)
            stamp = self.store.save_devices(changed.values())
            asks = self._hear(leads=leads)
        if asks:
            self._forgotten = False
        self._reports.clear()
        self._know(changed)
        self._stamp = stamp
        if leads != self._leads:
            self._change_lead(leads=leads)
        if leads:
            self._publish(groups)

    def _catch_up(self) -> None:
        """Read what other workers have written; transactions come one after the other, so nothing is left out."""
        if self._post is not None:
            self._stamp, news = self.store.news(self._stamp)
            self._know(news)

    def _know(self, states: Mapping[str, DeviceState]) -> None:
        for device, new in states.items():
            old = self.fleet.get(device)
            if old is None or (new.boot, new.online) != (old.boot, old.online):
                # Say again what it should run: a broker may have forgotten.
                self._published.pop(messages.topic(self.store.name, device, "desired"), None)
            self.fleet[device] = new

    def _hear(self, *, leads: bool) -> bool:
        """Learn whether all wishes are to be said again; who does not lead asks for it, and says that it did."""
        if self._post is None:
            return False
        if leads:
            self._forgotten = self._post.is_asked_again() or self._forgotten
            return False
        if self._forgotten:
            self._post.ask_again()
        return self._forgotten

    def _change_lead(self, *, leads: bool) -> None:
        self._leads = leads
        self._published.clear()
        log.warning("this worker leads the fleet %s %s", self.store.name, "now" if leads else "no longer")
        if leads:
            self.channel.subscribe(self._hellos, self._arrived)
        else:
            self.channel.unsubscribe(self._hellos)

    @property
    def _hellos(self) -> str:
        return messages.topic(self.store.name, "+", "hello")

    def _on_back(self, back: Back) -> None:
        # A broker that lost our session may have lost the wishes.
        self._forgotten = self._forgotten or not back.is_remembered

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
        if not self._waiting.put(arrival):
            self.counts["dropped"] += 1

    def _sort(self, arrival: Arrival) -> None:
        if not arrival.topic.endswith("/request"):
            if self._leads or not arrival.topic.endswith("/hello"):
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

    def _take(self, changed: dict[str, DeviceState], now: float) -> None:
        taken = [(arrival, self._read(arrival)) for arrival in self._reports]
        reports = [(arrival, report) for arrival, report in taken if report is not None]
        kept = [isinstance(report, KEPT) for _, report in reports]
        pairs = [
            (report.device, arrival.payload) for (arrival, report), keep in zip(reports, kept, strict=True) if keep
        ]
        is_new = iter(self.store.remember_all(pairs, now))
        for (_, report), keep in zip(reports, kept, strict=True):
            self._fold(report, changed, now, is_new=not keep or next(is_new))

    def _read(self, arrival: Arrival) -> Report | None:
        if not arrival.payload:
            return None  # a retained hello that an operator cleared
        try:
            return _parse(arrival)
        except MessageError as error:
            self._drop(arrival, error)
            return None

    def _fold(self, report: Report, changed: dict[str, DeviceState], now: float, *, is_new: bool) -> None:
        self.counts["reports"] += 1
        old = changed.get(report.device) or self.fleet.get(report.device) or DeviceState(id=report.device)
        new = changed[report.device] = fold(old, report, now)
        if isinstance(report, Hello):
            return
        if isinstance(report, Chosen) and is_new:
            left = "".join(f"; not {name}: {why}" for name, why in report.left.items())
            self.store.note(report.device, f"{report.device} runs the variant {report.variant}{left}", now)
        self._note_alerts(old, new, now)
        if new.outcome != old.outcome:
            self.store.note(new.deployment, f"{new.id} {new.outcome}{': ' if new.reason else ''}{new.reason}", now)

    def _note_alerts(self, old: DeviceState, new: DeviceState, now: float) -> None:
        """Write into the diary which alerts a device has raised, and which have passed."""
        before, after = ({(alert.kind, alert.what): alert for alert in state.alerts} for state in (old, new))
        for key in after.keys() - before.keys():
            alert = after[key]
            self.store.note(new.id, f"{alert.kind}: {alert.what} is {alert.value:.4g}, limit {alert.limit:.4g}", now)
        for kind, what in before.keys() - after.keys():
            self.store.note(new.id, f"{kind}: {what} has passed", now)

    def _advance(self, changed: dict[str, DeviceState], groups: Mapping[str, Group], now: float) -> None:
        fleet = labelled({**self.fleet, **changed}, self.store.settings("tags/"), groups)
        changed.update((name, one) for name, one in fleet.items() if one is not self.fleet.get(name))
        for rollout in live(self.store.rollouts()):
            self._advance_one(rollout, fleet, now)
        rollouts = self.store.rollouts()
        for device, state in fleet.items():
            asked = _asked(tell(state, _wish(device, rollouts), now), rollouts, groups)
            if asked != state:
                changed[device] = asked

    def _advance_one(self, rollout: Rollout, fleet: dict[str, DeviceState], now: float) -> None:
        step = advance(rollout, fleet, now)
        if step.assign:
            wave = f"wave {step.rollout.wave + 1} of {len(rollout.plan.waves)}"
            self.store.note(rollout.id, f"{wave} reaches {', '.join(step.assign)}", now)
        self.store.change(rollout.id, lambda _: step.rollout, now)
        if step.back is not None:
            self._take_back(step.rollout.id, step.back, now)

    def _take_back(self, halted: str, plan: Plan, now: float) -> None:
        try:
            back = self.store.start(plan, now)
            self.store.note(halted, f"{back.id} takes the reached devices to version {plan.version}", now)
        except UsageError as error:  # the halt stands all the same
            self.store.note(halted, f"the reached devices were not taken back: {error.message}", now)

    def _publish(self, groups: Mapping[str, Group]) -> None:
        if self._forgotten:
            self._forgotten = False
            self._published.clear()
        wishes = {messages.topic(self.store.name, d.id, "desired"): (d.wish, d.revision) for d in self.fleet.values()}
        for name, group in groups.items():
            wish = messages.encode(group.wish).decode() if group.wish else ""
            wishes[messages.group_topic(self.store.name, name)] = (wish, group.wish.revision if group.wish else 0)
        try:
            for topic, (wish, revision) in wishes.items():
                if self._published.get(topic) != (wish, revision):
                    if self._post is not None and not self._post.is_fresh():
                        return  # another may lead by now
                    self.channel.publish(topic, _payload(wish, revision), retain=True)
                    self._published[topic] = (wish, revision)
        except TransferError as error:  # a full queue: the rest goes with the next step
            log.warning("some wishes have to wait: %s", error)

    def _refresh(self) -> None:
        now = self.clock()
        if now < self._refresh_at or not self._leads:
            return
        try:
            for warning in publisher.refresh(self.folder, datetime.fromtimestamp(now, UTC), self._unlock):
                log.warning("%s", warning)
            self._refresh_at = now + REFRESH_SECONDS
        except (EdgekitError, OSError) as error:
            # Devices go on with the metadata they have until it expires; a missing key must not stop the reports.
            log.warning("cannot sign the repository's timestamp anew: %s", error)
            self._refresh_at = now + RETRY_SECONDS

    def _drop(self, arrival: Arrival, error: Exception) -> None:
        self.counts["dropped"] += 1
        if self.counts["dropped"] <= LOGGED or self.counts["dropped"] % LOGGED == 0:  # a flood must not fill the disk
            log.warning("dropped a message on %s, %d so far: %s", arrival.topic, self.counts["dropped"], error)


def _parse(arrival: Arrival) -> Report:
    report: Report = messages.decode(arrival.payload, Report)  # type: ignore[arg-type]  # a union is a type to msgspec
    vouched = messages.device_of(arrival.topic)
    if report.device != vouched:
        raise MessageError(f"{vouched} reports as {report.device}", "check that device: it may be hostile")
    return report


def _asked(state: DeviceState, rollouts: Sequence[Rollout], groups: Mapping[str, Group]) -> DeviceState:
    """Return the device as asked for the wish that it obeys: its own before its groups', as on the device itself."""
    told = [(wish.revision, name, wish) for name in state.groups if name in groups and (wish := groups[name].wish)]
    if told and not state.wish:
        wish = max(told)[2]
        release = f"models/{model_of(wish.release)}/{state.profile}/{wish.version}.json"
        return expect(state, wish.deployment, wish.attempt, release)
    for rollout in reversed(rollouts):
        assignment = rollout.assigned.get(state.id)
        if assignment and assignment.outcome != "none":
            return expect(state, rollout.id, assignment.attempt, rollout.plan.release(assignment.profile))
    return state


def _wish(device: str, rollouts: Sequence[Rollout]) -> str:
    rollout = wanted(device, rollouts)
    if rollout is None:
        return ""
    mine, plan = rollout.assigned[device], rollout.plan
    release = plan.release(mine.profile)
    wish = Desired(
        deployment=rollout.id, attempt=mine.attempt, release=release, version=plan.version, spread=plan.spread
    )
    return messages.encode(wish).decode()


def _payload(wish: str, revision: int) -> bytes:
    if not wish:
        return b""
    return messages.encode(msgspec.structs.replace(messages.decode(wish.encode(), Desired), revision=revision))
