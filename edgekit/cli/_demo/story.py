"""What the demo tells and proves: chapters, tables, figures, and checks that can fail. Runs nothing itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.cli._terminal import Terminal


@dataclass(frozen=True)
class Check:
    """One claim of the story and whether it held."""

    claim: str
    holds: bool
    seen: str


@dataclass(frozen=True)
class Table:
    """A table of a chapter: printed in the terminal, drawn in the report."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """Something to look at in the report: a piece of HTML (SVG or an image) and its caption."""

    html: str
    caption: str


@dataclass
class Chapter:
    """A heading, and what was told, in order."""

    title: str
    parts: list[str | Table | Check | Figure] = field(default_factory=list)
    seconds: float = 0.0


class Story:
    """Tells the chapters to a terminal and keeps them for the report."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.chapters: list[Chapter] = []
        self.checks: list[Check] = []
        self._began = self._chapter_began = time.monotonic()

    def chapter(self, title: str) -> None:
        """Open the next chapter."""
        self._close_chapter()
        self.chapters.append(Chapter(title))
        self._chapter_began = time.monotonic()
        self.terminal.say(f"\n{len(self.chapters)}. {title}\n{'─' * (len(title) + 3)}")

    def tell(self, text: str) -> None:
        """Say a sentence."""
        self.chapters[-1].parts.append(text)
        self.terminal.say(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a table."""
        table = Table(tuple(columns), tuple(tuple(str(v) for v in row) for row in rows))
        self.chapters[-1].parts.append(table)
        self.terminal.table(table.columns, table.rows)

    def show(self, caption: str, html: str) -> None:
        """Keep a plot or a picture for the report."""
        self.chapters[-1].parts.append(Figure(html, caption))

    def check(self, claim: str, seen: object, *, holds: bool) -> None:
        """State a claim with what was really seen; a claim that does not hold makes the demo fail."""
        check = Check(claim, bool(holds), str(seen))
        self.checks.append(check)
        self.chapters[-1].parts.append(check)
        mark = "✔" if check.holds else "✘"
        self.terminal.say(f"  {mark} {claim} ({check.seen})")

    def close(self) -> float:
        """End the last chapter; return the seconds the story took."""
        self._close_chapter()
        return time.monotonic() - self._began

    @property
    def failed(self) -> list[Check]:
        """The claims that did not hold."""
        return [check for check in self.checks if not check.holds]

    def _close_chapter(self) -> None:
        if self.chapters:
            self.chapters[-1].seconds = time.monotonic() - self._chapter_began
