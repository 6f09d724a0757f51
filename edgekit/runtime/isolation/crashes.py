"""When a process that died is started again, and when that is given up. Pure: time and chance are arguments."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

FIRST_SECONDS, LONGEST_SECONDS = 1.0, 60.0
"""The pause after the first crash, which doubles with each further one, and the longest."""
WINDOW_SECONDS = 600.0
"""Crashes longer ago than this are forgotten."""
BROKEN_AFTER = 3
"""So many crashes within the window are no accident."""

HANG = "hang"
"""Killed, because it gave no answer."""
NONSENSE = "nonsense"
"""Killed, because what it answered made no sense, or because it left a request alone."""
START = "start"
"""It could not be started again."""


@dataclass(frozen=True)
class Crashes:
    """The times of the crashes that still count, oldest first, in seconds of any clock."""

    times: tuple[float, ...] = ()

    def after(self, now: float) -> Crashes:
        """Return what counts after one more crash."""
        return replace(self, times=(*(time for time in self.times if now - time < WINDOW_SECONDS), now))

    def pause(self, chance: float) -> float:
        """Return the seconds until the next start: from half of 1, 2, 4, … to all of it, by ``chance`` from 0 to 1."""
        longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(len(self.times) - 1, 20))
        return longest * (0.5 + 0.5 * chance)

    def are_too_many(self, now: float) -> bool:
        """Say whether something better be served instead."""
        return sum(now - time < WINDOW_SECONDS for time in self.times) >= BROKEN_AFTER


def named(code: int) -> str:
    """Name how a process ended, from its exit code: ``SIGSEGV``, or ``exit code 7``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # a signal without a name, as the real-time ones
        return f"signal {-code}"


def told(how: str) -> str:
    """Say what ended a process, as the end of a sentence about its engine."""
    sentences = {
        HANG: "gave no answer in time and was killed",
        NONSENSE: "answered what makes no sense and was killed",
        START: "could not be started again",
    }
    return sentences.get(how, f"crashed with {how}")
