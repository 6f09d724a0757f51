"""What processes there are, from /proc: children, whether one lives, what a process holds."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def children(pid=None):
    """Return the processes whose parent is ``pid``, by default this one; no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == (pid or os.getpid()) and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def lives(pid):
    """Say whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def held():
    """Count the open descriptors of this process, and its mappings of shared memory."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:edgekit")
    return sum(1 for _ in Path("/proc/self/fd").iterdir()), mapped
