"""Draws what a run did as one HTML page that needs no network. Measures nothing but layers and confusion."""

from __future__ import annotations

import math
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgekit.compress import diagnosis, drawings
from edgekit.compress.card import interval, likeness, machine, number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from edgekit.compress.diagnosis import LayerFacts
    from edgekit.compress.outcome import Outcome

MOST_PAIRS = 20
"""Pairs of classes that a table tells where there are too many classes for a plot."""

CUT_OFF = "cut off, %"

NAMES = {"macs": "multiply-accumulates", "latency_ms": "latency, ms a sample"}


def page(outcome: Outcome, digest: str) -> str:
    """Return the whole report."""
    model = outcome.compressed
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    title = escape(f"{model.name}, {model.precision}")
    warnings = "".join(f'<p class="warning"><b>WARNING:</b> {escape(text)}.</p>' for text in outcome.warnings)
    notes = "".join(f"<p><b>Note:</b> {escape(text)}.</p>" for text in outcome.notes)
    sections = (_figures, _trades, _search, _layers, _confusion, _parts)
    body = "".join(part for section in sections for part in section(outcome))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{style}</style></head><body><h1>{title}</h1>"
        f"<p>Compressed with {escape(', '.join(name for name, _ in outcome.recipe.passes))}; the machine: "
        f"{escape(machine(outcome))}. Digest <code>{escape(digest)}</code>.</p>{warnings}{notes}{body}</body></html>\n"
    )


def _figures(outcome: Outcome) -> Iterator[str]:
    yield "<h2>Before and after</h2>"
    rows = [
        [NAMES.get(name, name), number(before), number(after)]
        for name, (before, after) in outcome.table().items()
        if not name.startswith(("validation_", "test_"))
    ]
    rows += [
        [f"{split} {before.metric} (95 % interval, {before.samples} samples)", interval(before), interval(after)]
        for split, (before, after) in outcome.scores.items()
    ]
    yield _table(["", "before", "after"], rows)
    if outcome.reference:
        yield f"<p>{escape(likeness(outcome))}</p>"
    shown = {n: v for n, v in outcome.table().items() if n in ("bytes", "macs", "latency_ms")}
    plot = drawings.pairs({NAMES.get(n, n): v for n, v in shown.items()})
    note = f"Latency: {outcome.latency_note}." if outcome.latency_note else ""
    if outcome.latency is None:
        yield _figure(plot, "Size and multiply-accumulates before and after.")
        yield f"<p>{escape(note)}</p>"
        return
    yield _figure(plot, f"Size, multiply-accumulates and milliseconds side by side. {note}")


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
    yield _table(["after", "bytes", "MACs", score, "ms a sample"], rows)
    sign = 1 if metric is None or metric.higher_is_better else -1
    told = score if sign > 0 else f"- {score}"
    sizes = [(s.name, s.bytes / 1024, sign * s.score) for s in outcome.stages if s.score is not None]
    times = [(s.name, s.ms, sign * s.score) for s in outcome.stages if s.score is not None and s.ms is not None]
    if len(sizes) > 1:
        yield _figure(
            drawings.trade(sizes, "KiB stored", told), "Score against size; the line joins what no other beats."
        )
    if len(times) > 1:
        where = "on this machine" if outcome.latency else "on the target, as the search took it"
        yield _figure(drawings.trade(times, "ms a sample", told), f"Score against latency {where}.")


def _search(outcome: Outcome) -> Iterator[str]:
    found = outcome.ladder
    if found is None:
        return
    yield "<h2>What broke it</h2>"
    yield from _blame("The first candidate that was not good enough suffered from:", found["broke"])
    yield from _blame("The one that was kept still suffers from:", found["left"])
    if not (found["broke"] or found["left"]):
        yield "<p>Nothing: no layer was to blame.</p>"
    budget = found["budget"]
    allowed = [f"{number(budget['max_drop'])} {_unit(outcome)} lost"]
    allowed += [f"{number(budget['size'])} bytes"] if budget["size"] else []
    allowed += [f"{number(1e3 * budget['latency'])} ms a sample"] if budget["latency"] else []
    yield f"<p>Tried for {escape(found['target'])}, at most {escape(', '.join(allowed))}:</p>"
    weighed = [tried for tried in found["tries"] if "drop" in tried]
    columns = ["rung", "lost", "bytes", "SQNR, dB"]
    columns += [f"ms, {found['latency_is']}"] if found["latency_is"] else []
    columns += [CUT_OFF] if any(tried["saturated"] for tried in weighed) else []
    yield _table([*columns, "recipe"], [_tried(tried, columns) for tried in found["tries"]])
    cut = "; cut off is the share of the sums in the worst layer that the target cannot hold"
    yield f"<p>SQNR is that of the outputs{cut if CUT_OFF in columns else ''}.</p>"


def _blame(what: str, suspects: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if suspects:
        items = "".join(f"<li>{escape(suspect['told'])}</li>" for suspect in suspects)
        yield f"<p>{escape(what)}</p><ul>{items}</ul>"


def _unit(outcome: Outcome) -> str:
    metric = outcome.metric
    return "" if metric is None else f"points of {metric.name}" if metric.points else metric.name


def _tried(tried: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return a row of the table of tries; one that was not begun has no figures."""
    if "drop" not in tried:
        told = f"{tried['recipe']}; not tried: {tried['note']}"
        return [tried["rung"], *[""] * (len(columns) - 1), told]
    name = f"{tried['rung']} (kept)" if tried["kept"] else tried["rung"]
    ms = "" if tried["latency"] is None else f"{1e3 * tried['latency']:.3g}"
    row = [name, number(tried["drop"]), number(tried["bytes"]), f"{tried['fidelity']:.1f}"]
    row += [ms] if any(column.startswith("ms") for column in columns) else []
    row += [f"{100 * tried['saturated']:.2g}"] if CUT_OFF in columns else []
    return [*row, tried["recipe"]]


def _layers(outcome: Outcome) -> Iterator[str]:
    facts = diagnosis.layer_facts(outcome.compressed, outcome.floats)
    if not facts:
        return
    yield "<h2>Layer by layer</h2>"
    rounded = [f for f in facts if math.isfinite(f.sqnr)]
    if rounded:
        worst = sorted(sorted(rounded, key=lambda f: f.sqnr)[: drawings.SHOWN], key=facts.index)
        marks = {f.name: f"{f.sqnr:.1f} dB, {f.bits} bit" for f in worst}
        svg = drawings.bars({f.name: f.sqnr for f in worst}, "output over the damage of rounding, dB", marks)
        yield _figure(svg, _sensitivity(outcome))
    else:
        yield _table(["layer", "bits"], [[f.name, str(f.bits)] for f in facts])
    widest = _widest(facts)
    caption = "From the lowest to the highest weight of each layer."
    yield _figure(drawings.spans({f.name: (f.low, f.high) for f in widest}, "value of the weights"), caption)
    plan = outcome.compressed.plan
    if plan and plan.activations:
        ranges = {name: (r.low, r.high) for name, r in plan.activations.items()}
        kept = sorted(ranges, key=lambda n: ranges[n][0] - ranges[n][1])[: drawings.SHOWN]
        svg = drawings.spans({n: ranges[n] for n in ranges if n in set(kept)}, "value of the activation")
        yield _figure(svg, "The range of each activation on calibration data, as the plan stores it.")


def _sensitivity(outcome: Outcome) -> str:
    """Say what the plot shows; a pass that trains behind the plan moves weights, too."""
    made = outcome.floats.lineage if outcome.floats else ()
    trained = [s.name for s in outcome.compressed.lineage[len(made) :] if "train_loss" in s.measured]
    told = "Sensitivity: the output of each layer over what the rounding of its weight and input does to it, on "
    told += "calibration data; all other layers are float. The shortest bars lose most."
    return f"{told} What {', '.join(trained)} trained is in it as well." if trained else told


def _widest(facts: Sequence[LayerFacts]) -> list[LayerFacts]:
    kept = set(sorted(range(len(facts)), key=lambda i: facts[i].low - facts[i].high)[: drawings.SHOWN])
    return [fact for i, fact in enumerate(facts) if i in kept]


def _confusion(outcome: Outcome) -> Iterator[str]:
    found = diagnosis.confusion(outcome.original, outcome.compressed)
    if found is None:
        return
    yield "<h2>Which classes changed places</h2>"
    change, moved = found.change, found.moved
    if not moved:
        yield "<p>None: on validation both models confuse the same classes equally often.</p>"
    elif change is not None:
        caption = (
            "Confusion after minus before, on validation: off the diagonal, red is a new mistake and blue one gone."
        )
        yield _figure(drawings.difference(change, found.names), caption)
    else:
        most = f"the {MOST_PAIRS} that changed most" if len(moved) > MOST_PAIRS else "all of them"
        yield (
            f"<p>{len(found.names)} classes are too many for a plot. On validation {len(moved)} kinds of mistake "
            f"became more or less frequent; these are {most}.</p>"
        )
        rows = [[is_, as_, f"{one}", f"{two}", f"{two - one:+d}"] for is_, as_, one, two in moved[:MOST_PAIRS]]
        yield _table(["is", "told as", "samples before", "samples after", "change"], rows)


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
