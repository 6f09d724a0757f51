"""Whose turn it is: which devices the present wave reaches now, stratum by stratum. Does no I/O and reads no clock."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekit.ota.server import filters, pacing
from edgekit.ota.server.strata import quotas, stratum_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.plan import Plan
    from edgekit.ota.server.rollout import Assignment, Rollout
    from edgekit.ota.server.strata import Stratum


@dataclass
class Turns:
    """Whom to ask now, with their strata. ``short``: how many the wave lacks after that; ``due``: how many of those
    will be asked.

    The others are switched off: they count neither for nor against.
    """

    chosen: list[tuple[DeviceState, Stratum]] = field(default_factory=list)
    short: int = 0
    due: int = 0


def lot(device: str, rollout_id: str) -> bytes:
    """Draw a device's place in the queue: the same for ever in one rollout, another in the next."""
    return hashlib.sha256(f"{rollout_id}\0{device}".encode()).digest()


def targets(plan: Plan, fleet: Mapping[str, DeviceState]) -> list[DeviceState]:
    """List the devices that a plan is for, those that have the release already among them."""
    where = filters.parse(plan.where) if plan.where else None
    mine = (one for one in fleet.values() if one.profile in plan.profiles and one.model in ("", plan.model))
    return [one for one in mine if where is None or filters.matches(where, one)]


def is_there(device: DeviceState, plan: Plan) -> bool:
    """Say whether a device runs the release, or a later one."""
    return device.model == plan.model and device.version >= plan.version


def is_busy(rollout: Rollout, assignment: Assignment, device: DeviceState | None, now: float) -> bool:
    """Say whether a device is at it: asked, online, not held by its own policy, and not beyond the plan's patience."""
    if assignment.outcome != "pending" or device is None or not device.online:
        return False
    if device.reason and (device.deployment, device.attempt) == (rollout.id, assignment.attempt):
        return False  # a reason that it gave for another attempt says nothing of this one
    patience = rollout.plan.patience
    return not patience or now - assignment.at < patience


def choose(rollout: Rollout, fleet: Mapping[str, DeviceState], now: float) -> Turns:
    """Choose as many devices of each stratum as the present wave reaches, within the plan's pace and window.

    Those that are to be asked again come first, then one of each stratum that has none yet, then in proportion.
    """
    plan, turns = rollout.plan, Turns()
    slots = _slots(rollout, fleet, now)
    for device, assignment in _to_be_asked_again(rollout, fleet):
        turns.short += 1
        turns.due += device.online
        if _may(device, plan, now) and (not plan.rate or now - assignment.at >= _period(rollout)):
            turns.chosen.append((device, assignment.stratum))
    places: list[tuple[bool, float, Stratum, bytes, DeviceState]] = []
    have, waiting = _by_stratum(rollout, fleet)
    sizes = {one: have[one] + len(waiting[one]) for one in sorted({*have, *waiting})}
    for one, quota in quotas(plan.waves[rollout.wave], sizes).items():
        room = min(quota - have[one], len(waiting[one]))
        if room > 0:
            turns.short += room
            turns.due += min(room, sum(d.online for d in waiting[one]))
            for rank, (lots, device) in enumerate(_queue(rollout, waiting[one], now)[:room], have[one]):
                places.append((rank > 0, (rank + 1) / sizes[one], one, lots, device))
    if plan.is_paced:
        places.sort(key=lambda place: place[:4])
    turns.chosen = [*turns.chosen, *((place[-1], place[2]) for place in places)][:slots]
    turns.short -= len(turns.chosen)
    turns.due = min(turns.short, max(0, turns.due - len(turns.chosen))) if plan.is_paced else 0
    return turns


def _by_stratum(
    rollout: Rollout, fleet: Mapping[str, DeviceState]
) -> tuple[Counter[Stratum], dict[Stratum, list[DeviceState]]]:
    have = Counter(a.stratum or (a.profile,) for a in rollout.assigned.values())
    waiting: dict[Stratum, list[DeviceState]] = defaultdict(list)
    boxed = set(rollout.boxed)
    for device in targets(rollout.plan, fleet):
        if device.id not in rollout.assigned and device.id not in boxed and not is_there(device, rollout.plan):
            waiting[stratum_of(device, rollout.plan)].append(device)
    return have, waiting


def _queue(rollout: Rollout, devices: Sequence[DeviceState], now: float) -> list[tuple[bytes, DeviceState]]:
    """Order those that may be asked by lot, those online first: a canary that is switched off tells nothing."""
    may = [(not d.online, lot(d.id, rollout.id), d) for d in devices if _may(d, rollout.plan, now)]
    return [(lots, device) for _, lots, device in sorted(may, key=lambda one: one[:2])]


def _may(device: DeviceState, plan: Plan, now: float) -> bool:
    # With a pace or a window only who is online is asked: who comes back later would go beyond either.
    return not plan.is_paced or (device.online and pacing.is_its_time(device, plan, now))


def _to_be_asked_again(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> list[tuple[DeviceState, Assignment]]:
    return [(fleet[d], a) for d, a in rollout.assigned.items() if a.outcome == "none" and d in fleet]


def _slots(rollout: Rollout, fleet: Mapping[str, DeviceState], now: float) -> int:
    plan = rollout.plan
    if not (plan.rate or plan.in_flight):
        return pacing.UNLIMITED
    asked = [a.at for a in rollout.assigned.values()]
    busy = sum(is_busy(rollout, a, fleet.get(d), now) for d, a in rollout.assigned.items())
    return pacing.room(plan, asked, busy, rollout.count("installed"), now=now)


def _period(rollout: Rollout) -> float:
    return pacing.allowance(rollout.plan, rollout.count("installed"))[0]
