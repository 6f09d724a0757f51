"""Watches a process from outside: ends it where it takes too much time, memory or disk; keeps the end of what it said.

Knows nothing of what the process does.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from edgekit.errors import from_os
from edgekit.runtime import memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LOOK_SECONDS = 0.02
HEARD_BYTES = 64 << 10
ENTRY_BYTES = 4096
"""Each name counts so much at least: a million empty files fill a disk as well."""
SPARE_BYTES = 16 << 20
"""What it leaves free of the disk, or half of what was free: a mapped file without a name is seen by that alone."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), the end of its output, the most memory it held.

    ``why`` it was killed: ``"time"``, ``"memory"``, ``"disk"`` for what it wrote, ``"full"`` for a disk that ran full
    meanwhile, whoever wrote; or empty.
    """

    code: int
    stdout: bytes
    stderr: bytes
    peak_mib: float
    why: str = ""


@dataclass(frozen=True)
class Scratch:
    """The one folder that a process writes into, and how many MiB all that it wrote may take there."""

    folder: Path
    most_mib: float


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    seconds: float,
    memory_mib: float = 0.0,
    scratch: Scratch | None = None,
) -> Ended:
    """Run a command and whatever it starts, for at most so long and with at most so much resident memory (0: any).

    Its output goes to files, so that one without an end fills no memory here; RLIMIT_FSIZE bounds its size.

    Raises:
        ResourceError: it could not be started.
    """
    place = scratch.folder if scratch else None
    with tempfile.TemporaryFile(dir=place) as out, tempfile.TemporaryFile(dir=place) as errors:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=dict(env), start_new_session=True
            )
        except OSError as error:
            raise from_os(error, "starting the try-out") from error
        try:
            peak, why = _watch(child, seconds, memory_mib, scratch)
        finally:
            _end(child)
        return Ended(child.returncode, _end_of(out), _end_of(errors), peak, why)


def _watch(
    child: subprocess.Popen[bytes], seconds: float, memory_mib: float, scratch: Scratch | None
) -> tuple[float, str]:
    peak, deadline = 0.0, time.monotonic() + seconds
    spare = min(SPARE_BYTES, _free(scratch) / 2)
    while True:
        peak = max(peak, memory.peak_mib(child.pid))
        if memory_mib and peak > memory_mib:
            return peak, "memory"
        if why := _overwrote(scratch, child.pid, spare):
            return peak, why
        if time.monotonic() > deadline:
            return peak, "time"
        try:
            child.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return peak, _overwrote(scratch, child.pid, spare)


def _overwrote(scratch: Scratch | None, pid: int, spare: float) -> str:
    if scratch is None:
        return ""
    if _written(scratch, pid) > scratch.most_mib * (1 << 20):
        return "disk"
    return "full" if _free(scratch) < spare else ""


def _free(scratch: Scratch | None) -> float:
    return shutil.disk_usage(scratch.folder).free if scratch else math.inf


def _written(scratch: Scratch, pid: int) -> float:
    """Return the bytes that lie in the scratch, and those of files without a name that the process holds open.

    What is hidden from a look, by its mode or by a depth that no path leads to, counts without end.
    """
    folders, taken, most = [scratch.folder], 0, scratch.most_mib * (1 << 20)
    while folders and taken <= most:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    taken += _size(entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
        except FileNotFoundError:  # it went in this moment
            continue
        except OSError:
            return float("inf")
    return taken + _nameless(pid)


def _nameless(pid: int) -> int:
    held: dict[tuple[int, int], int] = {}
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:  # where it still lives
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                info = descriptor.stat()
                if info.st_nlink == 0 and stat.S_ISREG(info.st_mode):
                    held[info.st_dev, info.st_ino] = _size(info)
    return sum(held.values())


def _size(info: os.stat_result) -> int:
    return max(ENTRY_BYTES, 512 * info.st_blocks)


@contextlib.contextmanager
def scratch(place: Path | None) -> Iterator[Path]:
    """Make a folder for one process to write into, below ``place``, which is nobody else's, else among temporary files.

    What a kill left in ``place`` goes first, and all of it at the end.

    Raises:
        ResourceError: the disk takes no folder.
    """
    if place is not None:
        try:
            remove(place)
            place.mkdir(parents=True)
        except OSError as error:
            raise from_os(error, "making room for the try-out") from error
    folder = Path(tempfile.mkdtemp(prefix="edgekit-try-", dir=place))
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            remove(place or folder)


def remove(folder: Path) -> None:
    """Remove a folder, if it is there, with whatever a hostile process left in it.

    `shutil.rmtree` recurses, so a thousand folders in each other end it; here deeper ones are pulled up first.
    """
    if not folder.is_dir():
        return
    while inside := [entry for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]:
        for entry in inside:
            Path(entry.path).chmod(0o700)
            for deeper in os.scandir(entry.path):
                if deeper.is_dir(follow_symlinks=False):
                    Path(deeper.path).chmod(0o700)  # else it could not be moved
                    Path(deeper.path).rename(folder / f"pulled-up-{secrets.token_hex(16)}")
                else:
                    Path(deeper.path).unlink()
            Path(entry.path).rmdir()
    for entry in os.scandir(folder):
        Path(entry.path).unlink()
    folder.rmdir()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill it and its group; one that has ended is reaped, and what it left behind goes too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _end_of(file: IO[bytes]) -> bytes:
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - HEARD_BYTES))
    return file.read()
