"""An update of the agent, killed right before each of its calls that change the disk: how often is the device whole?

Every call of the real command `edgekit ota agent` on the device's folder is counted in a run that is left alone; then
the command is killed with SIGKILL before each of them, on a fresh copy of the folder. After each kill the old or the
new bundle has to serve, every byte of it, and the update has to complete and to leave the same files as one that was
left alone. A kill keeps what the process wrote; `power.py` does not.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import _tracing
import _updates
import numpy as np
from _report import Row, run

if TYPE_CHECKING:
    from _tracing import Call
    from _updates import Update

SIZE = 4 << 20
"""Bytes of weights, 16 blocks of a download."""
SEED, TRIES = 6, 3


def main(quick: bool) -> list[Row]:
    if missing := _tracing.lacking():
        return [Row("kills", None, missing)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for prepare in _updates.KINDS:
            folder = Path(scratch, prepare.__name__)
            folder.mkdir()
            rows += matrix(prepare(folder, SIZE), folder, sample=12 if quick else None, twice=3 if quick else 20)
            shutil.rmtree(folder)
    return rows


def matrix(update: Update, folder: Path, *, sample: int | None = None, twice: int = 0) -> list[Row]:
    """Kill an update before each of its calls, or a ``sample`` of them; then ``twice`` times the restart as well."""
    victim = Victim(update, folder)
    calls = victim.trace.changes
    chosen = range(len(calls)) if sample is None else _chance().choice(len(calls), sample, replace=False)
    failures = [told for number in chosen if (told := victim.survives(number))]
    told_of = ", ".join(
        f"{count} {name}" for name, count in Counter(calls[number].name for number in chosen).most_common()
    )
    rows = [
        Row(
            f"{update.what}: calls on the folder that no kill covers",
            len(victim.unknown) + victim.foreign,
            " ".join(sorted(victim.unknown)) or "calls",
            goal="value <= 0",
        ),
        _row(f"{update.what}, killed", failures, len(chosen), f": {told_of}"),
    ]
    if twice:
        again = [told for seed in range(twice) if (told := victim.survives_two(_chance(seed)))]
        rows.append(_row(f"{update.what}, killed, and killed again after the restart", again, twice, ""))
    return rows


def _row(what: str, failures: list[str], count: int, details: str) -> Row:
    for told in failures[:3]:
        print(f"{what}: {told}")
    return Row(what, count - len(failures), f"of {count} whole{details}", goal=f"value >= {count}")


def _chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([SEED, seed])


@dataclass
class Victim:
    """A device that is killed, again and again from the same state.

    Killed is one that tries out in its own process: how many files another one opens differs from run to run. That the
    other one changes nothing in the folder is seen once, in ``foreign``.
    """

    update: Update
    folder: Path
    state: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.state, self.log = self.folder / "device", self.folder / "strace.log"
        self._reset(self.update.before)
        shut_in = _tracing.watch(self._update_as_it_is, self.state, self.log)
        self._reset(self.update.before)
        self.trace = _tracing.watch(self._update, self.state, self.log)
        self.unknown = shut_in.unknown | self.trace.unknown
        self.foreign = shut_in.foreign + self.trace.foreign
        self.files = _updates.contents(self.state)
        assert _tracing.apart(self._serves_the_new) == ""

    def survives(self, number: int) -> str:
        """Kill a run before one of its calls; return what is wrong after that, empty if nothing."""
        call = self._kill(self.update.before, number, self.trace.changes)
        told = _tracing.apart(self._comes_up)
        return f"{told}after a kill at {call}" if told else ""

    def survives_two(self, chance: np.random.Generator) -> str:
        """Kill a run anywhere, and the one after it anywhere."""
        one = self._kill(self.update.before, int(chance.integers(len(self.trace.changes))), self.trace.changes)
        kept = self.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.state, kept, symlinks=True)
        left = self._watch(kept)
        other = self._kill(kept, int(chance.integers(len(left))), left)
        told = _tracing.apart(self._comes_up)
        return f"{told}after kills at {one} and {other}" if told else ""

    def _kill(self, start: Path, number: int, calls: tuple[Call, ...]) -> Call:
        """Kill a run before that call; return the call.

        A file that appears elsewhere meanwhile may let an import open one more: then the calls are counted anew.
        """
        for _ in range(TRIES):
            self._reset(start)
            if _tracing.kill(self._update, calls[number], self.state, self.log):
                return calls[number]
            calls = self._watch(start)
        raise AssertionError(f"it was never killed at {calls[number]}")

    def _watch(self, start: Path) -> tuple[Call, ...]:
        self._reset(start)
        return _tracing.watch(self._update, self.state, self.log).changes

    def _reset(self, start: Path) -> None:
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.copytree(start, self.state, symlinks=True)

    def _update(self) -> int:
        _updates.try_out_here()
        return self._update_as_it_is()

    def _update_as_it_is(self) -> int:
        return int(bool(_updates.update(self.state, self.update.repository)))

    def _comes_up(self) -> None:
        """Check what serves after the restart, then that the update completes; runs in a process of its own."""
        serving = _updates.served(self.state)
        assert serving in (self.update.old, self.update.offered), f"neither the old nor the new bundle: {serving}"
        self._update()
        self._serves_the_new()
        found = _updates.contents(self.state)
        assert found == self.files, f"other files than after an update left alone: {set(found) ^ set(self.files)}"

    def _serves_the_new(self) -> None:
        assert _updates.served(self.state) == self.update.new, "the update did not complete"


if __name__ == "__main__":
    run("Updates killed at every call that changes the disk", main)
