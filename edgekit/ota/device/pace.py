"""How fast bytes may come, and how slowly they must not. Values and arithmetic; reads no clock and never sleeps."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.errors import TransferError

BURST_SECONDS = 1.0
"""So much of a limit may be saved up while nothing comes."""


@dataclass
class Pace:
    """Gives a transfer up that trickles: fewer than ``least`` bytes a second over ``window`` seconds of waiting.

    Only what was spent on waiting for the network counts, so that a limit of our own does not look like an attack.
    """

    least: float
    window: float
    _seconds: float = 0.0
    _bytes: int = 0

    def took(self, seconds: float, size: int) -> None:
        """Count ``size`` bytes that came after ``seconds`` of waiting.

        Raises:
            TransferError: they come too slowly.
        """
        self._seconds += seconds
        self._bytes += size
        if self._seconds < self.window:
            return
        if self._bytes < self.least * self._seconds:
            raise TransferError(
                f"only {self._bytes} bytes came in {self._seconds:.0f} s, at least {self.least:g} a second are wanted",
                "the network or the server is too slow, or somebody holds the device up",
            )
        self._seconds, self._bytes = 0.0, 0


@dataclass
class Bucket:
    """A token bucket of ``rate`` bytes a second: over any time no more than that, and one burst."""

    rate: float
    _at: float | None = None
    _saved: float = 0.0

    def take(self, size: int, now: float) -> float:
        """Take ``size`` bytes at the time ``now`` (seconds of any clock); return for how long to pause afterwards."""
        burst = self.rate * BURST_SECONDS
        before = now if self._at is None else self._at
        self._saved = min(burst, self._saved + max(0.0, now - before) * self.rate) - size
        self._at = now
        return max(0.0, -self._saved / self.rate)
