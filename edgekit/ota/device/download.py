"""Brings one blob onto the disk: goes on where a break left it, hashes while it writes, stops at the signed length.

Knows files and hashes; does not know whether the bytes come over MQTT or from a stick.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from typing import TYPE_CHECKING

from edgekit.durable import sync_folder
from edgekit.errors import ResourceError
from edgekit.ota.device.trust import Unproven
from edgekit.progress import silent

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from edgekit.manifest import FileEntry
    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.progress import Progress

RESERVE_BYTES = 4 << 20
"""What stays free, so that state and logs can still be written."""


def download(
    fetcher: Fetcher, entry: FileEntry, target: Path, progress: Progress = silent, *, room: str = "blobs"
) -> None:
    """Make ``target`` the file that was signed; a break leaves what came so far, and the next call goes on there.

    ``room``: the repository's folder that has it under its hash.

    Raises:
        ResourceError: the disk is too full.
        TransferError: the bytes did not come; call again.
        Unproven: all bytes came and they are not the signed ones.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    there = _length(target)
    require_space(target.parent, entry.size - there)
    if _complete(fetcher, entry, target, progress, room=room):
        return
    # What lay there may be too long, or holes that a power cut left: only a file fetched in one go proves an attack.
    target.unlink()
    if there and _complete(fetcher, entry, target, progress, room=room):
        return
    target.unlink(missing_ok=True)
    raise Unproven(
        f"the repository's bytes for {entry.path} are not the signed ones ({entry.sha256[:12]}…)",
        "somebody changed the blob, or that copy is damaged: take a sound one; edgekit ota verify FLEET checks it",
    )


def require_space(folder: Path, size: int) -> None:
    """Raise ResourceError unless ``size`` more bytes fit on the disk of ``folder``."""
    lacking = bytes_lacking(folder, size)
    if lacking:
        free = size + RESERVE_BYTES - lacking
        raise ResourceError(
            f"{folder} has {free} bytes free, the update needs {size} and {RESERVE_BYTES} in reserve",
            "free some disk space",
        )


def bytes_lacking(folder: Path, size: int) -> int:
    """Return how many bytes the disk of ``folder`` lacks for ``size`` more and the reserve."""
    return max(0, size + RESERVE_BYTES - shutil.disk_usage(folder).free) if size > 0 else 0


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _complete(fetcher: Fetcher, entry: FileEntry, target: Path, progress: Progress, *, room: str) -> bool:
    with target.open("ab+") as file:
        hasher, done = _hash_what_is_there(file)
        if done < entry.size:
            for piece in fetcher.stream(f"{room}/{entry.sha256}", done, entry.size):
                file.write(piece)
                hasher.update(piece)
                done += len(piece)
                progress(entry.path, done, entry.size)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(target.parent)
    return hasher.hexdigest() == entry.sha256


def _hash_what_is_there(file: BinaryIO) -> tuple[hashlib._Hash, int]:
    hasher = hashlib.sha256()
    file.seek(0)
    while piece := file.read(1 << 20):
        hasher.update(piece)
    return hasher, file.tell()
