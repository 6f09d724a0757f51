"""Draws a told story as one self-contained HTML page. Computes nothing."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from edgekit.cli._demo.story import Table

if TYPE_CHECKING:
    from edgekit.cli._demo.story import Chapter, Check, Story


def page(story: Story, seconds: float, machine: str) -> str:
    """Return the whole report as HTML that needs no network."""
    verdict = "every claim held" if not story.failed else f"{len(story.failed)} claims did NOT hold"
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    body = "".join(_chapter(i, chapter) for i, chapter in enumerate(story.chapters, 1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>edgekit demo</title><style>{style}</style></head><body>"
        f"<h1>From a checkpoint to a healthy fleet</h1><p>{verdict}; {seconds:.0f} seconds on {escape(machine)}.</p>"
        f"{body}<h2>What was claimed and seen</h2>{_checks(story.checks)}</body></html>\n"
    )


def _chapter(number: int, chapter: Chapter) -> str:
    parts = "".join(_table(p) if isinstance(p, Table) else f"<p>{escape(p)}</p>" for p in chapter.parts)
    plots = "".join(f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for text, svg in chapter.plots)
    return f"<h2>{number}. {escape(chapter.title)} <small>{chapter.seconds:.0f} s</small></h2>{parts}{plots}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _checks(checks: list[Check]) -> str:
    rows = "".join(
        f"<tr><td class={'good' if c.holds else 'bad'}>{'held' if c.holds else 'DID NOT HOLD'}</td>"
        f"<td>{escape(c.claim)}</td><td>{escape(c.seen)}</td></tr>"
        for c in checks
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
