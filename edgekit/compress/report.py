"""Draws what a run did as one HTML page that needs no network. Computes nothing but the plots."""

from __future__ import annotations

import math
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from edgekit.compress import diagnosis, drawings
from edgekit.compress.card import interval, number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from edgekit.compress.diagnosis import LayerFacts
    from edgekit.compress.outcome import Outcome


def page(outcome: Outcome, digest: str) -> str:
    """Return the whole report."""
    model = outcome.compressed
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    title = escape(f"{model.name}, {model.precision}")
    warnings = "".join(f'<p class="warning"><b>WARNING:</b> {escape(text)}.</p>' for text in outcome.warnings)
    machine = escape(", ".join(str(v) for v in outcome.origin.machine.values()))
    body = "".join((*_figures(outcome), *_trades(outcome), *_layers(outcome), *_confusion(outcome), *_parts(outcome)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style></head><body><h1>{title}</h1>"
        f"<p>Compressed with {escape(', '.join(name for name, _ in outcome.recipe.passes))} on {machine}. "
        f"Digest <code>{escape(digest)}</code>.</p>{warnings}{body}</body></html>\n"
    )


def _figures(outcome: Outcome) -> Iterator[str]:
    yield "<h2>Before and after</h2>"
    rows = [
        [name.replace("_", " "), number(before), number(after)]
        for name, (before, after) in outcome.table().items()
        if not name.startswith(("validation_", "test_"))
    ]
    rows += [
        [f"{split} {before.metric} (95 % interval, {before.samples} samples)", interval(before), interval(after)]
        for split, (before, after) in outcome.scores.items()
    ]
    yield _table(["", "before", "after"], rows)
    shown = {n: v for n, v in outcome.table().items() if n in ("bytes", "macs", "latency_ms")}
    names = {"bytes": "bytes", "macs": "multiply-accumulates", "latency_ms": "ms a sample"}
    note = f" Latency: {outcome.latency_note}." if outcome.latency_note else ""
    caption = f"Size, multiply-accumulates and milliseconds side by side.{note}"
    yield _figure(drawings.pairs({names[n]: v for n, v in shown.items()}), caption)
    if outcome.latency is None:
        yield f"<p>Latency: {escape(outcome.latency_note)}.</p>"


def _trades(outcome: Outcome) -> Iterator[str]:
    yield "<h2>What each step bought</h2>"
    metric = outcome.metric
    score = f"validation {metric.name}" if metric else "score"
    rows = [
        [
            s.name,
            number(s.bytes),
            "" if s.macs is None else number(s.macs),
            "" if s.score is None else number(s.score),
            "" if s.ms is None else f"{s.ms:.3g}",
        ]
        for s in outcome.stages
    ]
    yield _table(["after", "bytes", "MACs", score, "ms"], rows)
    sign = 1 if metric is None or metric.higher_is_better else -1
    told = score if sign > 0 else f"- {score}"
    sizes = [(s.name, s.bytes / 1024, sign * s.score) for s in outcome.stages if s.score is not None]
    times = [(s.name, s.ms, sign * s.score) for s in outcome.stages if s.score is not None and s.ms is not None]
    if len(sizes) > 1:
        yield _figure(
            drawings.trade(sizes, "KiB stored", told), "Score against size; the line joins what no other beats."
        )
    if len(times) > 1:
        yield _figure(drawings.trade(times, "ms a sample", told), "Score against latency on this machine.")


def _layers(outcome: Outcome) -> Iterator[str]:
    facts = diagnosis.layer_facts(outcome.compressed)
    if not facts:
        return
    yield "<h2>Layer by layer</h2>"
    rounded = [f for f in facts if math.isfinite(f.sqnr)]
    if rounded:
        worst = sorted(sorted(rounded, key=lambda f: f.sqnr)[: drawings.SHOWN], key=facts.index)
        svg = drawings.bars({f.name: f.sqnr for f in worst}, "dB", {f.name: f"{f.bits} bit" for f in worst})
        yield _figure(svg, "Sensitivity: signal over rounding noise of each weight; the shortest bars lose most.")
    else:
        yield _table(["layer", "bits"], [[f.name, str(f.bits)] for f in facts])
    widest = _widest(facts)
    caption = "From the lowest to the highest weight of each layer."
    yield _figure(drawings.spans({f.name: (f.low, f.high) for f in widest}, "weight"), caption)
    plan = outcome.compressed.plan
    if plan and plan.activations:
        ranges = {name: (r.low, r.high) for name, r in plan.activations.items()}
        kept = sorted(ranges, key=lambda n: ranges[n][0] - ranges[n][1])[: drawings.SHOWN]
        svg = drawings.spans({n: ranges[n] for n in ranges if n in set(kept)}, "activation")
        yield _figure(svg, "The range of each activation on calibration data, as the plan stores it.")


def _widest(facts: Sequence[LayerFacts]) -> list[LayerFacts]:
    kept = set(sorted(range(len(facts)), key=lambda i: facts[i].low - facts[i].high)[: drawings.SHOWN])
    return [fact for i, fact in enumerate(facts) if i in kept]


def _confusion(outcome: Outcome) -> Iterator[str]:
    found = diagnosis.confusion(outcome.original, outcome.compressed)
    if found is None:
        return
    change, names = found
    yield "<h2>Which classes changed places</h2>"
    if not change.any():
        yield "<p>None: on validation both models confuse the same classes equally often.</p>"
        return
    caption = "Confusion after minus before, on validation: off the diagonal, red is a new mistake and blue one gone."
    yield _figure(drawings.difference(change, names), caption)


def _parts(outcome: Outcome) -> Iterator[str]:
    for split, (before, after) in outcome.scores.items():
        for kind, one, two in (("class", before.by_class, after.by_class), ("group", before.by_group, after.by_group)):
            if one:
                rows = [[name, number(value), number(two.get(name, math.nan))] for name, value in one.items()]
                yield f"<h2>{escape(split)} {escape(before.metric)} by {kind}</h2>"
                yield _table([kind, "before", "after"], rows)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
