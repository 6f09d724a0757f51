"""Who gets a release next, and when to stop. Does no I/O and reads no clock.

Each step is values in, values out, and remembers whom it chose: repeated after a crash it chooses nobody twice
and leaves nobody out.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec.structs import replace

from edgekit.errors import UsageError
from edgekit.manifest import Name
from edgekit.ota.messages import MAX_SPREAD, Identifier
from edgekit.ota.server.fleet import DeviceState, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Status = Literal["running", "paused", "halted", "done", "aborted"]
FAILURES: tuple[Outcome, ...] = ("rolled-back", "refused")
ANSWERS: tuple[Outcome, ...] = ("installed", *FAILURES)
STARTS_PER_SECOND = 10
"""So many downloads begin in a second, if nobody says otherwise."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which release, to which hardware classes, in which waves.

    ``waves`` are cumulative shares of each class (stratified: every class is in the canary). ``max_failures`` is a
    count over the rollout, or a share of the reached devices of any one class. ``dwell`` is how many seconds a wave
    that has answered is watched before the next one opens; ``spread`` the seconds over which downloads begin.
    """

    model: Name
    version: Annotated[int, msgspec.Meta(ge=1)]
    profiles: tuple[str, ...]
    waves: tuple[float, ...] = (0.2, 1.0)
    max_failures: int | float = 0
    dwell: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        """Refuse waves and limits that make no sense."""
        rising = all(0.0 < low < high for low, high in zip(self.waves, self.waves[1:], strict=False))
        if not self.waves or not rising or not 0.0 < self.waves[0] <= self.waves[-1] == 1.0:
            raise UsageError(f"waves {self.waves} are no plan", "let them rise and end at 100%, as 20%,100%")
        most = 1.0 if isinstance(self.max_failures, float) else math.inf
        if not 0 <= self.max_failures <= most or not 0 <= self.dwell < math.inf:
            raise UsageError(
                f"max_failures {self.max_failures} and dwell {self.dwell} s are no limits",
                "give a count as 2 or a share as 10%, and seconds from 0",
            )
        if not 0 <= self.spread <= MAX_SPREAD:
            raise UsageError(f"downloads cannot begin over {self.spread} s", f"give 0 to {MAX_SPREAD:g} seconds")
        if not self.profiles:
            raise UsageError("the plan reaches no hardware class", "publish the release for at least one")

    def release(self, profile: str) -> str:
        """Return the target path of the release for one hardware class."""
        return f"models/{self.model}/{profile}/{self.version}.json"


class Assignment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device that was asked: in which wave, which attempt, and how it answered so far."""

    wave: int
    profile: str
    attempt: int = 1
    outcome: Outcome = "pending"


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan on its way. ``settled`` is when the present wave was first seen to have answered."""

    id: Identifier
    plan: Plan
    status: Status = "running"
    wave: int = 0
    assigned: dict[str, Assignment] = {}
    settled: float | None = None
    reason: str = ""

    def count(self, *outcomes: str) -> int:
        """Count the devices that answered so."""
        return sum(a.outcome in outcomes for a in self.assigned.values())


@dataclass(frozen=True)
class Step:
    """What to do now: whom to ask, and the rollout to remember before anyone is asked."""

    assign: list[str]
    rollout: Rollout


def advance(rollout: Rollout, fleet: Mapping[str, DeviceState], now: float) -> Step:
    """Take in the answers, then halt, open waves, or finish.

    The next wave opens when every reached device that is online has answered, more than half of the wave's devices
    did, the failures are within the limit, and the wave was watched for the plan's dwell time. An offline device
    counts neither for nor against. A rollout that is done still serves devices that join later.
    """
    rollout = _observe(rollout, fleet)
    if rollout.status not in ("running", "done"):
        return Step([], rollout)
    why = _halts(rollout) if rollout.status == "running" else ""
    if why:
        return Step([], replace(rollout, status="halted", reason=why))
    opened = _open(_fill(rollout, fleet), fleet, now)
    return Step([device for device in opened.assigned if device not in rollout.assigned], opened)


def pause(rollout: Rollout) -> Rollout:
    """Stop choosing devices; those already asked go on.

    Raises:
        UsageError: the rollout is not running.
    """
    _need(rollout, "pause", ("running", "paused"))
    return replace(rollout, status="paused", reason="paused by the operator")


def resume(rollout: Rollout) -> Rollout:
    """Go on. After a halt the devices that failed are asked once more, as a new attempt.

    Raises:
        UsageError: the rollout is done or aborted.
    """
    _need(rollout, "resume", ("running", "paused", "halted"))
    if rollout.status == "halted":
        again = {d: _retry(a) if a.outcome in FAILURES else a for d, a in rollout.assigned.items()}
        rollout = replace(rollout, assigned=again)
    return replace(rollout, status="running", settled=None, reason="")


def abort(rollout: Rollout, reason: str = "aborted by the operator") -> Rollout:
    """End for good; devices that have not installed the release are no longer asked to.

    Raises:
        UsageError: the rollout is done.
    """
    _need(rollout, "abort", ("running", "paused", "halted", "aborted"))
    return rollout if rollout.status == "aborted" else replace(rollout, status="aborted", reason=reason)


def wanted(device: str, rollouts: Sequence[Rollout]) -> Rollout | None:
    """Return the rollout whose release the device should run: the newest that reached it and was not called off.

    ``rollouts`` are in the order they were started. A halted or aborted one stands only where it is installed.
    """
    for rollout in reversed(rollouts):
        assignment = rollout.assigned.get(device)
        stands = rollout.status in ("running", "paused", "done")
        if assignment and (stands or assignment.outcome == "installed"):
            return rollout
    return None


def live(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """List those that still have something to decide: all but, of each model, the ones an other done one replaced."""
    replaced: set[str] = set()
    kept: list[Rollout] = []
    for rollout in reversed(rollouts):
        if rollout.status != "done" or rollout.plan.model not in replaced:
            kept.append(rollout)
        if rollout.status == "done":
            replaced.add(rollout.plan.model)
    return kept[::-1]


def spread(devices: int) -> float:
    """Return over how many seconds so many devices should begin to download; at most an hour."""
    return min(3600.0, round(devices / STARTS_PER_SECOND, 1))


def lot(device: str, rollout_id: str) -> bytes:
    """Draw a device's place in the queue: the same for ever in one rollout, another in the next."""
    return hashlib.sha256(f"{rollout_id}\0{device}".encode()).digest()


def _observe(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> Rollout:
    news = {}
    for device, assignment in rollout.assigned.items():
        state = fleet.get(device)
        same = state is not None and (state.deployment, state.attempt) == (rollout.id, assignment.attempt)
        if state is not None and same and state.outcome != assignment.outcome:
            news[device] = replace(assignment, outcome=state.outcome)
    return replace(rollout, assigned={**rollout.assigned, **news}) if news else rollout


def _halts(rollout: Rollout) -> str:
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


def _targets(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> list[DeviceState]:
    plan = rollout.plan
    return [d for d in fleet.values() if d.profile in plan.profiles and d.model in ("", plan.model)]


def _there(device: DeviceState, plan: Plan) -> bool:
    return device.model == plan.model and device.version >= plan.version


def _fill(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> Rollout:
    """Ask as many devices of each class as the present wave reaches."""
    plan, added = rollout.plan, dict(rollout.assigned)
    waiting: dict[str, list[DeviceState]] = {}
    for device in _targets(rollout, fleet):
        if device.id not in added and not _there(device, plan):
            waiting.setdefault(device.profile, []).append(device)
    for profile, devices in sorted(waiting.items()):
        have = sum(a.profile == profile for a in rollout.assigned.values())
        room = math.ceil(plan.waves[rollout.wave] * (have + len(devices)) - 1e-9) - have
        # Those that are online first: a canary that is switched off tells nothing.
        queue = sorted(devices, key=lambda d: (not d.online, lot(d.id, rollout.id)))
        added.update({d.id: Assignment(wave=rollout.wave, profile=profile) for d in queue[: max(room, 0)]})
    return replace(rollout, assigned=added) if len(added) > len(rollout.assigned) else rollout


def _open(rollout: Rollout, fleet: Mapping[str, DeviceState], now: float) -> Rollout:
    """Open wave after wave as long as each has answered and was watched long enough."""
    while rollout.status == "running" and _settled(rollout, fleet):
        since = now if rollout.settled is None else rollout.settled
        if now - since < rollout.plan.dwell:
            return replace(rollout, settled=since)
        rollout = _next(rollout, fleet)
    return replace(rollout, settled=None)


def _settled(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> bool:
    known = ((a, fleet[d]) for d, a in rollout.assigned.items() if d in fleet)
    if any(a.outcome == "pending" and one.online and not one.reason for a, one in known):  # else it waits by policy
        return False
    if rollout.wave + 1 == len(rollout.plan.waves):
        return rollout.count(*ANSWERS) == len(rollout.assigned) and bool(_targets(rollout, fleet))
    wave = [a for a in rollout.assigned.values() if a.wave == rollout.wave]
    answered = sum(a.outcome in ANSWERS for a in wave)
    return bool(_targets(rollout, fleet)) and (answered * 2 > len(wave) or not wave)


def _next(rollout: Rollout, fleet: Mapping[str, DeviceState]) -> Rollout:
    if rollout.wave + 1 < len(rollout.plan.waves):
        return _fill(replace(rollout, wave=rollout.wave + 1, settled=None), fleet)
    return replace(rollout, status="done", settled=None, reason=_tally(rollout.assigned.values()))


def _tally(assignments: Iterable[Assignment]) -> str:
    counts = Counter(a.outcome for a in assignments)
    return ", ".join(f"{counts[k]} {k}" for k in ANSWERS if counts[k]) or "every device had it already"


def _retry(assignment: Assignment) -> Assignment:
    return replace(assignment, attempt=assignment.attempt + 1, outcome="pending")


def _need(rollout: Rollout, verb: str, statuses: tuple[Status, ...]) -> None:
    if rollout.status not in statuses:
        raise UsageError(f"cannot {verb} rollout {rollout.id}: it is {rollout.status}", "start a new one")
