"""Who gets a release next, and when to stop. Does no I/O and reads no clock.

Each step is values in, values out, and remembers whom it chose: repeated after a crash it chooses nobody twice
and leaves nobody out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec.structs import replace

from edgekit.errors import UsageError
from edgekit.ota.messages import Identifier
from edgekit.ota.server import judging, penalties
from edgekit.ota.server.fleet import DeviceState, Outcome
from edgekit.ota.server.judging import Reading, Tally, Test
from edgekit.ota.server.plan import Plan
from edgekit.ota.server.strata import Stratum
from edgekit.ota.server.turns import choose, is_busy, is_there, lot, targets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgekit.ota.server.turns import Turns

Status = Literal["proposed", "running", "paused", "halted", "done", "aborted"]
FAILURES: tuple[Outcome, ...] = ("rolled-back", "refused")
ANSWERS: tuple[Outcome, ...] = ("installed", *FAILURES)
STARTS_PER_SECOND = 10
"""So many downloads begin in a second, if nobody says otherwise."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device that was asked: in which wave, which attempt, when, and how it answered so far.

    An outcome of none: it is to be asked again, and has not been yet. ``reading``: what it bears witness to.
    """

    wave: int
    profile: str
    attempt: int = 1
    outcome: Outcome = "pending"
    at: float = 0.0
    stratum: Stratum = ()
    reading: Reading | None = None


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan on its way. ``settled`` is when the present wave was first seen to have answered.

    ``baseline`` is how many devices of each class failed before it began, and of how many; ``boxed`` are skipped.
    ``halted_by`` names what halted it; a test that did and was resumed after is ``waived``.
    """

    id: Identifier
    plan: Plan
    status: Status = "running"
    wave: int = 0
    assigned: dict[str, Assignment] = {}
    settled: float | None = None
    reason: str = ""
    baseline: dict[str, Tally] = {}
    boxed: tuple[str, ...] = ()
    halted_by: str = ""
    waived: tuple[Test, ...] = ()
    started_by: str = ""
    approved_by: str = ""

    def count(self, *outcomes: str) -> int:
        """Count the devices that answered so."""
        return sum(a.outcome in outcomes for a in self.assigned.values())


@dataclass(frozen=True)
class Step:
    """What to do now: whom to ask, the rollout to remember before that, and the way back to start where it halted."""

    assign: list[str]
    rollout: Rollout
    back: Plan | None = None


def begin(name: str, plan: Plan, before: Sequence[Rollout], released: Mapping[str, str] | None = None) -> Rollout:
    """Return a new rollout, judged by what is known of those before it: of each class, how many devices failed."""
    tallies: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for rollout in before:
        if rollout.status == "done" and not rollout.halted_by:  # a bad release is no baseline
            for one in rollout.assigned.values():
                tallies[one.profile] += one.outcome in ANSWERS
                hits[one.profile] += one.outcome in FAILURES
    baseline = {profile: Tally(hits[profile], tries) for profile, tries in sorted(tallies.items()) if tries}
    return Rollout(id=name, plan=plan, baseline=baseline, boxed=penalties.boxed(before, plan.penalty, released))


def advance(rollout: Rollout, fleet: Mapping[str, DeviceState], now: float) -> Step:
    """Take in the answers, then halt, open waves, or finish.

    The next wave opens when every reached device that is online has answered, more than half of the wave's devices
    did, the failures are within the limit, no test says stop, and the wave was watched for the plan's dwell time. An
    offline device counts neither for nor against. A rollout that is done still serves devices that join later.
    """
    rollout = _observe(rollout, fleet)
    if rollout.status not in ("running", "done"):
        return Step([], rollout)
    halted = _halts(rollout, fleet) if rollout.status == "running" else None
    if halted is not None:
        return Step([], halted, back(halted) if rollout.plan.back else None)
    opened = _open(rollout, fleet, now)
    before = rollout.assigned
    return Step([d for d, a in opened.assigned.items() if a.outcome == "pending" and _is_new(a, before.get(d))], opened)


def pause(rollout: Rollout) -> Rollout:
    """Stop choosing devices; those already asked go on.

    Raises:
        UsageError: the rollout is not running.
    """
    _need(rollout, "pause", ("running", "paused"))
    return replace(rollout, status="paused", reason="paused by the operator")


def resume(rollout: Rollout) -> Rollout:
    """Go on. After a halt the devices that failed are asked once more, and a test that halted it says no more.

    Raises:
        UsageError: the rollout is done, aborted, or nobody has approved it yet.
    """
    _need(rollout, "resume", ("running", "paused", "halted"))
    if rollout.status == "halted":
        rollout = _again(rollout, FAILURES)
        tests = [test for test in judging.TESTS if test == rollout.halted_by != "failures"]
        rollout = replace(rollout, waived=tuple(dict.fromkeys((*rollout.waived, *tests))))
    return replace(rollout, status="running", settled=None, reason="")


def abort(rollout: Rollout, reason: str = "aborted by the operator") -> Rollout:
    """End for good; devices that have not installed the release are no longer asked to.

    Raises:
        UsageError: the rollout is done.
    """
    _need(rollout, "abort", ("proposed", "running", "paused", "halted", "aborted"))
    if rollout.status == "aborted":
        return rollout
    had = f"; it had halted: {rollout.reason}" if rollout.status == "halted" else ""
    return replace(rollout, status="aborted", reason=reason + had)


def retry(rollout: Rollout) -> Rollout:
    """Ask the devices that failed once more, as a new attempt; one that is done runs again.

    Raises:
        UsageError: the rollout is aborted, halted (resume it) or nobody has approved it yet.
    """
    _need(rollout, "retry the failed of", ("running", "paused", "done"))
    again = _again(rollout, (*FAILURES, "failed"))
    if again == rollout or rollout.status != "done":
        return again
    return replace(again, status="running", reason="")


def promote(rollout: Rollout, wave: int | None = None) -> Rollout:
    """Open a wave by hand, counted from 0, by default the next; one that is open already stays so.

    Raises:
        UsageError: there is no such wave, or the rollout is neither running nor paused.
    """
    _need(rollout, "promote", ("running", "paused"))
    to = rollout.wave + 1 if wave is None else wave
    if not 0 <= to < len(rollout.plan.waves):
        raise UsageError(
            f"rollout {rollout.id} has no wave {to + 1}, it has {len(rollout.plan.waves)}", "wave 1 is the canary"
        )
    return rollout if to <= rollout.wave else replace(rollout, wave=to, settled=None)


def propose(rollout: Rollout, by: str) -> Rollout:
    """Return a rollout that waits for somebody else's approval.

    Raises:
        UsageError: nobody is named.
    """
    if not by:
        raise UsageError("a proposal needs a name", "say who you are with --by NAME")
    return replace(rollout, status="proposed", started_by=by, reason="waits for approval by somebody else")


def approve(rollout: Rollout, by: str) -> Rollout:
    """Let a proposed rollout begin; approved twice by the same person it is approved once.

    Raises:
        UsageError: nobody is named, or who proposed it, or it is past that.
    """
    if by and rollout.approved_by == by:
        return rollout
    _need(rollout, "approve", ("proposed",))
    if not by or by == rollout.started_by:
        raise UsageError(
            f"rollout {rollout.id} was proposed by {rollout.started_by}: somebody else has to approve it",
            "give another name with --by NAME",
        )
    return replace(rollout, status="running", approved_by=by, reason="")


def release(rollout: Rollout, devices: Iterable[str]) -> Rollout:
    """Let devices out of the penalty box; a rollout that goes on reaches them from now on."""
    left = set(rollout.boxed).difference(devices)
    return rollout if len(left) == len(rollout.boxed) else replace(rollout, boxed=tuple(sorted(left)))


def back(rollout: Rollout, version: int = 0) -> Plan:
    """Return the plan that takes what runs the release to a version that holds the old bundle, all at once.

    No device ever goes down in version, so that the way back is signed like every other: the old bundle, published
    anew.

    Raises:
        UsageError: that version is not above the release's.
    """
    old = replace(rollout.plan, back=version) if version else rollout.plan
    plan = Plan(model=old.model, version=max(old.back, 1), profiles=old.profiles, waves=(1.0,), max_failures=1.0)
    return replace(plan, where=f"version = {old.version}", spread=old.spread)


def wanted(device: str, rollouts: Sequence[Rollout]) -> Rollout | None:
    """Return the rollout whose release the device should run: the newest that reached it and was not called off.

    ``rollouts`` are in the order they were started. A halted or aborted one stands only where it is installed.
    """
    for rollout in reversed(rollouts):
        assignment = rollout.assigned.get(device)
        stands = rollout.status in ("running", "paused", "done")
        if assignment and assignment.outcome != "none" and (stands or assignment.outcome == "installed"):
            return rollout
    return None


def live(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """List those that still have something to decide: all but, of each model, the ones an other done one replaced.

    One with a filter replaces none: whom it leaves out still needs the one before.
    """
    replaced: set[str] = set()
    kept: list[Rollout] = []
    for rollout in reversed(rollouts):
        if rollout.status != "done" or rollout.plan.model not in replaced:
            kept.append(rollout)
        if rollout.status == "done" and not rollout.plan.where:
            replaced.add(rollout.plan.model)
    return kept[::-1]


def spread(devices: int) -> float:
    """Return over how many seconds so many devices should begin to download; at most an hour."""
    return min(3600.0, round(devices / STARTS_PER_SECOND, 1))


def _is_new(now: Assignment, before: Assignment | None) -> bool:
    return before is None or (before.outcome == "none" and now.at >= before.at)


def _observe(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> Rollout:
    news: dict[str, Assignment] = {}
    for device, assignment in rollout.assigned.items():
        state = fleet.get(device)
        if state is None or state.outcome == assignment.outcome:
            continue
        if (state.deployment, state.attempt) == (rollout.id, assignment.attempt):
            news[device] = replace(assignment, outcome=state.outcome)
    news.update(_readings(rollout, fleet, news))
    return replace(rollout, assigned={**rollout.assigned, **news}) if news else rollout


def _readings(
    rollout: Rollout, fleet: Mapping[str, DeviceState], news: Mapping[str, Assignment]
) -> dict[str, Assignment]:
    """Let each device that has installed the release, and has reported enough since, bear witness once."""
    how = rollout.plan.judging
    if how is None or rollout.status != "running":
        return {}
    ready = []
    for device, known in rollout.assigned.items():
        if known.reading is None:
            assignment = news.get(device, known)
            if assignment.outcome == "installed" and device in fleet and judging.is_ready(fleet[device], how):
                ready.append((device, assignment))
    if not ready:
        return {}
    taken = {a.reading.partner for a in rollout.assigned.values() if a.reading is not None}
    # Whoever does not run it yet is held against it, in the order of their lots: no device chooses its partner.
    others = [one for one in targets(rollout.plan, fleet) if not is_there(one, rollout.plan)]
    others = [one for one in others if _is_untouched(rollout.assigned.get(one.id))]
    others.sort(key=lambda one: lot(one.id, rollout.id))
    controls = judging.Controls(others, how, taken)
    return {d: replace(a, reading=judging.read(fleet[d], controls, how)) for d, a in ready}


def _is_untouched(assignment: Assignment | None) -> bool:
    return assignment is None or (assignment.attempt == 1 and assignment.outcome in ("none", "pending"))


def _halts(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> Rollout | None:
    by, why = "limit", _over_limit(rollout)
    how = rollout.plan.judging
    if not why and how is not None:
        witnesses = [_witness(a, fleet.get(d)) for d, a in rollout.assigned.items()]
        verdict = judging.judge(witnesses, how, rollout.baseline, waived=rollout.waived)
        if verdict is not None:
            by, why = verdict.test, f"{verdict.why}, in wave {rollout.wave + 1}"
    return replace(rollout, status="halted", reason=why, halted_by=by) if why else None


def _witness(one: Assignment, device: DeviceState | None) -> judging.Witness:
    # Who is still at it counts as not failed, for failures answer sooner; who is offline does not count at all.
    is_at_it = one.outcome in ("pending", "failed") and device is not None and device.online
    return judging.Witness(one.profile, one.outcome in FAILURES, one.outcome in ANSWERS or is_at_it, one.reading)


def _over_limit(rollout: Rollout) -> str:
    limit = rollout.plan.max_failures
    if isinstance(limit, int):
        failed = rollout.count(*FAILURES)
        return _why(rollout, failed, len(rollout.assigned), f"{limit}") if failed > limit else ""
    reached = Counter(a.profile for a in rollout.assigned.values())
    hurt = Counter(a.profile for a in rollout.assigned.values() if a.outcome in FAILURES)
    for profile, failed in sorted(hurt.items()):
        if failed > limit * reached[profile]:
            return _why(rollout, failed, reached[profile], f"{limit:.0%}", profile=profile)
    return ""


def _why(rollout: Rollout, failed: int, reached: int, limit: str, *, profile: str = "") -> str:
    kinds = Counter(a.outcome for a in rollout.assigned.values() if a.outcome in FAILURES)
    split = ", ".join(f"{kinds[k]} {k}" for k in FAILURES if kinds[k])
    of = f"reached {profile} devices" if profile else "reached devices"
    return f"{failed} of {reached} {of} failed ({split}), limit {limit}, in wave {rollout.wave + 1}"


def _fill(rollout: Rollout, turns: Turns, now: float) -> Rollout:
    if not turns.chosen:
        return rollout
    added = dict(rollout.assigned)
    for device, stratum in turns.chosen:
        before = added.get(device.id)
        if before is None:
            added[device.id] = Assignment(wave=rollout.wave, profile=device.profile, at=now, stratum=stratum)
        else:
            added[device.id] = replace(before, outcome="pending", at=now)
    return replace(rollout, assigned=added)


def _open(rollout: Rollout, fleet: Mapping[str, DeviceState], now: float) -> Rollout:
    """Ask whom the wave reaches; open wave after wave as long as each has answered and was watched long enough."""
    while True:
        turns = choose(rollout, fleet, now)
        rollout = _fill(rollout, turns, now)
        if rollout.status != "running" or not _settled(rollout, fleet, turns, now):
            return replace(rollout, settled=None)
        since = now if rollout.settled is None else rollout.settled
        if now - since < rollout.plan.dwell:
            return replace(rollout, settled=since)
        if rollout.wave + 1 == len(rollout.plan.waves):
            return replace(rollout, status="done", settled=None, reason=_tally(rollout.assigned.values()))
        rollout = replace(rollout, wave=rollout.wave + 1, settled=None)


def _settled(rollout: Rollout, fleet: Mapping[str, DeviceState], turns: Turns, now: float) -> bool:
    if turns.due or any(is_busy(rollout, a, fleet.get(d), now) for d, a in rollout.assigned.items()):
        return False
    if not rollout.assigned and not targets(rollout.plan, fleet):
        return False
    if rollout.wave + 1 == len(rollout.plan.waves):
        return rollout.count(*ANSWERS) == len(rollout.assigned) and not turns.short
    wave = [a for a in rollout.assigned.values() if a.wave == rollout.wave]
    answered = sum(a.outcome in ANSWERS for a in wave)
    return answered * 2 > len(wave) + turns.short or not (wave or turns.short)


def _tally(assignments: Iterable[Assignment]) -> str:
    counts = Counter(a.outcome for a in assignments)
    return ", ".join(f"{counts[k]} {k}" for k in ANSWERS if counts[k]) or "every device had it already"


def _again(rollout: Rollout, outcomes: Sequence[str]) -> Rollout:
    """Let devices that answered so be asked once more, when it is their turn."""
    news = {
        device: replace(one, attempt=one.attempt + 1, outcome="none", reading=None)
        for device, one in rollout.assigned.items()
        if one.outcome in outcomes
    }
    return replace(rollout, assigned={**rollout.assigned, **news}) if news else rollout


def _need(rollout: Rollout, verb: str, statuses: tuple[Status, ...]) -> None:
    if rollout.status not in statuses:
        raise UsageError(f"cannot {verb} rollout {rollout.id}: it is {rollout.status}", "start a new one")
