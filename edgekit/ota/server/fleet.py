"""What is known of a device, folded from its reports. Does no I/O and reads no clock.

Reports arrive at least once and in any order, so the answer to a deployment only ever moves up one ladder
(pending, failed, installed, rolled back, refused): the same reports give the same state however they come.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec.structs import replace

from edgekit.ota.messages import (
    Alert,
    Chosen,
    Digest,
    Drift,
    Failed,
    Health,
    Hello,
    Identifier,
    Installed,
    Refused,
    Report,
    RolledBack,
    Waiting,
)
from edgekit.ota.server.records import Record, added

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Outcome = Literal["none", "pending", "failed", "installed", "rolled-back", "refused"]

# A worse answer outranks a better one: a device that said both has an operator's attention.
LADDER: tuple[Outcome, ...] = ("none", "pending", "failed", "installed", "rolled-back", "refused")
REMEMBERED_BOOTS = 4
AHEAD_SECONDS = 399 * 86_400.0
"""Devices refuse a group's revision that is a day further ahead (`wishes`): one device's lie must not lead there."""
CLOCK_IS_SET = 1_735_689_600.0
"""A server whose clock shows less (2025) has not been told the time: it judges no revision by it."""
_OUTCOMES: dict[type[Report], Outcome] = {
    Installed: "installed",
    RolledBack: "rolled-back",
    Refused: "refused",
    Failed: "failed",
    Waiting: "pending",  # with its reason
}


class DeviceState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device: who it is, what it runs, and how it answered the deployment it was last asked for.

    ``profile`` is empty until the device has said hello; ``seen`` is the time of the last message, in seconds.
    ``alerts`` are what it last said is not as it was, ``dropped`` how many of its reports had no room on the way,
    ``boots`` its starts before the present one. ``wish`` is what it was last told to run (JSON, empty: nothing), under
    the number ``revision``; ``met`` is the highest such number that it has seen, ``groups`` whose wishes it obeys, too.

    ``tags`` and ``members`` (groups) are what the operator says of it, ``facts`` what it says of itself. ``record``
    is how the bundle that serves has done, ``before`` how the one before it did, ``heard`` the last report that is in
    there.
    """

    id: Identifier
    profile: str = ""
    online: bool = False
    boot: str = ""
    boots: tuple[str, ...] = ()
    agent: str = ""
    model: str = ""
    version: int = 0
    bundle: Digest = ""
    seen: float = 0.0
    deployment: str = ""
    attempt: int = 0
    wanted: str = ""
    outcome: Outcome = "none"
    reason: str = ""
    measured: dict[str, float] = {}
    requests: int = 0
    errors: int = 0
    p95_ms: float = 0.0
    alerts: tuple[Alert, ...] = ()
    dropped: int = 0
    wish: str = ""
    revision: int = 0
    met: int = 0
    groups: dict[str, int] = {}
    tags: dict[str, str] = {}
    members: tuple[str, ...] = ()
    facts: dict[str, str] = {}
    record: Record | None = None
    before: Record | None = None
    heard: tuple[str, int] = ("", 0)


def fold(state: DeviceState, report: Report, now: float) -> DeviceState:
    """Return what is known after ``report``; folding it twice changes nothing more than once.

    A report on another deployment or attempt than the one asked for is stale: it proves the device alive, no more.
    """
    state = replace(state, seen=max(state.seen, now))
    if isinstance(report, Hello):
        return _hello(state, report)
    if isinstance(report, Health):
        return _health(state, report)
    if isinstance(report, Drift):
        return replace(state, alerts=report.alerts)
    if isinstance(report, Chosen):
        return state
    if (report.deployment, report.attempt) != (state.deployment, state.attempt):
        return state
    return _answer(state, report)


def expect(state: DeviceState, deployment: str, attempt: int, release: str) -> DeviceState:
    """Return the device as asked for a deployment: its answer is pending. Asking twice for the same changes nothing."""
    if (state.deployment, state.attempt) == (deployment, attempt):
        return state
    return replace(
        state, deployment=deployment, attempt=attempt, wanted=release, outcome="pending", reason="", measured={}
    )


def tell(state: DeviceState, wish: str, now: float) -> DeviceState:
    """Return the device as told what to run. A new wish has a higher revision than any that the device has met.

    Where the device has met a higher one than the server ever gave (its database is a restored backup, or somebody else
    spoke on that topic) the same wish is said again, above that. One too far in the future is forged, and forgotten.
    """
    latest = (now + AHEAD_SECONDS) * 1000 if now > CLOCK_IS_SET else math.inf
    met, own = (one if one < latest else 0 for one in (state.met, state.revision))
    if wish == state.wish and met <= own and own == state.revision:
        return state
    return replace(state, wish=wish, revision=max(int(now * 1000), own + 1, met + 1))


def label(state: DeviceState, tags: Mapping[str, str], members: tuple[str, ...]) -> DeviceState:
    """Return the device as the operator has labelled it: tags and groups come from no report."""
    if state.tags == tags and state.members == members:
        return state
    return replace(state, tags=dict(tags), members=members)


def next_revision(met: Iterable[int], now: float) -> int:
    """Return a revision above all that devices say they have met; what is too far in the future is a lie, or forged."""
    believed = [one for one in met if one / 1000 < now + AHEAD_SECONDS]
    return max([int(now * 1000), *(one + 1 for one in believed)])


def model_of(release: str) -> str:
    """Return the model of a release's target path; empty for anything else."""
    match = re.fullmatch(r"models/([A-Za-z0-9._-]{1,100})/[A-Za-z0-9._-]{1,100}/[0-9]{1,9}\.json", release)
    return match[1] if match else ""


def _hello(state: DeviceState, hello: Hello) -> DeviceState:
    if not hello.online and hello.boot in state.boots:
        return state  # the will of an earlier start that came late: the device is back already
    if hello.online and hello.boot != state.boot:
        boots = tuple(filter(None, (state.boot, *state.boots)))[:REMEMBERED_BOOTS]
        state = replace(state, alerts=(), boots=boots)  # what was seen before it started anew is forgotten there
    state = replace(
        state,
        profile=hello.profile,
        online=hello.online,
        boot=hello.boot,
        agent=hello.agent or state.agent,
    )
    if not hello.online:
        return state  # a will was written when the connection began: what it says of versions may be old
    state = replace(state, met=hello.revision, groups=hello.groups, facts=hello.facts)
    return replace(state, model=model_of(hello.release), version=hello.version, bundle=hello.bundle)


def _health(state: DeviceState, health: Health) -> DeviceState:
    figures = ("requests", "errors", "p95_ms", "dropped")
    told = {name: getattr(health, name) for name in figures}
    # One that came twice counts once: by its number, or (old devices have none) because it says the very same again.
    boot, number = state.heard
    known = health.boot == boot and health.number <= number
    same = not health.number and all(getattr(state, name) == told[name] for name in figures)
    if known if health.number else same:
        return replace(state, **told) if not health.number else state
    record, before = state.record, state.before
    if record is None or record.bundle != health.bundle:
        record, before = Record(bundle=health.bundle), record
    heard = (health.boot, health.number) if health.number else state.heard
    return replace(state, **told, record=added(record, health), before=before, heard=heard)


def _answer(state: DeviceState, report: Installed | RolledBack | Refused | Failed | Waiting) -> DeviceState:
    outcome = _OUTCOMES[type(report)]
    reason = "" if isinstance(report, Installed) else report.reason
    if (_rank(outcome), reason) <= (_rank(state.outcome), state.reason):
        return state
    if isinstance(report, Installed):
        state = replace(state, model=model_of(state.wanted), version=report.version, bundle=report.bundle)
    measured = report.measured if isinstance(report, Installed | RolledBack) else {}
    return replace(state, outcome=outcome, reason=reason, measured=measured)


def _rank(outcome: Outcome) -> int:
    return LADDER.index(outcome)
