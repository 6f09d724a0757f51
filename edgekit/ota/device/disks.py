"""On what a folder lies. Refuses memory that looks like a disk: an update there is lost with the power and eats RAM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgekit.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

MOUNTS = Path("/proc/self/mountinfo")
VOLATILE = ("tmpfs", "ramfs", "devtmpfs")
LAYERED = ("overlay", "aufs")
CONTAINERS = ("/.dockerenv", "/run/.containerenv", "/run/secrets/kubernetes.io")
"""One of these is there inside a container."""


def require_lasting(folder: Path, mounts: Path = MOUNTS, containers: Sequence[str] = CONTAINERS) -> None:
    """Raise ResourceError where ``folder``, which need not be there yet, lies in memory instead of on a disk.

    So it may where the root is read-only under an overlay whose upper layer nobody sees any more, as Raspberry Pi OS
    has it. A container's is such a one as well, and lasts as long as the container does.
    """
    kind = file_system(folder, mounts)
    if kind in LAYERED and not any(Path(mark).exists() for mark in containers):
        raise ResourceError(
            f"{folder} lies on a layered file system ({kind}) whose upper layer this process cannot see: "
            "updates may be lost with the power",
            "name a folder on a disk with --state, such as a mounted data partition, or pass --allow-volatile",
        )
    if kind in VOLATILE:
        raise ResourceError(
            f"{folder} lies on {kind}, in memory: updates would not outlast a power cut",
            "name a folder on a disk with --state, such as /var/lib/edgekit, or pass --allow-volatile",
        )


def file_system(folder: Path, mounts: Path = MOUNTS) -> str:
    """Return the type of the file system that holds ``folder``; empty where the system does not tell.

    The last mount of the longest path counts (proc_pid_mountinfo(5)). What is written into an overlay goes into its
    upper layer, so that one's type is returned where its folder can be seen.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return ""
    return _kind(folder.resolve(), [mount for line in lines if (mount := _mount(line)) is not None])


class _Mount(NamedTuple):
    point: Path
    kind: str
    upper: str


def _mount(line: str) -> _Mount | None:
    mounted, _, source = line.partition(" - ")
    fields, told = mounted.split(), source.split()
    if len(fields) < 5 or not told:
        return None
    options = dict(one.partition("=")[::2] for one in told[-1].split(","))
    return _Mount(Path(_plain(fields[4])), told[0], _plain(options.get("upperdir", "")))


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def _kind(place: Path, mounts: list[_Mount]) -> str:
    found = _Mount(Path(), "", "")
    for mount in mounts:
        if place.is_relative_to(mount.point) and len(mount.point.parts) >= len(found.point.parts):
            found = mount
    if found.kind not in LAYERED or not found.upper or not Path(found.upper).is_dir():
        return found.kind
    return _kind(Path(found.upper), [mount for mount in mounts if mount != found])
