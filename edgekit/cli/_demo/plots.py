"""The demo's plots, as SVG text. Knows numbers and colours, nothing of models."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#2f6fde", "#e0742b", "#2a9d6f", "#8d5fd3", "#c94f6d", "#6b7280")


def bars(values: Mapping[str, float], unit: str) -> str:
    """Draw one horizontal bar a name."""
    figure, axes = _figure(7.0, 0.5 + 0.42 * len(values))
    names = list(values)
    axes.barh(names[::-1], [values[n] for n in names[::-1]], color=[PALETTE[i % 6] for i in range(len(names))][::-1])
    for i, name in enumerate(names[::-1]):
        axes.text(values[name], i, f" {values[name]:.3g}", va="center", fontsize=9)
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    return _svg(figure)


def timeline(points: Mapping[str, Sequence[tuple[float, float]]], marks: Mapping[str, float]) -> str:
    """Scatter latency (ms) over time (s), one colour a served version; vertical lines mark events."""
    figure, axes = _figure(7.0, 2.8)
    for i, (name, pairs) in enumerate(points.items()):
        axes.scatter([t for t, _ in pairs], [ms for _, ms in pairs], s=7, color=PALETTE[i % 6], label=name)
    for i, (name, at) in enumerate(marks.items()):
        axes.axvline(at, color="#888888", linewidth=0.8, linestyle="--")
        height = 1.01 + 0.07 * (i % 2)  # two marks may lie close together
        axes.text(at, height, name, transform=axes.get_xaxis_transform(), fontsize=8, ha="center", va="bottom")
    axes.set_xlabel("seconds")
    axes.set_ylabel("ms a request")
    every = sorted(ms for pairs in points.values() for _, ms in pairs)
    if every:  # one slow answer must not flatten all others
        axes.set_ylim(0, 1.3 * every[int(0.99 * (len(every) - 1))])
    axes.legend(frameon=False, loc="upper right")
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with extra("compress"):
        import matplotlib as mpl
        from matplotlib.figure import Figure
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "edgekit"
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def picture(data: bytes, width: int = 360) -> str:
    """Return a photograph as an HTML image that carries its own bytes, made smaller."""
    with extra("device"):
        from PIL import Image
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((width, width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
