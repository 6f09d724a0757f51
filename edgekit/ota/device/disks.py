"""On what a folder lies. Refuses memory that looks like a disk: an update there is lost with the power and eats RAM."""

from __future__ import annotations

import re
from pathlib import Path

from edgekit.errors import ResourceError

MOUNTS = Path("/proc/self/mountinfo")
VOLATILE = ("tmpfs", "ramfs", "devtmpfs")


def require_lasting(folder: Path, mounts: Path = MOUNTS) -> None:
    """Raise ResourceError where ``folder``, which need not be there yet, lies in memory instead of on a disk."""
    kind = file_system(folder, mounts)
    if kind in VOLATILE:
        raise ResourceError(
            f"{folder} lies on {kind}, in memory: updates would not outlast a power cut",
            "name a folder on a disk with --state, such as /var/lib/edgekit, or pass --allow-volatile",
        )


def file_system(folder: Path, mounts: Path = MOUNTS) -> str:
    """Return the type of the file system that holds ``folder``; empty where the system does not tell.

    The last mount of the longest path counts (proc_pid_mountinfo(5)).
    """
    place = folder.resolve()
    best, kind = 0, ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return ""
    for line in lines:
        mounted, _, source = line.partition(" - ")
        fields = mounted.split()
        if len(fields) < 5 or not source:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        if place.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), source.split()[0]
    return kind
