"""Makes a file of a release out of an installed one and a signed delta; says so where that cannot be.

A delta that is missing, damaged or no good is no reason to refuse a release: the whole file is fetched then. Knows
neither what a delta holds nor what a bundle is.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from edgekit.durable import sync_folder
from edgekit.errors import BundleError, MissingExtra, TrustError
from edgekit.manifest import FileEntry
from edgekit.ota.device import slots
from edgekit.ota.device.download import download
from edgekit.ota.device.fetchers import MissingFile, UnreadableFile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from edgekit.ota.deltas.listing import Delta
    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.progress import Progress

log = logging.getLogger(__name__)

ROOM = "deltas"
"""The repository's folder for them."""


class Way(NamedTuple):
    """A delta, the installed file that it begins at, and where scratch files may lie."""

    delta: Delta
    base: Path
    scratch: Path


def way_to(folder: Path, entry: FileEntry, deltas: Iterable[Delta], there: int) -> Way | None:
    """Return the shortest delta to a file of which ``there`` bytes are here, or None where the rest is shorter."""
    fitting = [d for d in deltas if d.new == entry.sha256 and d.size < entry.size - there]
    for delta in sorted(fitting, key=lambda one: one.size):
        if (base := slots.find(folder, delta.base)) is not None:
            return Way(delta, base, slots.scratch_folder(folder))
    return None


def rebuild(fetcher: Fetcher, entry: FileEntry, way: Way, target: Path, *, progress: Progress) -> bool:
    """Make ``target`` the file that was signed; say False, and leave nothing, where the delta is no good.

    A break leaves what came of the delta; a kill while it is applied leaves a scratch file that the next call replaces.

    Raises:
        TransferError: the delta did not come; call again.
        ResourceError, OSError: the disk is too full, or does not answer.
    """
    from edgekit.ota.deltas import applying  # numpy comes with it: not where no delta is used

    delta, made = way.scratch / way.delta.sha256, way.scratch / "new"
    told = FileEntry(path=f"delta of {entry.path}", size=way.delta.size, sha256=way.delta.sha256)
    try:
        download(fetcher, told, delta, progress, room=ROOM)
        applying.apply(delta, way.base, entry, made)
    except (BundleError, TrustError, MissingFile, UnreadableFile, MissingExtra) as error:
        log.warning("the whole of %s is fetched, its delta is no good: %s", entry.path, error)
        return False
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        made.replace(target)
        sync_folder(target.parent)
        delta.unlink()
        log.info("%s came as a delta: %d bytes instead of %d", entry.path, way.delta.size, entry.size)
        return True
    finally:
        made.unlink(missing_ok=True)
