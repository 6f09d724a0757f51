"""Which system calls of a piece of work change a folder, and how to kill the work right before one of them.

The work runs in a forked child that strace attaches to, so that interpreter and imports are paid for once, and every
call is seen whatever language makes it. Linux only. Knows nothing of updates.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHANGES = frozenset(
    ("open", "openat", "creat", "write", "pwrite64", "writev", "pwritev", "pwritev2", "fsync", "fdatasync", "sync",
     "syncfs", "sync_file_range", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir",
     "mkdirat", "link", "linkat", "symlink", "symlinkat", "mknod", "mknodat", "truncate", "ftruncate", "fallocate",
     "copy_file_range", "sendfile", "splice", "chmod", "fchmod", "fchmodat", "chown", "fchown", "fchownat",
     "lchown", "utimensat", "setxattr", "fsetxattr", "lsetxattr", "removexattr", "fremovexattr", "lremovexattr")
)  # fmt: skip
"""Calls that change what is on a disk, or when it gets there; a call that opens does so if it creates or cuts."""
LOOKS = frozenset(
    ("read", "pread64", "readv", "preadv", "preadv2", "lseek", "close", "fstat", "stat", "lstat", "newfstatat",
     "statx", "statfs", "fstatfs", "access", "faccessat", "faccessat2", "readlink", "readlinkat", "getdents64",
     "flock", "fcntl", "ioctl", "mmap", "fadvise64", "readahead", "dup", "dup2", "dup3", "chdir", "fchdir",
     "getcwd", "execve", "epoll_ctl", "poll", "getxattr", "lgetxattr", "fgetxattr", "listxattr",
     "inotify_add_watch", "landlock_add_rule")
)  # fmt: skip
"""Calls that change nothing; a shared, writable ``mmap`` would, and counts as unknown."""
SCRATCH = "try-out"
"""What a try-out's own process writes lies there; nobody reads it, and the next try-out clears what a kill left."""
_CALL = re.compile(r"^(?:(\d+) +)?(\w+)\((.*)$")
_RANDOM = re.compile(r"(tmp|\.)[a-z0-9_]{8}(?=[\">/]|$)")  # the names that Python's tempfile makes
_PATHS = re.compile(r'"([^"]*)"|<([^>]*)>')
PR_SET_PTRACER, ANYBODY = 0x59616D61, -1


@dataclass(frozen=True)
class Call:
    """One call that changes the folder: the ``count``-th of its name in the whole work, and its paths there."""

    name: str
    count: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """What changed the folder, in order; calls on it that are not known; how many changes came from other processes."""

    changes: tuple[Call, ...]
    unknown: frozenset[str]
    foreign: int


def lacking() -> str:
    """Say why nothing can be traced here, empty where it can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    return "" if shutil.which("strace") else "strace is not installed: apt-get install strace"


def watch(work: Callable[[], int], folder: Path, log: Path) -> Trace:
    """Run the work to its end and return its calls on a folder."""
    with _attached(work, log, ["-f"]) as child:
        _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), "the work did not end by itself"
    return _read(log, folder, child)


def kill(work: Callable[[], int], call: Call, folder: Path, log: Path) -> bool:
    """Run the work and kill it before that call takes place; say whether it was killed there and nowhere else."""
    calls = f"trace={call.name}", f"inject={call.name}:signal=SIGKILL:when={call.count}"
    with _attached(work, log, ["-e", calls[0], "-e", calls[1]]) as child:
        _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return False
    last = _read(log, folder, child).changes[-1:]
    return last == (call,)


def apart(work: Callable[[], None]) -> str:
    """Run the work in a forked child; return what it raised, empty where nothing."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        told = "the process ended early"
        try:
            work()
            told = ""
        except BaseException:  # noqa: BLE001  # whatever it is, the parent tells it
            told = traceback.format_exc()
        finally:
            os.write(writes, told.encode()[-4000:])
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return told if os.WIFEXITED(status) else f"the process died with signal {os.WTERMSIG(status)}"


@contextlib.contextmanager
def _attached(work: Callable[[], int], log: Path, options: list[str]) -> Iterator[int]:
    """Fork a child that does the work as soon as strace holds it; give its process id."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
            os.close(writes)
            if os.read(reads, 1):
                code = work()
        finally:
            os._exit(code)
    os.close(reads)
    command = ["strace", "-qq", "-y", "-s", "0", "-o", str(log), *options, "-p", str(child)]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        if _held(child, tracer):
            os.write(writes, b"!")
        yield child
    finally:
        os.close(writes)
        _, told = tracer.communicate(timeout=60)
    assert not told, told.decode(errors="replace")


def _held(child: int, tracer: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + 30
    with open(f"/proc/{child}/status") as status:  # noqa: PTH123  # read again and again
        while time.monotonic() < until and tracer.poll() is None:
            status.seek(0)
            if "TracerPid:\t0\n" not in status.read():
                return True
            time.sleep(0.001)
    return False


def _read(log: Path, folder: Path, process: int) -> Trace:
    changes, unknown, foreign, counts = [], set(), 0, dict.fromkeys(CHANGES, 0)
    for line in log.read_text(errors="replace").splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        name, arguments = found[2], found[3].split(" = ")[0]
        is_own = found[1] is None or int(found[1]) == process
        if is_own and name in counts:
            counts[name] += 1
        paths = tuple(_within(folder, a or b) for a, b in _PATHS.findall(arguments) if _is_within(folder, a or b))
        if not paths:
            continue
        if not _is_change(name, arguments):
            unknown |= {name} if _is_unknown(name, arguments) else set()
        elif is_own:
            changes.append(Call(name, counts[name], paths))
        elif any(path.partition("/")[0] != SCRATCH for path in paths):
            foreign += 1
    return Trace(tuple(changes), frozenset(unknown), foreign)


def _is_within(folder: Path, path: str) -> bool:
    return path == str(folder) or path.startswith(f"{folder}/")


def _within(folder: Path, path: str) -> str:
    return _RANDOM.sub(r"\1…", path.removeprefix(str(folder)).lstrip("/"))


def _is_change(name: str, arguments: str) -> bool:
    if name in ("open", "openat"):
        return "O_CREAT" in arguments or "O_TRUNC" in arguments
    return name in CHANGES


def _is_unknown(name: str, arguments: str) -> bool:
    if name == "mmap":
        return "PROT_WRITE" in arguments and "MAP_SHARED" in arguments
    return name not in LOOKS and name not in ("open", "openat")
