"""A file of lines that is put aside when it is full, a bounded number of them. Knows nothing of the lines."""

from __future__ import annotations

import contextlib
import fcntl
import os
from itertools import pairwise
from typing import TYPE_CHECKING

from edgekit.durable import sync_folder
from edgekit.errors import ResourceError, from_os

if TYPE_CHECKING:
    from pathlib import Path

FILES = 8


class RotatingFile:
    """``path`` and the older ``path.1`` to ``path.7``, together at most ``size`` bytes. For one thread.

    Holds a lock on the file: two writers would put aside what the other writes.

    Raises:
        UsageError, ResourceError: it cannot be written, or another process does.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._most = max(1, size // FILES)
        try:
            self._descriptor, self._size = _opened(path)
        except BlockingIOError as error:
            raise ResourceError(f"another process writes {path}", "give each its own file") from error
        except OSError as error:
            raise from_os(error, "the log cannot be written") from error

    def write(self, lines: bytes) -> None:
        """Append whole lines, or nothing of them where the disk refuses.

        Raises:
            OSError: as the system says.
        """
        if self._size and self._size + len(lines) > self._most:
            self._put_aside()
        written = 0
        try:
            while written < len(lines):
                written += os.write(self._descriptor, lines[written:])
        except OSError:
            with contextlib.suppress(OSError):  # half a line must not stay; where even that fails the next begins anew
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += written

    def close(self) -> None:
        """Bring all of it to the disk, as far as that works."""
        with contextlib.suppress(OSError):
            os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _put_aside(self) -> None:
        """Give each file the next number; the last one goes. The new one is there first: a refusal moves nothing."""
        os.fsync(self._descriptor)
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.unlink(missing_ok=True)  # of a process that was killed here
        descriptor, size = _opened(fresh)
        try:
            names = [self.path, *(self.path.with_name(f"{self.path.name}.{number}") for number in range(1, FILES))]
            for newer, older in reversed([*pairwise(names)]):
                if newer.exists():
                    newer.replace(older)
            fresh.replace(self.path)
            sync_folder(self.path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(self._descriptor)
        self._descriptor, self._size = descriptor, size


def _opened(path: Path) -> tuple[int, int]:
    """Lock and open for appending, behind a line that a power cut left half; return how long it is, too."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            size += os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, size
