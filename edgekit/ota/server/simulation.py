"""Plays a rollout over a fleet that is made up: the same code that decides for a real one, and a clock moved by hand.

Does no I/O and reads no clock; the same seed gives the same story. What a device does is drawn here; what the server
makes of it are `fold`, `expect` and `advance`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from random import Random
from typing import TYPE_CHECKING

import msgspec

from edgekit.ota.messages import Alert, Drift, Health, Hello, Installed, RolledBack
from edgekit.ota.server import filters
from edgekit.ota.server.fleet import DeviceState, expect, fold
from edgekit.ota.server.judging import Tally
from edgekit.ota.server.rollout import Rollout, advance, begin, live
from edgekit.ota.server.scenario import plan_of
from edgekit.ota.server.strata import Stratum, stratum_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgekit.ota.server.plan import Plan
    from edgekit.ota.server.scenario import Fault, Scenario

TICK = 60.0
DAY = 86_400.0
PAST_REPORTS = 4
HOUR = 3600.0
BUNDLES = {1: "a" * 64, 2: "b" * 64, 3: "a" * 64}
ALERT = Alert(kind="output-drift", what="answers", value=0.5, limit=0.2, since=0.0)


class Part(msgspec.Struct, frozen=True):
    """What became of one stratum."""

    stratum: Stratum
    devices: int
    reached: int
    installed: int
    failed: int
    hurt: int


class Story(msgspec.Struct, frozen=True):
    """What would have happened. ``hurt``: devices on which the release's own fault came out; ``hours`` until the end.

    ``opened``: after how many hours each wave was first seen open. ``back``: devices that were taken back.
    """

    status: str
    reason: str
    halted_by: str
    hours: float
    wave: int
    opened: tuple[float, ...]
    devices: int
    reached: int
    installed: int
    failed: int
    hurt: int
    back: int
    parts: tuple[Part, ...]


def play(
    scenario: Scenario, seed: int = 0, watch: Callable[[Rollout, dict[str, DeviceState], float], None] | None = None
) -> Story:
    """Play a scenario until it is done, halted, or out of hours. ``watch`` sees each step's rollout, fleet and time."""
    world = _World(scenario, Random(seed))  # noqa: S311  # draws a story, protects nothing
    plan = plan_of(scenario)
    known = {one: Tally(round(scenario.fleet.flaky * scenario.fleet.past * w), round(scenario.fleet.past * w))
             for one, w in _normal(scenario.fleet.classes).items()}  # fmt: skip
    first = msgspec.structs.replace(begin("model-v2", plan, ()), baseline=known if scenario.fleet.past else {})
    rollouts, opened = [first], [0.0]
    now, end = scenario.start, scenario.start + scenario.hours * HOUR
    while now < end and not _is_over(rollouts, world):
        if world.pass_time(now):
            rollouts = world.step(rollouts, now)
            opened += [(now - scenario.start) / HOUR] * (rollouts[0].wave + 1 - len(opened))
            if watch is not None:
                watch(rollouts[-1], world.states, now)
        now += TICK
    return _told(rollouts, world, tuple(opened), (now - scenario.start) / HOUR)


def _is_over(rollouts: Sequence[Rollout], world: _World) -> bool:
    last = rollouts[-1]
    if last.status == "halted":
        return not last.plan.back
    if last is not rollouts[0]:  # a way back: until all that are there have come
        return not any(one.online and one.version == rollouts[0].plan.version for one in world.states.values())
    return last.status == "done"


class _World:
    """The devices, and what is going to happen to them, by its time."""

    def __init__(self, scenario: Scenario, random: Random) -> None:
        self.scenario = scenario
        self.random = random
        self.states: dict[str, DeviceState] = {}
        self.hurt: set[str] = set()
        self.faults: dict[str, Fault] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._speed: dict[str, float] = {}
        self._slow: dict[str, float] = {}
        self._number: Counter[str] = Counter()
        self._alerting: set[str] = set()
        self._looked = -math.inf
        for number in range(scenario.fleet.devices):
            self._make(f"d{number:06}")

    def at(self, when: float, what: Callable[[float], None]) -> None:
        """Let something happen later."""
        heapq.heappush(self._events, (when, next(self._order), what))

    def pass_time(self, now: float) -> bool:
        """Let happen what is due; say whether anybody should look."""
        happened = False
        while self._events and self._events[0][0] <= now:
            when, _, what = heapq.heappop(self._events)
            what(when)
            happened = True
        plan = self.scenario.plan
        # What has no pace has time: the tail of a rollout, that waits for who is switched off, is long.
        lasted = (now - self.scenario.start) / 50
        patient = TICK if plan.rate or plan.in_flight else min(0.5 * HOUR, max(5 * TICK, lasted))
        if now - self._looked >= (patient if happened else max(patient, 10 * TICK)):
            self._looked = now
            return True
        return False

    def step(self, rollouts: Sequence[Rollout], now: float) -> list[Rollout]:
        """Advance what is live as the service does, and ask whom it chose."""
        after = {one.id: one for one in rollouts}
        for one in live(rollouts):
            step = advance(one, self.states, now)
            after[one.id] = step.rollout
            if step.back is not None:
                after["back"] = begin("back", step.back, list(after.values()))
            for device in step.assign:
                self._ask(device, step.rollout, now)
        return list(after.values())

    def _make(self, name: str) -> None:
        random, fleet = self.random, self.scenario.fleet
        profile, region, runtime = (_drawn(random, of) for of in (fleet.classes, fleet.regions, fleet.runtimes))
        facts = {"runtime": runtime} | ({"timezone": fleet.zones[region]} if region in fleet.zones else {})
        state = DeviceState(id=name, tags={"region": region})
        start = self.scenario.start
        self.states[name] = fold(state, self._hello(name, profile, version=1, facts=facts), start)
        self._speed[name] = 20.0 * math.exp(random.gauss(0, 0.3))
        self._slow[name] = random.gauss(0, fleet.noise)
        if random.random() < fleet.alerting:
            self._alerting.add(name)
        for fault in self.scenario.faults:
            if not fault.where or filters.matches(filters.parse(fault.where), self.states[name]):
                self.faults[name] = fault
        for _ in range(PAST_REPORTS):
            self._report(name, start)
        self.at(start + random.uniform(0, 4 * fleet.health), lambda at: self._health(name, 1, at))
        if fleet.offline:
            if random.random() < fleet.offline:
                self._leave(name, start)
            elif fleet.offline < 1:
                self._stay(name, start)

    def _hello(self, name: str, profile: str, *, version: int, facts: dict[str, str], online: bool = True) -> Hello:
        release = f"models/model/{profile}/{version}.json"
        return Hello(
            device=name, profile=profile, boot="b", online=online, release=release, version=version,
            bundle=BUNDLES[version], facts=facts,
        )  # fmt: skip

    def _leave(self, name: str, now: float) -> None:
        state = self.states[name]
        self.states[name] = msgspec.structs.replace(state, online=False)
        self.at(now + self.random.expovariate(1 / self.scenario.fleet.away), lambda at: self._return(name, at))

    def _return(self, name: str, now: float) -> None:
        self.states[name] = msgspec.structs.replace(self.states[name], online=True)
        self._stay(name, now)
        if self.states[name].outcome == "pending":
            self._install(name, now)

    def _stay(self, name: str, now: float) -> None:
        fleet = self.scenario.fleet
        if fleet.offline < 1:
            mean = fleet.away * (1 - fleet.offline) / fleet.offline
            self.at(now + self.random.expovariate(1 / mean), lambda at: self._leave(name, at))

    def _ask(self, name: str, rollout: Rollout, now: float) -> None:
        mine = rollout.assigned[name]
        self.states[name] = expect(self.states[name], rollout.id, mine.attempt, rollout.plan.release(mine.profile))
        if self.states[name].online:
            self._install(name, now)

    def _install(self, name: str, now: float) -> None:
        mean = self.scenario.fleet.install
        word = (self.states[name].deployment, self.states[name].attempt)
        self.at(now + mean * math.exp(self.random.gauss(0, 0.5)), lambda at: self._answer(name, word, at))

    def _answer(self, name: str, word: tuple[str, int], now: float) -> None:
        state = self.states[name]
        if (state.deployment, state.attempt) != word or state.outcome != "pending" or not state.online:
            return  # it was switched off meanwhile, and begins anew when it is back
        fault, version = self.faults.get(name), 3 if word[0] == "back" else 2
        head = {"device": name, "deployment": word[0], "attempt": word[1], "version": version}
        ill = version == 2 and fault is not None and self.random.random() < fault.failures
        if ill or self.random.random() < self.scenario.fleet.flaky:
            self.hurt.update([name] if ill else [])
            self.states[name] = fold(state, msgspec.convert({**head, "reason": "it was bad"}, RolledBack), now)
            return
        state = fold(state, msgspec.convert({**head, "bundle": BUNDLES[version]}, Installed), now)
        self.states[name] = state
        self._slow[name] = self.random.gauss(0, self.scenario.fleet.noise)
        self.at(now + self.random.uniform(0, self.scenario.fleet.health), lambda at: self._health(name, version, at))
        self.hurt.update([name] if version == 2 and fault and (fault.latency or fault.errors or fault.drift) else [])
        if version == 2 and fault is not None and self.random.random() < fault.drift:
            self._alerting.add(name)

    def _health(self, name: str, version: int, now: float) -> None:
        # It saves time that who has borne witness reports no more here, and who was not reached less often.
        state, judging = self.states[name], self.scenario.plan.judging
        told = state.record.reports if version > 1 and state.record and state.record.bundle == state.bundle else 0
        if judging is None or state.version != version or told > judging.reports:
            return
        if state.online:
            self._report(name, now)
        often = 1 if version > 1 else 4
        self.at(now + often * self.scenario.fleet.health, lambda at: self._health(name, version, at))

    def _report(self, name: str, now: float) -> None:
        random, fleet, state = self.random, self.scenario.fleet, self.states[name]
        fault = self.faults.get(name) if state.version == 2 else None
        p95 = self._speed[name] * math.exp(self._slow[name] + random.gauss(0, 0.03))
        p95 *= (1 + (fault.latency if fault else 0)) * (1 + fleet.swing * math.sin(math.tau * now / DAY))
        rate = fleet.error_rate + (fault.errors if fault else 0)
        self._number[name] += 1
        health = Health(
            device=name, bundle=state.bundle, requests=fleet.requests, errors=_binomial(random, fleet.requests, rate),
            p95_ms=p95, boot="b", number=self._number[name],
        )  # fmt: skip
        if (name in self._alerting) != bool(state.alerts):
            alerts = (ALERT,) if name in self._alerting else ()
            state = fold(state, Drift(device=name, bundle=state.bundle, alerts=alerts), now)
        self.states[name] = fold(state, health, now)


def _binomial(random: Random, tries: int, share: float) -> int:
    """Draw how many of so many; by the gaps between hits, for shares are small."""
    if share <= 0:
        return 0
    hits, at = 0, 0
    while share < 1:
        at += int(math.log(1.0 - random.random()) / math.log1p(-share)) + 1
        if at > tries:
            return hits
        hits += 1
    return tries


def _drawn(random: Random, weights: dict[str, float]) -> str:
    return random.choices(list(weights), list(weights.values()))[0]


def _normal(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: one / total for name, one in weights.items()}


def _told(rollouts: Sequence[Rollout], world: _World, opened: tuple[float, ...], hours: float) -> Story:
    first = rollouts[0]
    plan: Plan = first.plan
    rows: dict[Stratum, Counter[str]] = {}
    for name, state in world.states.items():
        row = rows.setdefault(stratum_of(state, plan), Counter())
        mine = first.assigned.get(name)
        row["devices"] += 1
        row["reached"] += mine is not None
        row["installed"] += mine is not None and mine.outcome == "installed"
        row["failed"] += mine is not None and mine.outcome in ("rolled-back", "refused")
        row["hurt"] += name in world.hurt
    names = ("devices", "reached", "installed", "failed", "hurt")
    parts = tuple(Part(one, *(row[name] for name in names)) for one, row in sorted(rows.items()))
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    back = sum(one.count("installed") for one in rollouts[1:])
    return Story(
        status=first.status, reason=first.reason, halted_by=first.halted_by, hours=round(hours, 2), wave=first.wave + 1,
        opened=tuple(round(one, 2) for one in opened), back=back, parts=parts, **sums,
    )  # fmt: skip
