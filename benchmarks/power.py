"""The power is cut during updates: does every boot serve a whole bundle, and does the update complete?

A small Linux machine under QEMU runs the real command `edgekit ota agent` on an ext4 disk with default options. It is
killed at random instants, and with it goes all that the kernel had not written. The disk has a write cache of its own
(`_disk.py`): a third of the cuts keep it, a third lose it, and of a third it reaches the disk in part. Then the machine
starts again with that disk: the old or the new bundle has to serve, every byte of it, an update that was reported done
has to stay, and one that was not has to complete and to leave the same files as one that nothing cut.

A boot from cold takes an emulated processor minutes. So most starts thaw one machine that was frozen before it knew its
disk: the kernel reads the disk and repairs it as after any boot. Some are booted from cold.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import _machine
import _updates
import numpy as np
from _disk import Disk
from _report import Row, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _machine import Machine, System
    from _updates import Update

CUTS, COLD = 50, 2
SIZE, DISK_MIB = 8 << 20, 64
SEED = 6


def main(quick: bool) -> list[Row]:
    if missing := _machine.lacking():
        return [Row("power cuts", None, missing)]
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            kernel = _machine.fetch_kernel(Path(scratch))
        except OSError as error:
            return [Row("power cuts", None, str(error))]
        for prepare in _updates.COMPLETING:
            folder = Path(scratch, prepare.__name__)
            folder.mkdir()
            bench = Bench(prepare(folder, SIZE), folder, kernel)
            rows += bench.cuts(4 if quick else CUTS, cold=1 if quick else COLD)
            shutil.rmtree(folder)
    return rows


@dataclass(frozen=True)
class Boot:
    """What a machine told after it was started again."""

    serves: str
    complaint: str
    then_serves: str
    files: dict[str, str]


class Bench:
    """One update, on a machine whose power is cut again and again."""

    def __init__(self, update: Update, folder: Path, kernel: Path) -> None:
        self.update, self.folder = update, folder
        self.disk = _formatted(folder, update.before)
        given = {"before": update.before, "repository": update.repository}
        self.system: System = _machine.build(folder, kernel, given)
        self.seconds = min(self._until_done() for _ in range(3))  # cuts long after the end would prove little
        done, _, _ = self._cut(self.seconds + 5.0, share=1.0, chance=np.random.default_rng(SEED))
        self.whole = self._boot(done, cold=False)
        assert self.whole.then_serves == update.new, self.whole

    def cuts(self, count: int, *, cold: int) -> list[Row]:
        """Cut the power so often; after so many of the cuts boot from cold."""
        failures, lost, done = [], 0, 0
        for number in range(count):
            chance = np.random.default_rng([SEED, number])
            at = float(chance.uniform(0, 1.1 * self.seconds))
            share = (1.0, 0.0, float(chance.random()))[number % 3]
            left, was_done, unflushed = self._cut(at, share=share, chance=chance)
            lost, done = lost + (unflushed > 0), done + was_done
            told = self._judge(left, cold=number < cold, was_done=was_done)
            if told:
                failures.append(told)
                print(f"{self.update.what}, cut {number} at {at:.2f} s, {share:.2f} of the cache kept: {told}")
        what = f"{self.update.what}, power cut at a random instant of {self.seconds:.1f} s"
        print(f"{what}: {done} after it was reported done, {lost} with writes in the disk's cache")
        unit = f"of {count} whole, {cold} booted from cold"
        return [Row(what, count - len(failures), unit, goal=f"value >= {count}")]

    def _judge(self, disk: bytes, *, cold: bool, was_done: bool) -> str:
        """Return what is wrong with a disk after a cut, empty where nothing is."""
        try:
            boot = self._boot(disk, cold=cold)
        except AssertionError as error:
            return f"the machine did not come up: {error}"
        if boot.serves != self.update.new and (was_done or boot.serves != self.update.old):
            return f"{boot.serves[:12]} serves, and the update was {'done' if was_done else 'under way'}"
        if boot.complaint or boot.then_serves != self.update.new:
            return f"the update does not complete: {boot.complaint}"
        found = set(boot.files.items()) ^ set(self.whole.files.items())
        return f"other files than after an update that nothing cut: {sorted(found)}" if found else ""

    def _until_done(self) -> float:
        """Run the update on a disk that lasts, and return how long it takes."""
        with self._running(self.disk.read_bytes(), cold=False) as (machine, _):
            machine.order("update")
            assert machine.wait("began") is not None
            began = time.monotonic()
            told = machine.wait("updated")
            assert told == "", told
            return time.monotonic() - began

    def _cut(self, at: float, *, share: float, chance: np.random.Generator) -> tuple[bytes, bool, int]:
        """Start the update, cut the power after so many seconds; return the disk and whether the update was done."""
        with self._running(self.disk.read_bytes(), cold=False) as (machine, disk):
            machine.order("update")
            assert machine.wait("began") is not None
            machine.wait("updated", at)
            machine.kill()
            told = machine.told("updated")  # it may have been on its way
            return disk.cut(share, chance), told is not None, disk.unflushed

    def _boot(self, content: bytes, *, cold: bool) -> Boot:
        with self._running(content, cold=cold) as (machine, _):
            if cold:
                machine.wait("ready")
            machine.order("check")
            told = [machine.wait(what) for what in ("serves", "updated", "then serves", "files", "end")]
            assert None not in told, "\n".join(machine.lines[-20:])
            serves, complaint, then_serves, files, _ = map(str, told)
            return Boot(serves, complaint, then_serves, json.loads(files))

    @contextlib.contextmanager
    def _running(self, content: bytes, *, cold: bool) -> Iterator[tuple[Machine, Disk]]:
        path = self.folder / "disk.socket"
        path.unlink(missing_ok=True)
        disk = Disk(content, path)
        with _machine.booted(self.system, path, self.folder, cold=cold) as machine:
            yield machine, disk


def _formatted(folder: Path, before: Path) -> Path:
    """Make an ext4 disk, as mkfs does it by default, with the device's folder in it."""
    image, tree = folder / "disk.ext4", folder / "tree"
    tree.mkdir()
    shutil.copytree(before, tree / "device", symlinks=True)
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(image)], check=True)
    return image


if __name__ == "__main__":
    run("Power cut during updates", main)
