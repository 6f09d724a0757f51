"""Bounds a process that is about to open a file which nobody knows: memory, time, files, network, other processes.

`enter` is called in that process, before the engine is loaded; `warden` watches it from outside. Linux only: elsewhere,
and where its kernel lacks something, it says what does not hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import ResourceError
from edgekit.runtime.sandbox import calls, landlock

MIB = 1 << 20
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
FILE_MIB = 16
"""No file that the process writes may grow longer: its output among them."""
SCRATCH_MIB = 64
"""So much may all its files take together: engines keep notes and small caches there, no models."""
OPEN_FILES = 512
DEVICES = ("nvidia*", "nvhost*", "nvmap", "dri", "kgsl*", "mali*", "apex*")
"""What an accelerator is reached through; anything else in /dev but `HARMLESS` is out of reach."""
HARMLESS = ("null", "zero", "full", "random", "urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/opt", "/etc/ld.so.cache", "/etc/localtime", "/sys")
PROC = ("self", "sys", "cpuinfo", "meminfo", "stat", "version", "uptime", "filesystems", "cgroups", "devices", "driver")
"""What tells of the machine and of this process: not the environment or the command of another one."""


@dataclass(frozen=True)
class Bounds:
    """What a process may take: ``memory_mib`` (0: any), ``seconds``; what it reads, and the one folder it writes."""

    memory_mib: float
    seconds: float
    reads: tuple[Path, ...]
    scratch: Path


def enter(bounds: Bounds) -> tuple[str, ...]:
    """Shut this process in for good, and return what of it this system does not have.

    Raises:
        ResourceError: the system has it and refuses all the same.
    """
    if sys.platform != "linux":
        return ("the try-out is bounded in time alone: it is shut in on Linux only",)
    _die_with_the_parent()
    _limit(bounds)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise ResourceError("the system lets no process give up new privileges", "see its seccomp and prctl rules")
    lacks = (landlock.restrict(_readable(bounds), _writable(bounds.scratch)), calls.refuse())
    return tuple(filter(None, lacks))


def _die_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):  # where memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _limit(bounds: Bounds) -> None:
    cores = len(os.sched_getaffinity(0))
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: int(bounds.seconds * cores) + 1,
        resource.RLIMIT_FSIZE: FILE_MIB * MIB,
        resource.RLIMIT_NOFILE: OPEN_FILES,
    }
    if bounds.memory_mib:
        # Not RLIMIT_AS, which counts what is only reserved, and files that are mapped.
        limits[resource.RLIMIT_DATA] = int(bounds.memory_mib * MIB)
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))


def _readable(bounds: Bounds) -> list[Path]:
    """List Python, the packages, the libraries of the system, and what the caller names."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    told = (f"/proc/{name}" for name in PROC)
    own = (str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path, *libraries)
    return [*bounds.reads, *(Path(one) for one in (*SYSTEM, *told, *own) if one)]


def _writable(scratch: Path) -> list[Path]:
    devices = (found for pattern in (*HARMLESS, *DEVICES) for found in Path("/dev").glob(pattern))
    return [scratch, *devices]
