"""The first process of the machine whose power is cut: waits for an order on the console, updates or checks the device.

It is ready before it knows the disk: the disk's driver is loaded when an order comes, so that a machine may be frozen
when it is ready, and be thawed with another disk as often as wanted.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

FINIT_MODULE = 313
"""Number of the system call on x86-64."""
POWER_OFF = 0x4321FEDC
PACKAGES = ["/", "/packages"]
REPOSITORY, DISK, STATE = Path("/repository"), Path("/disk"), Path("/disk/device")


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")):  # noqa: S108  # its own
            Path(where).mkdir(exist_ok=True)
            libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None)
        console = os.open("/dev/ttyS0", os.O_RDWR)
        for number in range(3):
            os.dup2(console, number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        work(libc)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        libc.reboot(POWER_OFF)


def tell(what: str, value: object = "") -> None:
    print(f"edgekit:{what}:{value}", flush=True)


def work(libc: ctypes.CDLL) -> None:
    """Get ready, then obey one order."""
    sys.path += PACKAGES
    import _updates

    _updates.try_out_here()
    if "edgekit.cold" not in Path("/proc/cmdline").read_text():
        _warm_up(_updates)
    tell("ready")
    order = sys.stdin.readline().strip()
    _mount(libc)
    if order == "update":
        tell("began")
        tell("updated", _updates.update(STATE, REPOSITORY).replace("\n", " "))
        sys.stdin.readline()  # until the power is cut
    tell("serves", _updates.served(STATE))
    tell("updated", _updates.update(STATE, REPOSITORY).replace("\n", " "))
    tell("then serves", _updates.served(STATE))
    tell("files", json.dumps(_updates.contents(STATE)))
    libc.umount(str(DISK).encode())
    tell("end")


def _warm_up(updates: ModuleType) -> None:
    """Import all there is, by an update in memory."""
    warm = Path("/tmp/warm")  # noqa: S108  # nobody else is there
    shutil.copytree("/before", warm, symlinks=True)
    updates.served(warm)
    updates.update(warm, REPOSITORY)
    shutil.rmtree(warm)


def _mount(libc: ctypes.CDLL) -> None:
    """Load the disk's driver, and mount it with what is the default for ext4."""
    for path in sorted(Path("/modules").iterdir()):
        with path.open("rb") as file:
            if libc.syscall(FINIT_MODULE, file.fileno(), b"", 0):
                raise OSError(ctypes.get_errno(), f"cannot load {path.name}")
    DISK.mkdir(exist_ok=True)
    if libc.mount(b"/dev/vda", str(DISK).encode(), b"ext4", 0, None):
        raise OSError(ctypes.get_errno(), "cannot mount the disk")


if __name__ == "__main__":
    main()
