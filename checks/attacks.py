"""Runs every test that is named after an attack, and prints which attacks edgekit holds against, as a table.

    .venv/bin/python checks/attacks.py          (or: make attacks)

`REQUIRED` is the list. A test anywhere in tests/ stands for an attack by ``@pytest.mark.attack("its name")``. Exit
code 1 where an attack of the list has no test, or a test of it fails; one that is skipped is told with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgekit.cli._terminal import markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = (
    "arbitrary software",
    "rollback: timestamp",
    "rollback: snapshot",
    "rollback: targets",
    "rollback: root",
    "rollback: model",
    "freeze",
    "mix-and-match",
    "endless data",
    "slow data",
    "wrong hardware class",
    "key compromise below threshold",
    "revoked key",
    "threshold 0",
    "duplicate keys",
    "fast-forward",
    "wrong-length target",
    "withheld metadata",
    "unsigned delta",
    "poisoned retained message",
    "replayed desired state",
    "device ids",
    "client takeover",
    "message flood",
    "zip-slip",
    "bomb",
    "symlink",
    "absolute path",
    "unlisted file",
    "external-data escape",
    "truncated GGUF",
    "oversized GGUF",
    "pickle",
)


class Recorder:
    """Notes of each test for which attack it stands, and how it went."""

    def __init__(self) -> None:
        self.attacks: dict[str, list[str]] = {}
        self.reports: dict[str, pytest.TestReport] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note what a test stands for."""
        for mark in item.iter_markers("attack"):
            self.attacks.setdefault(mark.args[0], []).append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test went; what failed in its setup or its end counts."""
        if report.nodeid not in self.reports or not report.passed:
            self.reports[report.nodeid] = report


def files() -> list[str]:
    """List the test files that stand for an attack: to collect the others takes longer than to run these."""
    return sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.attack(" in path.read_text())


def verdict(reports: Sequence[pytest.TestReport]) -> str:
    """Say how an attack went, over all tests of it."""
    if not reports:
        return "NO TEST"
    if failed := [report for report in reports if report.failed]:
        return f"NOT HELD: {failed[0].nodeid.rpartition('::')[2]}"
    if all(report.skipped for report in reports):
        return f"skipped: {reports[0].longrepr[2].removeprefix('Skipped: ')}"  # type: ignore[index]  # of a skip it is a tuple
    return "held"


def tests_of(nodes: Sequence[str]) -> str:
    """Name the functions, each once, with how many cases there are of it."""
    names = [node.rpartition("::")[2].partition("[")[0] for node in nodes]
    counted = ((name, names.count(name)) for name in dict.fromkeys(names))
    return "; ".join(name.removeprefix("test_").replace("_", " ") + f" ({n})" * (n > 1) for name, n in counted)


def main() -> int:
    """Run, print, and return the exit code."""
    recorder = Recorder()
    arguments = ["-m", "attack", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", *files()]
    code = pytest.main([f"--rootdir={ROOT}", *arguments], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    rows, bad = [], 0
    for name in (*REQUIRED, *sorted(set(recorder.attacks) - set(REQUIRED))):
        nodes = recorder.attacks.get(name, [])
        told = verdict([recorder.reports[node] for node in nodes if node in recorder.reports])
        bad += told.startswith("NO")
        rows.append((name, tests_of(nodes), told))
    print("\n" + markdown_table(("attack", "tests", "verdict"), rows))
    held = sum(row[2] == "held" for row in rows)
    print(f"\n{held} of {len(rows)} held, {bad} not held or without a test")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
