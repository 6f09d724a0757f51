"""Draws a told story as one self-contained HTML page. Computes nothing."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from edgekit.cli._demo.story import Check, Figure, Table

if TYPE_CHECKING:
    from edgekit.cli._demo.story import Chapter, Story


def page(story: Story, seconds: float, machine: str) -> str:
    """Return the whole report as HTML that needs no network."""
    verdict = "every claim held" if not story.failed else f"{len(story.failed)} claims did NOT hold"
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    body = "".join(_chapter(i, chapter) for i, chapter in enumerate(story.chapters, 1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>edgekit demo</title><style>{style}</style></head><body>"
        f"<h1>From a checkpoint to a healthy fleet</h1><p>{len(story.checks)} claims, {verdict}; "
        f"{seconds:.0f} seconds on {escape(machine)}.</p>{body}</body></html>\n"
    )


def _chapter(number: int, chapter: Chapter) -> str:
    parts = "".join(map(_part, chapter.parts))
    return f"<h2>{number}. {escape(chapter.title)} <small>{chapter.seconds:.0f} s</small></h2>{parts}"


def _part(part: str | Table | Check | Figure) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Check):
        kind, mark = ("good", "&#10004;") if part.holds else ("bad", "&#10008; DID NOT HOLD:")
        return (
            f'<p class="check"><b class="{kind}">{mark}</b> {escape(part.claim)} <small>{escape(part.seen)}</small></p>'
        )
    if isinstance(part, Figure):
        return f"<figure>{part.html}<figcaption>{escape(part.caption)}</figcaption></figure>"
    return f"<p>{escape(part)}</p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
