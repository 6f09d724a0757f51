"""Refuses the system calls that opening and running a model never needs, by a seccomp filter. There is no way back.

No new process or program, no socket, no signal to or look into another process, no memory that no limit counts, no
change of modes, owners, limits, priorities, mounts, keys, or of the machine. Threads are what engines are made of, and
stay.
https://docs.kernel.org/userspace-api/seccomp_filter.html: the numbers are of linux/filter.h, seccomp.h and audit.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import NamedTuple

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
CLONE_THREAD = 0x00010000
X32 = 0x40000000


class _Numbers(NamedTuple):
    """An architecture's own numbers: what is refused outright, and what is judged by an argument."""

    audit: int
    refused: tuple[int, ...]
    clone: int
    clone3: int
    tgkill: int
    prlimit: int


SHARED = (424, 425, 434, 438, 440, 447, 452)
"""pidfd_send_signal, io_uring_setup, pidfd_open, pidfd_getfd, process_madvise, memfd_secret, fchmodat2."""

NUMBERS = {
    "x86_64": _Numbers(
        audit=0xC000003E,
        refused=(
            *SHARED,
            *(57, 58, 59, 322),  # fork, vfork, execve, execveat
            41,  # socket; a pair of them reaches nobody
            *(62, 200, 101, 310, 311, 298, 323),  # kill, tkill, ptrace, process_vm_*, perf_event_open, userfaultfd
            *(319, 29, 240),  # memfd_create, shmget, mq_open
            *(90, 91, 268, 92, 93, 94, 260, 280, 132, 235, 261),  # modes, owners, times
            *(188, 189, 190, 197, 198, 199),  # attributes
            *(
                160,
                141,
                272,
                308,
                165,
                166,
                161,
                155,
                321,
                248,
                249,
                250,
            ),  # limits, priorities, namespaces, mounts, bpf, keys
            *(142, 144, 314, 251),  # the scheduler's classes and parameters: real time takes a core from everybody
            *(172, 173),  # iopl, ioperm: the machine's ports, for root
            *(
                169,
                170,
                171,
                164,
                227,
                159,
                305,
                167,
                175,
                313,
                176,
                246,
            ),  # reboot, names, clocks, swap, modules, kexec
        ),
        clone=56,
        clone3=435,
        tgkill=234,
        prlimit=302,
    ),
    "aarch64": _Numbers(
        audit=0xC00000B7,
        refused=(
            *SHARED,
            *(221, 281),
            198,
            *(129, 130, 117, 270, 271, 241, 282),
            *(279, 194, 180),
            *(52, 53, 54, 55, 88),
            *(5, 6, 7, 14, 15, 16),
            *(164, 140, 97, 268, 40, 39, 51, 41, 280, 217, 218, 219),
            *(118, 119, 274, 30),
            *(142, 161, 162, 170, 112, 171, 266, 224, 105, 273, 106, 104),
        ),
        clone=220,
        clone3=435,
        tgkill=131,
        prlimit=261,
    ),
}
"""From the kernel's own tables (arch/x86/entry/syscalls, asm-generic/unistd.h), in the same order."""


def refuse() -> str:
    """Install the filter in every thread to come, and return why that is not possible; empty where it is."""
    numbers = NUMBERS.get(platform.machine())
    if numbers is None or sys.maxsize < 1 << 32:
        return f"the try-out may call all of the system: there is no filter for {platform.machine()}"
    program = _program(numbers, os.getpid())
    code = ctypes.create_string_buffer(b"".join(program), 8 * len(program))
    whole = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, whole, 0, 0) != 0:
        return f"the try-out may call all of the system: {os.strerror(ctypes.get_errno())}"
    return ""


def _program(numbers: _Numbers, pid: int) -> list[bytes]:
    """Write the filter; a jump says how many instructions are skipped where its test holds, and where not."""
    refuse, vanish = _step(RETURN, ERRNO | errno.EPERM), _step(RETURN, ERRNO | errno.ENOSYS)
    allow, load = _step(RETURN, ALLOW), _step(LOAD, NUMBER)
    judged = [
        # Threads share; clone3 hides what it wants behind a pointer, and the C library then takes clone.
        _step(EQUAL, numbers.clone3, no=1),
        vanish,
        _step(EQUAL, numbers.clone, no=4),
        _step(LOAD, ARGUMENTS),
        _step(HAS_BITS, CLONE_THREAD, no=1),
        allow,
        refuse,
        # abort() is a signal to oneself.
        _step(EQUAL, numbers.tgkill, no=4),
        _step(LOAD, ARGUMENTS),
        _step(EQUAL, pid, no=1),
        allow,
        refuse,
        # Limits may be read: the third argument is the new one.
        _step(EQUAL, numbers.prlimit, no=6),
        _step(LOAD, ARGUMENTS + 16),
        _step(EQUAL, 0, no=3),
        _step(LOAD, ARGUMENTS + 20),
        _step(EQUAL, 0, no=1),
        allow,
        refuse,
    ]
    listed = [step for number in numbers.refused for step in (_step(EQUAL, number, no=1), refuse)]
    foreign = [_step(LOAD, ARCHITECTURE), _step(EQUAL, numbers.audit, yes=1), _step(RETURN, KILL), load]
    x32 = [_step(AT_LEAST, X32, no=1), refuse]
    return [*foreign, *x32, *judged, *listed, allow]


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)
