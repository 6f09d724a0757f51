"""What is known of a device, folded from its reports. Does no I/O and reads no clock.

Reports arrive at least once and in any order, so the answer to a deployment only ever moves up one ladder
(pending, failed, installed, rolled back, refused): the same reports give the same state however they come.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from msgspec.structs import replace

from edgekit.ota.messages import Digest, Failed, Health, Hello, Identifier, Installed, Refused, Report, RolledBack

Outcome = Literal["none", "pending", "failed", "installed", "rolled-back", "refused"]

# A worse answer outranks a better one: a device that said both has an operator's attention.
LADDER: tuple[Outcome, ...] = ("none", "pending", "failed", "installed", "rolled-back", "refused")
_OUTCOMES: dict[type[Report], Outcome] = {
    Installed: "installed",
    RolledBack: "rolled-back",
    Refused: "refused",
    Failed: "failed",
}


class DeviceState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device: who it is, what it runs, and how it answered the deployment it was last asked for.

    ``profile`` is empty until the device has said hello; ``seen`` is the time of the last message, in seconds.
    """

    id: Identifier
    profile: str = ""
    online: bool = False
    boot: str = ""
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


def fold(state: DeviceState, report: Report, now: float) -> DeviceState:
    """Return what is known after ``report``; folding it twice changes nothing more than once.

    A report on another deployment or attempt than the one asked for is stale: it proves the device alive, no more.
    """
    state = replace(state, seen=max(state.seen, now))
    if isinstance(report, Hello):
        return _hello(state, report)
    if isinstance(report, Health):
        return replace(state, requests=report.requests, errors=report.errors, p95_ms=report.p95_ms)
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


def model_of(release: str) -> str:
    """Return the model of a release's target path; empty for anything else."""
    match = re.fullmatch(r"models/([A-Za-z0-9._-]{1,100})/[A-Za-z0-9._-]{1,100}/[0-9]{1,9}\.json", release)
    return match[1] if match else ""


def _hello(state: DeviceState, hello: Hello) -> DeviceState:
    state = replace(
        state,
        profile=hello.profile,
        online=hello.online,
        boot=hello.boot,
        agent=hello.agent or state.agent,
    )
    if not hello.online:
        return state  # a will was written when the connection began: what it says of versions may be old
    return replace(state, model=model_of(hello.release), version=hello.version, bundle=hello.bundle)


def _answer(state: DeviceState, report: Installed | RolledBack | Refused | Failed) -> DeviceState:
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
