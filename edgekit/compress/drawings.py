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
    axes.set_xlabel(unit)
    axes.set_ylabel(_plain(score))
    axes.margins(0.15)
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    axes.scatter(xs, ys, s=42, color=[BEFORE, *[AFTER] * (len(points) - 1)], zorder=2)
    right, room = 1.25 * max(xs) or 1.0, 0.2 * (max(ys) - min(ys)) or 0.01 * abs(ys[0]) or 0.01
    axes.set_xlim(0, right)
    axes.set_ylim(min(ys) - room, max(ys) + room)
    corner, cell = (0.0, min(ys) - room), (right / WIDE, (max(ys) - min(ys) + 2 * room) / HIGH)
    names = _joined(points, cell)
    places = {spot: ((spot[0] - corner[0]) / cell[0], (spot[1] - corner[1]) / cell[1]) for spot in names}
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]
    for spot, name in names.items():
        (side, up), box = _free(places[spot], len(name) * LETTER, taken)
        taken.append(box)
        align = "left" if side > 0 else "right"
        axes.annotate(_plain(name), spot, textcoords="offset points", xytext=(side, up), ha=align, fontsize=8)
    return _svg(figure)


WIDE, HIGH, LETTER, LINE = 400.0, 180.0, 4.0, 10.0
"""Points that the axes of `trade` measure, about, and a letter and a line of its labels."""


def _joined(points: Sequence[tuple[str, float, float]], cell: tuple[float, float]) -> dict[tuple[float, float], str]:
    """Return one label for all points that lie on each other to the eye, at the place of the first."""
    found: dict[tuple[float, float], list[str]] = {}
    for name, x, y in points:
        near = [at for at in found if abs(at[0] - x) < 4 * cell[0] and abs(at[1] - y) < 4 * cell[1]]
        found.setdefault(near[0] if near else (x, y), []).append(name)
    return {at: ", ".join(_counted(names)) for at, names in found.items()}


def _counted(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} x{names.count(name)}" for name in dict.fromkeys(names)]


def _free(
    at: tuple[float, float], width: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
    """Return how far right of its point a label begins, or left of it ends, to cover nothing; and the box it fills."""
    spots = [(side, up) for up in (-3.0, 7.0, -13.0, 18.0, -24.0, 29.0, -35.0) for side in (7.0, -7.0)]
    boxes = {}
    for side, up in spots:
        left, low = at[0] + side - (width if side < 0 else 0), at[1] + up
        boxes[side, up] = (left, low, left + width, low + LINE)
    inside = [spot for spot in spots if boxes[spot][0] > 0 and boxes[spot][1] > 0 and boxes[spot][2] < WIDE]
    free = [spot for spot in inside if not any(_touch(boxes[spot], other) for other in taken)]
    best = (free or inside or spots)[0]
    return best, boxes[best]


def _touch(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


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
    longest = max(len((marks or {}).get(n, "")) for n in names)
    axes.margins(x=0.04 + 0.013 * longest)  # room for what stands at the ends
    axes.axvline(0, color=GREY, linewidth=0.8)
    return _svg(figure)


def spans(ranges: Mapping[str, tuple[float, float]], unit: str) -> str:
    """Draw from the lowest to the highest value of each layer."""
    figure, axes = _layers(len(ranges))
    names = list(ranges)
    lows, highs = [ranges[n][0] for n in names], [ranges[n][1] for n in names]
    axes.barh(range(len(names)), [h - low for low, h in zip(lows, highs, strict=True)], left=lows, color=AFTER)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.use_sticky_edges = False  # bars would stick to the frame
    axes.margins(x=0.05)
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
        axes.bar_label(drawn, [f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in (before, after)], fontsize=8)
        axes.set_title(_plain(name), fontsize=9)
        axes.margins(y=0.2)
        axes.set_yticks([])  # the numbers stand on the bars
        axes.spines[["top", "right", "left"]].set_visible(False)
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
    steps = sorted({round(most * share) for share in (-1, -0.5, 0, 0.5, 1)})
    figure.colorbar(shown, ax=axes, shrink=0.8, ticks=steps, label="samples more than before")
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
