"""When a device may load and change its model: maintenance windows, metered links. Does no I/O and reads no clock.

What comes in is a time, a number of bytes and whether the link is metered; what goes out is why to wait, if at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day
from typing import TYPE_CHECKING

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from datetime import tzinfo

DAY = 24 * 60
_WINDOW = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)(Z?)")


@dataclass(frozen=True)
class Window:
    """A time of every day, in minutes after midnight; it may reach across midnight. ``zone`` ``None``: local time."""

    start: int
    end: int
    zone: tzinfo | None = None

    def is_open(self, now: datetime) -> bool:
        """Say whether it is open at a time that knows its zone."""
        local = now.astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end

    def opens(self, now: datetime) -> datetime:
        """Return when it opens next after ``now``, in UTC."""
        today = now.astimezone(self.zone).date()
        start = time_of_day(self.start // 60, self.start % 60)
        days = (datetime.combine(today + timedelta(days=n), start, self.zone) for n in (0, 1, 2))
        # Without a zone `astimezone` takes it for the system's local time, with its summer time.
        return min(moment for day in days if (moment := day.astimezone(UTC)) > now)

    def __str__(self) -> str:
        span = "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (self.start, self.end))
        return span + ("Z" if self.zone is UTC else "")


@dataclass(frozen=True)
class Hold:
    """Why to wait, and until when where that is known."""

    reason: str
    until: datetime | None = None


@dataclass(frozen=True)
class Policy:
    """What this device may do when. The default holds nothing back.

    ``windows``: outside all of them nothing is loaded or changed. ``bandwidth``: bytes a second, 0 for no limit.
    ``is_metered``: the link costs money, so that only updates of fewer than ``metered_below`` bytes come over it.
    """

    windows: tuple[Window, ...] = ()
    bandwidth: int = 0
    is_metered: bool = False
    metered_below: int = 0

    def hold(self, now: datetime, size: int = 0, *, is_metered: bool = False) -> Hold | None:
        """Judge whether ``size`` bytes may come now, or with 0 whether a model may be changed; ``None``: go on.

        ``is_metered`` is what the device sees of its link at present.
        """
        if self.windows and not any(window.is_open(now) for window in self.windows):
            spans = ", ".join(map(str, self.windows))
            return Hold(f"outside the maintenance window {spans}", min(window.opens(now) for window in self.windows))
        if (is_metered or self.is_metered) and size and size >= self.metered_below:
            return Hold(f"the link is metered: {size} bytes wait for another one")
        return None


def parse_window(text: str) -> Window:
    """Read ``22:00-06:00`` (local time) or ``22:00-06:00Z`` (UTC).

    Raises:
        UsageError: it is no such span, or one that never ends.
    """
    match = _WINDOW.fullmatch(text.strip())
    start_hour, start_minute, end_hour, end_minute = map(int, match.groups()[:4]) if match else (99, 0, 0, 0)
    start, end = start_hour * 60 + start_minute, end_hour * 60 + end_minute
    if match is None or max(start_minute, end_minute) > 59 or start >= DAY or end > DAY or start == end % DAY:
        raise UsageError(f"{text!r} is no maintenance window", "write it as 22:00-06:00, or 22:00-06:00Z in UTC")
    return Window(start, end, UTC if match[5] else None)
