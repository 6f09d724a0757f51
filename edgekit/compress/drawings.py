"""The report's plots, as SVG text without a date, so that equal figures give equal files. Knows no model."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edgekit.tensors import Array

BEFORE, AFTER, GOOD, BAD, GREY = "#6b7280", "#2f6fde", "#2a9d6f", "#c94f6d", "#9aa3b2"
SHOWN = 60
"""Layers that a plot shows; of more, those of the largest values."""


def trade(points: Sequence[tuple[str, float, float]], unit: str, score: str) -> str:
    """Draw the score of each stage over its cost; stages that no other beats in both are joined by a line."""
    figure, axes = _figure(6.4, 3.2)
    front = sorted((x, y) for _, x, y in points if not any(_beats(other, (x, y)) for _, *other in points))
    axes.plot([x for x, _ in front], [y for _, y in front], color=GREY, linewidth=1, drawstyle="steps-post", zorder=1)
    for i, (name, x, y) in enumerate(points):
        axes.scatter([x], [y], s=42, color=BEFORE if i == 0 else AFTER, zorder=2)
        axes.annotate(_plain(name), (x, y), textcoords="offset points", xytext=(5, 5 - 11 * (i % 2)), fontsize=8)
    axes.set_xlabel(unit)
    axes.set_ylabel(_plain(score))
    axes.margins(0.15)
    axes.set_xlim(left=0)
    return _svg(figure)


def _beats(one: Sequence[float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and tuple(one) != other


def bars(values: Mapping[str, float], unit: str, marks: Mapping[str, str] | None = None) -> str:
    """Draw one horizontal bar a layer, with what is written at its end."""
    figure, axes = _layers(len(values))
    names = list(values)
    axes.barh(range(len(names)), [values[n] for n in names], color=AFTER)
    for i, name in enumerate(names):
        axes.text(values[name], i, f" {(marks or {}).get(name, f'{values[name]:.3g}')}", va="center", fontsize=7)
    _name_layers(axes, names)
    axes.set_xlabel(unit)
    axes.margins(x=0.15)
    return _svg(figure)


def spans(ranges: Mapping[str, tuple[float, float]], unit: str) -> str:
    """Draw from the lowest to the highest value of each layer."""
    figure, axes = _layers(len(ranges))
    names = list(ranges)
    lows, highs = [ranges[n][0] for n in names], [ranges[n][1] for n in names]
    axes.barh(range(len(names)), [h - low for low, h in zip(lows, highs, strict=True)], left=lows, color=AFTER)
    axes.axvline(0, color=GREY, linewidth=0.8)
    _name_layers(axes, names)
    axes.set_xlabel(unit)
    if max(map(abs, lows + highs), default=0) > 50 * max(1e-9, min((h - low for low, h in ranges.values()), default=1)):
        axes.set_xscale("symlog", linthresh=max(1e-6, min(h - low for low, h in ranges.values())))
    return _svg(figure)


def pairs(values: Mapping[str, tuple[float, float]]) -> str:
    """Draw before and after side by side, one plot a figure, each in its own unit."""
    with extra("compress"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 2.2), layout="constrained")
    every = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (name, (before, after)) in zip(every, values.items(), strict=True):
        drawn = axes.bar(["before", "after"], [before, after], color=[BEFORE, BAD if after > before else GOOD])
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=8)
        axes.set_title(_plain(name), fontsize=9)
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def difference(matrix: Array, names: Sequence[str]) -> str:
    """Draw how many samples of each class (row) are told as another (column) more or less often than before."""
    side = min(7.0, 1.6 + 0.34 * len(names))
    figure, axes = _figure(side + 0.8, side)
    most = max(1, int(abs(matrix).max()))
    shown = axes.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most)
    places = range(len(names))
    axes.set_xticks(places, [_plain(n)[:12] for n in names], rotation=90, fontsize=7)
    axes.set_yticks(places, [_plain(n)[:12] for n in names], fontsize=7)
    for row, column in zip(*matrix.nonzero(), strict=True):
        ink = "white" if abs(matrix[row, column]) > most / 2 else "black"
        axes.text(column, row, f"{int(matrix[row, column]):+d}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xlabel("told as")
    axes.set_ylabel("is")
    figure.colorbar(shown, ax=axes, shrink=0.8)
    return _svg(figure)


def _layers(count: int) -> tuple[Figure, Axes]:
    return _figure(6.4, 0.8 + 0.19 * count)


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_plain(n)[-40:] for n in names], fontsize=7)
    axes.invert_yaxis()


def _plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with extra("compress"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:  # noqa: ANN401  # matplotlib has no types here
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgekit"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
