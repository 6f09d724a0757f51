"""How many devices may be asked now, and whether it is a device's time. Does no I/O but for reading time zones.

The rate is a sliding window over when devices were asked, so that a step which is repeated after a kill asks nobody
more.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.plan import Plan

MINUTE = 60.0
UNLIMITED = 1 << 30
Clock = Annotated[str, msgspec.Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]\Z")]


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From when to when on a device's clock, over midnight where it ends earlier than it begins.

    ``days`` are those on which it begins, 0 for Monday. ``zone``: for devices of which no time zone is known.
    """

    begin: Clock
    end: Clock
    days: tuple[Annotated[int, msgspec.Meta(ge=0, le=6)], ...] = (0, 1, 2, 3, 4, 5, 6)
    zone: str = "UTC"

    def __post_init__(self) -> None:
        """Refuse a window that is never open, and a zone that does not exist."""
        if self.begin == self.end or not self.days:
            raise UsageError(f"the window {self.begin}-{self.end} is never open", "write it as 22:00-05:00")
        if zone_named(self.zone) is None:
            raise UsageError(f"there is no time zone {self.zone!r}", "write it as Europe/Berlin")

    def is_open(self, zone: tzinfo, now: float) -> bool:
        """Say whether it is open at a time (Unix seconds) in a zone, by what the clocks on the wall show there."""
        local = datetime.fromtimestamp(now, zone)
        clock = f"{local.hour:02}:{local.minute:02}"
        if self.begin < self.end:
            return self.begin <= clock < self.end and local.weekday() in self.days
        if clock >= self.begin:
            return local.weekday() in self.days
        return clock < self.end and (local.weekday() - 1) % 7 in self.days


@lru_cache(maxsize=1024)
def zone_named(name: str) -> tzinfo | None:
    """Return the zone of a name as ``Europe/Berlin``, or of an offset as ``+02:00``; None for anything else."""
    if offset := re.fullmatch(r"([+-])(\d{2}):(\d{2})", name):
        ahead = timedelta(hours=int(offset[2]), minutes=int(offset[3]))
        if ahead < timedelta(hours=24):
            return timezone(-ahead if offset[1] == "-" else ahead)
        return None
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # a device may have said anything
        return None


def zone_of(device: DeviceState, window: Window) -> tzinfo:
    """Return a device's zone: what its tag ``timezone`` says, else the device itself, else the window."""
    told = (device.tags.get("timezone"), device.facts.get("timezone"), device.facts.get("utc_offset"), window.zone)
    return next((zone for name in told if name and (zone := zone_named(name))), UTC)


def is_its_time(device: DeviceState, plan: Plan, now: float) -> bool:
    """Say whether a device may be asked at this time."""
    return plan.window is None or plan.window.is_open(zone_of(device, plan.window), now)


def room(plan: Plan, asked: Sequence[float], busy: int, installed: int, *, now: float) -> int:
    """Return how many more devices may be asked now.

    ``asked``: when devices were asked; ``busy``: how many are at it; ``installed``: how many are done.
    """
    most = UNLIMITED
    if plan.in_flight:
        most = max(0, plan.in_flight - busy)
    if plan.rate:
        period, limit = allowance(plan, installed)
        recent = sum(at > now - period for at in asked)
        most = min(most, max(0, limit - recent))
    return most


def allowance(plan: Plan, installed: int) -> tuple[float, int]:
    """Return a period in seconds and how many devices may be asked in it."""
    steps = min(installed // plan.growth_after, 64)
    rate = min(plan.rate * plan.growth**steps, float(UNLIMITED))
    return (MINUTE, int(rate)) if rate >= 1 else (MINUTE / rate, 1)
