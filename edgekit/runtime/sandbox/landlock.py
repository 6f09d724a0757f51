"""Lets this process reach some folders and no others, by Landlock (Linux 5.13). Needs no privilege and has no way back.

https://docs.kernel.org/userspace-api/landlock.html: the numbers are those of linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import stat
from typing import TYPE_CHECKING

from edgekit.errors import from_os

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""The same on every architecture."""
VERSION, PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
FILE_RIGHTS = (13, 13, 14, 15, 15, 16)
"""How many rights on files each version of it knows; the last stands for all later ones."""
TCP = 0b11
SCOPES = 0b11
"""No signal and no abstract Unix socket to a process outside."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


def version() -> int:
    """Return which version of Landlock the kernel has; 0 for none, or one that is switched off."""
    return max(0, _call(CREATE_RULESET, None, 0, VERSION))


def restrict(readable: Iterable[Path], writable: Iterable[Path]) -> str:
    """Allow reading and executing below ``readable``, everything below ``writable``, nothing elsewhere.

    A path that is not there is passed over. Returns why nothing is restricted; empty where it is.

    Raises:
        ResourceError: the kernel has Landlock and refuses.
    """
    found = version()
    if not found:
        return "the try-out may read and write all files: the kernel has no Landlock"
    files = (1 << FILE_RIGHTS[min(found, len(FILE_RIGHTS)) - 1]) - 1
    rules = _Ruleset(files, TCP if found >= 4 else 0, SCOPES if found >= 6 else 0)
    size = 8 if found < 4 else 16 if found < 6 else 24
    ruleset = _checked(_call(CREATE_RULESET, ctypes.byref(rules), size, 0))
    try:
        for path in readable:
            _allow(ruleset, path, READ & files)
        for path in writable:
            _allow(ruleset, path, files)
        _checked(_call(RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return ""


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        mine = rights if stat.S_ISDIR(os.fstat(folder).st_mode) else rights & OF_FILES
        rule = _Beneath(mine, folder)
        _checked(_call(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(rule), 0))
    finally:
        os.close(folder)


def _call(*arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    padded = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(libc.syscall(*padded))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise from_os(OSError(number, os.strerror(number)), "shutting the try-out in with Landlock")
    return result
