"""The first process of the arm64 system: runs the job of one disk, leaves its answer on another, powers off.

Runs before anything is mounted, by Debian's Python alone; nothing of edgekit is there until the job is unpacked.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import subprocess
import sys
import tarfile
import traceback
from pathlib import Path

FINIT_MODULE = 273
"""Number of the system call on arm64."""
POWER_OFF = 0x4321FEDC
WORK = Path("/job")


def main() -> None:
    """Mount, work, tell, power off; whatever happens in between, the power goes off."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")):  # noqa: S108  # its own
            Path(where).mkdir(exist_ok=True)
            libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None)
        # the archive in memory has no /dev/console, so this process began without any stream
        console = os.open("/dev/console", os.O_RDWR)
        for number in range(3):
            os.dup2(console, number)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        for module in ("virtio_mmio", "virtio_blk"):
            with Path(f"/modules/{module}.ko").open("rb") as file:
                libc.syscall(FINIT_MODULE, file.fileno(), b"", 0)
        work()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        libc.sync()
        libc.reboot(POWER_OFF)


def work() -> None:
    """Unpack the job, run its module, and write status, stderr and answer as a tar."""
    disks = {Path(f"/sys/block/{name}/serial").read_text(): f"/dev/{name}" for name in ("vda", "vdb")}
    with tarfile.open(disks["edgekit0"], "r:") as tar:
        tar.extractall(WORK)  # noqa: S202  # packed by the machine that boots this one
    order = json.loads((WORK / "order.json").read_text())
    environment = {"PATH": "/usr/bin", "HOME": "/tmp", "PYTHONPATH": str(WORK), "OMP_NUM_THREADS": "1"}  # noqa: S108  # nobody else is there
    command = [sys.executable or "/usr/bin/python3", "-B", "-m", order["module"]]
    done = subprocess.run(command, capture_output=True, check=False, cwd=WORK, env=environment)
    parts = {"status": str(done.returncode).encode(), "stderr": done.stderr}
    answer = WORK / order["answer"]
    if done.returncode == 0 and answer.is_file():
        parts[order["answer"]] = answer.read_bytes()
    with tarfile.open(disks["edgekit1"], "w") as tar:
        for name, content in parts.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    os.sync()


if __name__ == "__main__":
    main()
