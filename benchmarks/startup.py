"""How fast the command line starts, and how much `pip install edgekit` alone brings."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import ROOT, Row, run

BARE = ("click", "msgspec")
# pip compiles what it installs; an environment that forbids bytecode would measure the compiler instead.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def main(quick: bool) -> list[Row]:
    rounds = 5 if quick else 30
    python = _milliseconds([sys.executable, "-c", ""], rounds)
    rows = [
        Row("edgekit --help", _milliseconds([sys.executable, "-m", "edgekit", "--help"], rounds), "ms",
            "python -c ''", python, "value <= 150"),
        Row("import edgekit", _milliseconds([sys.executable, "-c", "import edgekit"], rounds), "ms",
            "python -c ''", python),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _wheel(Path(scratch))
        rows.append(Row("wheel", wheel.stat().st_size / 1e6, "MB"))
        rows.append(Row("installed, with its two dependencies", _installed(wheel, Path(scratch) / "into"), "MB"))
    return rows


def _milliseconds(command: list[str], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
        times.append(1000 * (time.perf_counter() - began))
    return min(times)  # nothing here varies by itself: what is above the least is the machine's other work


def _wheel(folder: Path) -> Path:
    arguments = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def _installed(wheel: Path, into: Path) -> float:
    quiet = ["-q", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(into), str(wheel)], check=True)
    brought = {path.name.partition("-")[0] for path in into.glob("*.dist-info")}
    assert brought == {"edgekit", *BARE}, brought
    return sum(path.stat().st_size for path in into.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    run("Start-up and size of the bare command line", main)
