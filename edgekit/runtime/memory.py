"""How much memory a process holds, how this one gives some back, and how much there is. Knows no model."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class _Files(NamedTuple):
    """The limits of a control group, what it has taken, and which lines of memory.stat tell of files it could drop."""

    limits: tuple[str, ...]
    taken: str
    dropped: tuple[str, str]


FILES_2 = _Files(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))
FILES_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def rss_mib(pid: int | None = None) -> float:
    """Return the resident memory in MiB of a process, by default this one; 0 for one that is no more.

    Where the system does not tell the present, it is this process's peak.
    """
    try:
        pages = Path(f"/proc/{pid or 'self'}/statm").read_bytes().split()
        return int(pages[1]) * resource.getpagesize() / (1 << 20)
    except OSError:
        if pid is not None:
            return 0.0
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_mib(pid: int | None = None) -> float:
    """Return the most resident memory in MiB that a process, by default this one, ever held; 0 for one that is no more.

    Of the program that runs in it: what its parent held when it was started does not count, as it does to `getrusage`.
    """
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):  # a dead one has no line
        return rss_mib() if pid is None else 0.0


def give_back() -> None:
    """Hand memory that was freed back to the system, where the C library can.

    Parsing an ONNX file leaves much behind: EfficientNet-Lite0 of 18.7 MB took 47 MiB when it was loaded, 28 after
    this; as int8, of 5.2 MB, 21 and 17.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's, nobody else's
    return found


def available_mib() -> float:
    """Return how much memory this process could get now, in MiB; without end where nobody tells.

    The least of what the system has and of what the limits of a container, or of a service of systemd, leave.
    """
    return min([_of_system(), *((most - taken) / (1 << 20) for most, taken in _limits())])


def _of_system() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 1024
    except (OSError, StopIteration):
        return float("inf")


def of_device(profile_mb: int = 0) -> int:
    """Return the bytes of memory that this device has; its hardware class, or a limit, where that is less and known."""
    here = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(most for most, _ in _limits())])
    return min(here, profile_mb << 20) if profile_mb else here


def _limits() -> Iterator[tuple[int, int]]:
    """Yield what each control group that this process is in may take, and has taken that it cannot drop, in bytes."""
    for folder, files in _control_groups():
        limits = [int(told) for name in files.limits if (told := _read(folder / name).strip()).isdigit()]  # or "max"
        stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line)
        taken = _read(folder / files.taken).strip()
        if limits and taken.isdigit():
            yield min(limits), int(taken) - sum(int(stat.get(name, 0)) for name in files.dropped)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _control_groups() -> Iterator[tuple[Path, _Files]]:
    """Yield the folders of this process's control groups that may bound memory, its own first, and what files to read.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html. In a container the folders above
    its own may be missing: its own is the root there.
    """
    try:
        lines = os.fsdecode((PROC / "self/cgroup").read_bytes()).split("\n")
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if controllers and "memory" not in controllers.split(","):
            continue
        base, files = (CGROUPS / "memory", FILES_1) if controllers else (CGROUPS, FILES_2)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:count]), files
