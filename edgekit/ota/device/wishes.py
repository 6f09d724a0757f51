"""What a device is asked to run, by its own topic and those of its groups; which wish counts, and from when on.

The device's own wish comes before those of groups, among groups the newest. One that is older than what its topic said
before is a replay and is refused, over restarts. Knows no channel; the time is an argument.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from typing import TYPE_CHECKING

import msgspec

from edgekit.durable import write_file
from edgekit.errors import MessageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from edgekit.ota.messages import Desired

log = logging.getLogger(__name__)

OWN = ""
"""Stands for the device's own topic where a group's name could stand."""
AHEAD_SECONDS = 400 * 86_400.0
"""A revision so far in the future is forged: taken, it would lock out every wish to come."""
REMEMBERED = 64
CLOCK_IS_SET = 1_735_689_600.0
"""A clock before 2025 was never set, and judges nothing."""


class _Memory(msgspec.Struct, kw_only=True):
    """``wishes.json``: the highest revision of each topic, and when the last deployments were first met."""

    revisions: dict[str, int] = {}
    met: dict[str, float] = {}


class Wishes:
    """The wishes of one device; ``file`` keeps what must survive a restart, and may be lost at the price of replays."""

    def __init__(self, file: Path, device: str, groups: Iterable[str] = ()) -> None:
        self._file = file
        self._device = device
        self._stand: dict[str, Desired] = {}
        for left in file.parent.glob(f".{file.name}.*"):  # by kills, while it was written
            with contextlib.suppress(OSError):
                left.unlink()
        self._memory = _read(file)
        known = {OWN, *groups}
        self._memory.revisions = {name: self._memory.revisions.get(name, 0) for name in sorted(known)}

    @property
    def revisions(self) -> dict[str, int]:
        """The highest revision met, by group; `OWN` is the device's own topic."""
        return dict(self._memory.revisions)

    def take(self, group: str, wish: Desired | None, now: float) -> None:
        """Take what came on a topic; ``None``: no wish any more.

        Raises:
            MessageError: an older revision than the topic had before, or one that no server can have written yet.
        """
        if wish is None:
            self._stand.pop(group, None)
            return
        highest = self._memory.revisions[group]
        if now > CLOCK_IS_SET and highest / 1000 > now + AHEAD_SECONDS:
            highest = 0  # forged while the clock was not set
        if wish.revision < highest:
            raise MessageError(f"the wish for {wish.release} is of revision {wish.revision}, after {highest}")
        if now > CLOCK_IS_SET and wish.revision / 1000 > now + AHEAD_SECONDS:
            raise MessageError(f"the wish for {wish.release} has revision {wish.revision}, far in the future")
        self._stand[group] = wish
        if wish.revision != self._memory.revisions[group] or wish.deployment not in self._memory.met:
            self._memory.revisions[group] = wish.revision
            self._remember(wish.deployment, now)

    def chosen(self, profile: str) -> Desired | None:
        """Return the wish that counts. A group's names a model and a version: each device takes its own class's."""
        if OWN in self._stand:
            return self._stand[OWN]
        if not self._stand:
            return None
        _, wish = max(self._stand.items(), key=lambda one: (one[1].revision, one[0]))
        parts = wish.release.split("/")
        return msgspec.structs.replace(wish, release="/".join([*parts[:2], profile, *parts[3:]]))

    def seconds_left(self, wish: Desired, now: float) -> float:
        """Return how long the device's turn to download is still away: it counts from when it first met the wish."""
        turn = turn_after(self._device, wish.deployment, wish.spread)
        gone = now - self._memory.met.get(wish.deployment, now)
        return max(0.0, turn - max(0.0, gone))  # a clock that went back does not make it longer

    def _remember(self, deployment: str, now: float) -> None:
        met = {name: at for name, at in self._memory.met.items() if name != deployment}
        newest = dict([*met.items(), (deployment, self._memory.met.get(deployment, now))][-REMEMBERED:])
        self._memory.met = newest
        try:
            write_file(self._file, msgspec.json.encode(self._memory))
        except OSError as error:  # a full disk must not stop an update that frees it
            log.warning("%s cannot be written, the wish counts all the same: %s", self._file, error)


def turn_after(device: str, deployment: str, spread: float) -> float:
    """Return after how many seconds of ``spread`` a device begins: uniform over devices, the same after a restart."""
    lot = hashlib.sha256(f"{device}\0{deployment}".encode()).digest()
    return spread * int.from_bytes(lot[:8]) / 2**64


def _read(file: Path) -> _Memory:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Memory)
    except FileNotFoundError:
        return _Memory()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read, replays of old wishes will not be noticed: %s", file, error)
        return _Memory()
