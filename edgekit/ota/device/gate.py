"""Holds a device to its policy while it updates: asks the clock and the link, slows down, stops between two blocks.

Knows the policy's verdicts and a file that says that the link is metered; knows no channel and no model.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from edgekit.errors import ResourceError
from edgekit.ota.device.pace import Bucket
from edgekit.ota.device.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.device.policy import Hold

METERED = "metered"
"""While the state folder holds a file of this name the link counts as metered: network scripts make and remove it."""
ALWAYS = ("metadata/", "targets/")
"""What is signed is small, and a device should know of it in time; it comes whatever the policy says."""


class Held(ResourceError):
    """The device's own policy says not now; ``size`` bytes, or a change of model where that is 0, wait."""

    def __init__(self, hold: Hold, size: int) -> None:
        super().__init__(hold.reason, "it goes on by itself; --window and --metered of the agent say so")
        self.hold = hold
        self.size = size


class Gate:
    """Lets bytes and changes through as a policy says.

    ``clock``, ``seconds``, ``pause`` and ``is_stopped`` (the device goes down) may be replaced.
    """

    def __init__(self, policy: Policy | None = None, state: Path | None = None) -> None:
        self.policy = policy or Policy()
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.seconds: Callable[[], float] = time.monotonic
        self.pause: Callable[[float], object] = time.sleep
        self.is_stopped: Callable[[], bool] = lambda: False
        self._state = state
        self._bucket = Bucket(self.policy.bandwidth) if self.policy.bandwidth else None

    def hold(self, size: int = 0) -> Hold | None:
        """Return why ``size`` bytes, or a change of model, have to wait; ``None``: they need not."""
        is_metered = self._state is not None and (self._state / METERED).exists()
        return self.policy.hold(self.clock(), size, is_metered=is_metered)

    def require(self, size: int = 0) -> None:
        """Return where that may go on.

        Raises:
            Held: it may not now.
        """
        hold = self.hold(size)
        if hold is not None:
            raise Held(hold, size)

    def over(self, fetcher: Fetcher) -> Fetcher:
        """Return a fetcher that delivers the same, as fast as it may, and stops before the block that may not come."""
        return _Gated(self, fetcher)

    def slow_down(self, size: int) -> None:
        """Pause after ``size`` bytes for as long as the bandwidth wants it."""
        seconds = self._bucket.take(size, self.seconds()) if self._bucket else 0.0
        if seconds:
            self.pause(seconds)


class _Gated:
    def __init__(self, gate: Gate, fetcher: Fetcher) -> None:
        self._gate = gate
        self._fetcher = fetcher

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes asked for; see `Fetcher`."""
        is_free = path.startswith(ALWAYS)
        if start < end and not is_free:
            self._gate.require(end - start)
        for piece in self._fetcher.stream(path, start, end):
            yield piece
            start += len(piece)
            self._gate.slow_down(len(piece))
            if start < end and not is_free:
                self._gate.require(end - start)
