"""Watches a process from outside: ends it where it takes too much time or memory, and keeps the end of what it said.

Knows nothing of what the process does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from edgekit.errors import from_os
from edgekit.runtime import memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOOK_SECONDS = 0.02
HEARD_BYTES = 64 << 10


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), the end of its output, the most memory it held.

    ``why`` it was killed: ``"time"``, ``"memory"``, or empty.
    """

    code: int
    stdout: bytes
    stderr: bytes
    peak_mib: float
    why: str = ""


def run(command: Sequence[str], env: Mapping[str, str], *, seconds: float, memory_mib: float = 0.0) -> Ended:
    """Run a command and whatever it starts, for at most so long and with at most so much resident memory (0: any).

    Its output goes to files, so that one without an end fills no memory here; RLIMIT_FSIZE bounds its size.

    Raises:
        ResourceError: it could not be started.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=dict(env), start_new_session=True
            )
        except OSError as error:
            raise from_os(error, "starting the try-out") from error
        try:
            peak, why = _watch(child, seconds, memory_mib)
        finally:
            _end(child)
        return Ended(child.returncode, _end_of(out), _end_of(errors), peak, why)


def _watch(child: subprocess.Popen[bytes], seconds: float, memory_mib: float) -> tuple[float, str]:
    peak, deadline = 0.0, time.monotonic() + seconds
    while True:
        peak = max(peak, memory.peak_mib(child.pid))
        if memory_mib and peak > memory_mib:
            return peak, "memory"
        if time.monotonic() > deadline:
            return peak, "time"
        try:
            child.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return peak, ""


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill it and its group; one that has ended is reaped, and what it left behind goes too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _end_of(file: IO[bytes]) -> bytes:
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - HEARD_BYTES))
    return file.read()
