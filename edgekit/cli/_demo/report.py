"""Draws a told story as one self-contained HTML page. Computes nothing."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from edgekit.cli._demo.story import Table

if TYPE_CHECKING:
    from edgekit.cli._demo.story import Chapter, Check, Story

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #ffffff; --line: #d9dee7; --soft: #f4f6fa; --good: #1c7c54; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14181f; --line: #343b47; --soft: #1d232d; --good: #55c795; --bad: #ff8a80 } }
body { margin: 0 auto; max-width: 54rem; padding: 2rem 1rem 4rem; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.9rem; margin-bottom: .2rem } h2 { margin-top: 2.4rem; border-top: 1px solid var(--line); padding-top: 1.2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem } th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th { background: var(--soft) } figure { margin: 1.2rem 0; background: #fff; color: #1d2430; border: 1px solid var(--line); border-radius: 8px; padding: .8rem }
figure svg { width: 100%; height: auto } figcaption { font-size: .9rem; padding-top: .3rem } .good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 } small { opacity: .7 }
"""


def page(story: Story, seconds: float, machine: str) -> str:
    """Return the whole report as HTML that needs no network."""
    verdict = "every claim held" if not story.failed else f"{len(story.failed)} claims did NOT hold"
    body = "".join(_chapter(i, chapter) for i, chapter in enumerate(story.chapters, 1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>edgekit demo</title><style>{STYLE}</style></head><body>"
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
