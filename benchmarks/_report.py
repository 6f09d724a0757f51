"""How every benchmark speaks: rows beside their peers, one Markdown table, one JSON document, exit code 1 on a miss.

A script gives `run` a function that takes ``quick`` and returns rows.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.cli._terminal import markdown_table
from edgekit.device_profiles import machine
from edgekit.durable import write_file

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edgekit", "torch", "onnx", "onnxruntime", "numpy")


class Row(msgspec.Struct, frozen=True):
    """One figure beside its peer's. ``goal`` reads ``ratio <= 0.30`` or ``value <= 150``; empty for none.

    What could not be measured has no value, and its ``unit`` says why.
    """

    what: str
    value: float | None
    unit: str
    peer: str = ""
    peer_value: float | None = None
    goal: str = ""

    @property
    def ratio(self) -> float | None:
        """The value over the peer's."""
        return self.value / self.peer_value if self.peer_value and self.value is not None else None

    @property
    def holds(self) -> bool | None:
        """Say whether the goal was met; ``None`` where there is no goal."""
        if not self.goal:
            return None
        subject, relation, limit = self.goal.split()
        judged = {"value": self.value, "ratio": self.ratio}[subject]
        bound = self.peer_value if limit == "peer" else float(limit)
        if judged is None or bound is None:
            return False
        return {"<=": judged <= bound, ">=": judged >= bound, "<": judged < bound}[relation]

    def document(self) -> dict[str, object]:
        """Return the row as it stands in the JSON document."""
        return {**msgspec.to_builtins(self), "ratio": self.ratio, "holds": self.holds}


def run(title: str, measure: Callable[[bool], list[Row]]) -> None:
    """Measure, print the table, write the document, and leave with 1 where a goal was missed."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--quick", action="store_true", help="less data and time: to see that it runs, not to believe")
    options = parser.parse_args()
    rows = measure(options.quick)
    document = {
        "title": title,
        "quick": options.quick,
        "machine": {**msgspec.to_builtins(machine.describe()), "packages": _versions()},
        "rows": [row.document() for row in rows],
    }
    if options.json:
        write_file(options.json, msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    print(f"\n## {title}{' (quick)' if options.quick else ''}\n")
    print(markdown_table(("what", "value", "peer", "peer's", "ratio", "goal", "holds"), map(_cells, rows)))
    here = machine.describe()
    print(f"\n{here.cpu}, {here.cores} cores, {platform.system()}, Python {here.python}")
    sys.exit(0 if all(row.holds is not False for row in rows) else 1)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.what,
        f"{_number(row.value)} {row.unit}".strip(),
        row.peer,
        _number(row.peer_value),
        _number(row.ratio),
        row.goal,
        {None: "", True: "yes", False: "**no**"}[row.holds],
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found
