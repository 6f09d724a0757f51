"""Brings the files of a bundle together on the disk: what is here already, deltas, whole files; checks them all.

Knows where bytes come from and where they lie; judges no release and no model.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from edgekit import bundle as bundles
from edgekit.errors import BundleError
from edgekit.ota.device import deltas, slots
from edgekit.ota.device.download import bytes_lacking, download, require_space
from edgekit.ota.device.fetchers import Counted
from edgekit.ota.device.sources import ways
from edgekit.ota.device.trust import Unproven

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.manifest import FileEntry
    from edgekit.ota.device.deltas import Way
    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.device.trust import Found
    from edgekit.ota.device.update import Device
    from edgekit.progress import Progress

log = logging.getLogger(__name__)


class Staged(NamedTuple):
    """A whole bundle, and how many bytes came for it."""

    bundle: Bundle
    received: int


def stage(device: Device, found: Found, variant: str, fetcher: Fetcher, *, progress: Progress) -> Staged:
    """Return the bundle of a release with the files of one variant, every byte checked.

    What was interrupted goes on behind what is on the disk.

    Raises:
        TransferError, ResourceError, BundleError, OSError: the bytes did not come, or do not fit; call again.
        Unproven: the bytes are not the signed ones, whichever way they come.
    """
    release, folder = found.release, device.state
    try:
        return Staged(slots.open_bundle(folder, release, variant), 0)
    except BundleError:
        pass  # not here yet, or damaged: fetch it
    name = slots.slot_name(release, variant)
    slots.discard_other_staging(folder, name, [delta.sha256 for delta in found.deltas])
    staging = slots.staging_folder(folder, name)
    entries = found.manifest.files_of(variant)
    missing = [e for e in entries if not slots.reuse(folder, e, staging / e.path)]
    ways = {e.path: deltas.way_to(folder, e, found.deltas, _bytes_of(staging / e.path)) for e in missing}
    device.gate.require(sum(_bytes_to_come(e, ways[e.path], staging) for e in missing))
    for path, way in ways.items():
        if way is not None:  # the delta is shorter than the rest: what came of the whole file only takes its room
            (staging / path).unlink(missing_ok=True)
    passing = max((_delta_to_come(way) for way in ways.values() if way), default=0)
    _make_room(device, sum(e.size - _bytes_of(staging / e.path) for e in missing) + passing)
    blobs = _Blobs(device, device.way_to(release, fetcher))
    for number, entry in enumerate(missing):
        # Anew before each file: the link may have become a metered one, and each file alone be below its limit.
        device.gate.require(sum(_bytes_to_come(e, ways[e.path], staging) for e in missing[number:]))
        way, target = ways[entry.path], staging / entry.path
        # Giving up the bundle before, to make room, may have taken the file that a delta begins at.
        if way is None or not way.base.is_file() or not blobs.rebuild(entry, way, target, progress=progress):
            blobs.download(entry, target, progress)
    staging.mkdir(parents=True, exist_ok=True)
    (staging / bundles.MANIFEST).write_bytes(found.data)  # plainly: the rename below makes the folder count
    return Staged(slots.adopt(folder, release, variant), blobs.received)


class _Blobs:
    """Brings files over the first of several ways that does not lie; ``received`` counts the bytes of all."""

    def __init__(self, device: Device, way: Fetcher) -> None:
        self._ways = [Counted(device.gate.over(one)) for one in ways(way)]
        self._passed = 0

    @property
    def received(self) -> int:
        """The bytes that came so far."""
        return self._passed + self._ways[0].received

    def rebuild(self, entry: FileEntry, way: Way, target: Path, *, progress: Progress) -> bool:
        """Make a file out of a delta; see `deltas.rebuild`."""
        return deltas.rebuild(self._ways[0], entry, way, target, progress=progress)

    def download(self, entry: FileEntry, target: Path, progress: Progress) -> None:
        """Fetch a file; wrong bytes end a way for this update, and the file is fetched anew over the next.

        Raises:
            Unproven: the last one lies, too.
        """
        while True:
            try:
                return download(self._ways[0], entry, target, progress)
            except Unproven as error:
                if len(self._ways) == 1:
                    raise
                log.error("%s; it is fetched anew over the other way alone", error.message)  # noqa: TRY400  # no trace: it is no bug
                self._passed += self._ways.pop(0).received


def _make_room(device: Device, needed: int) -> None:
    """Give up the bundle before the one that serves, where the disk holds no third one, and only if that is enough.

    Raises:
        ResourceError: the disk is too small.
    """
    folder, state = device.state, slots.load(device.state)
    slots.collect_unnamed(folder, state)
    lacking = bytes_lacking(folder, needed)
    if lacking and state.previous and state.current and not state.trial:
        gained = slots.bytes_of_previous(folder, state)
        if gained >= lacking and slots.is_whole(folder, state.current):
            log.warning(
                "%s is given up, %d bytes: the disk does not hold it beside %s and what comes",
                *(state.previous.path, gained, state.current.path),
            )
            state = slots.without_previous(state)
            slots.save(folder, state)
            slots.collect_unnamed(folder, state)
    require_space(folder, needed)


def _bytes_to_come(entry: FileEntry, way: Way | None, staging: Path) -> int:
    return _delta_to_come(way) if way is not None else entry.size - _bytes_of(staging / entry.path)


def _delta_to_come(way: Way) -> int:
    return max(0, way.delta.size - _bytes_of(way.scratch / way.delta.sha256))


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
