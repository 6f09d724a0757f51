"""Whether this device's clock can be believed, before metadata is judged by it. Does no I/O and reads no clock.

A clock that is wrong refuses sound metadata, or accepts a frozen repository's: neither is done blindly. No message on
the wire sets it, for an attacker could hold it back: time comes from the system (docs/adr/0019).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from edgekit.errors import ResourceError

RELEASED = datetime(2026, 11, 1, tzinfo=UTC)
"""No sound clock that this version meets is before it; raised with each release of edgekit."""
SLACK = timedelta(days=1)
"""So far a clock may go back without being called wrong: metadata is judged by the later time all the same."""
JUMP_SECONDS = 30.0
"""A wall clock that moves so much against the machine's own was set."""


def believed(now: datetime, seen: datetime) -> datetime:
    """Return the time to judge metadata by; ``seen`` is when this device last verified some.

    Raises:
        ResourceError: the clock is before that, or before this version was made.
    """
    floor, why = max((seen, "this device verified metadata then"), (RELEASED, "this version of edgekit was made then"))
    if now + SLACK < floor:
        raise ResourceError(
            f"the clock is wrong: it says {_told(now)}, before {_told(floor)} ({why}). Nothing is installed or refused"
            " until it is set, over NTP say, and what is installed serves on",
            "set the clock; if it is right and was ahead before, remove marks.json from the device's folder",
        )
    return max(now, floor)


def ahead(now: datetime, error: str) -> ResourceError:
    """Return the error of metadata that looks expired by a clock that nothing has set."""
    return ResourceError(
        f"the clock may be ahead: it says {_told(now)}, nothing has set it since the start, and {error}. Nothing is"
        " installed or refused until it is set, over NTP say; if it is right, the repository is frozen",
        "set the clock, or see that the fleet's server signs and that it is its repository that the device reads",
    )


def has_jumped(before: tuple[float, float], after: tuple[float, float]) -> bool:
    """Say whether the wall clock was set between two looks, each (its seconds, the machine's own seconds)."""
    return abs((after[0] - before[0]) - (after[1] - before[1])) > JUMP_SECONDS


def _told(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(sep=" ", timespec="minutes")
