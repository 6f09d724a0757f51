"""What a run of passes did, in figures: scores with intervals, sizes, multiplications, milliseconds, step by step.

Reads the test split, once, at the end. Draws and writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgekit.compress.evaluate import Judge, parameters, stored_bytes
from edgekit.compress.macs import macs
from edgekit.errors import EdgekitError
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.compress.evaluate import Score
    from edgekit.compress.latency import Compared
    from edgekit.compress.metrics import Metric
    from edgekit.compress.origin import Origin
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Model
    from edgekit.progress import Progress

JUDGED = ("validation", "test")

SLOWER = 1.02
"""From which share of the original's latency on a model counts as slower: less is noise."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model as it was after a pass, or at the beginning (``load``)."""

    name: str
    bytes: int
    macs: int | None = None
    score: float | None = None
    ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All figures of a run. ``scores`` holds before and after for each split that was judged.

    ``latency`` is None where nothing was measured; ``latency_note`` says of what it is, or why there is none.
    """

    original: Model
    compressed: Model
    recipe: Recipe
    origin: Origin
    metric: Metric | None
    scores: Mapping[str, tuple[Score, Score]]
    stages: tuple[Stage, ...]
    latency: Compared | None = None
    latency_note: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person has to know before shipping the model."""
        if self.latency is None or self.latency.fraction < SLOWER:
            return self.notes
        slower = (
            f"the compressed model is SLOWER on this machine: {self.latency.after_ms:.3g} ms after, "
            f"{self.latency.before_ms:.3g} ms before; export and measure on the device before you ship it"
        )
        return (slower, *self.notes)

    def table(self) -> dict[str, tuple[float, float]]:
        """Return every figure before and after, by name."""
        first, last = self.stages[0], self.stages[-1]
        found: dict[str, tuple[float, float]] = {
            "parameters": (parameters(self.original), parameters(self.compressed)),
            "bytes": (first.bytes, last.bytes),
        }
        if first.macs is not None and last.macs is not None:
            found["macs"] = (first.macs, last.macs)
        if self.latency:
            found["latency_ms"] = (self.latency.before_ms, self.latency.after_ms)
        for split, (before, after) in self.scores.items():
            found[f"{split}_{before.metric}"] = (before.value, after.value)
        return found


class Stages:
    """Takes note of the model after each pass: give `seen` to `compress` as ``follow``.

    ``speed`` compares a candidate with the original, ``note`` says of what its milliseconds are.
    """

    def __init__(self, original: Model, speed: Callable[[Model], Compared] | None = None, note: str = "") -> None:
        self._speed = speed
        self.note = note
        self.latency: Compared | None = None
        self.found = [Stage(name="load", bytes=stored_bytes(original), macs=macs(original))]

    def note_try(self, name: str, size: int, score: float) -> None:
        """Take note of a candidate that was weighed elsewhere."""
        self.found.append(Stage(name=name, bytes=size, score=score))

    def seen(self, model: Model) -> None:
        """Weigh the model as it is now; a latency that cannot be measured is noted, and no error."""
        last, ms = model.lineage[-1], None
        if self._speed:
            try:
                self.latency = self._speed(model)
                ms = self.latency.after_ms
            except EdgekitError as error:
                self.latency, self._speed, self.note = None, None, f"not measured: {error.message}"
        score = next((v for name, v in last.measured.items() if name.startswith("validation_")), None)
        self.found.append(
            Stage(name=last.name, bytes=stored_bytes(model), macs=macs(model), score=score, ms=ms),
        )


def outcome_of(  # noqa: PLR0913  # four positional; the rest are keywords with a default
    model: Model,
    compressed: Model,
    made_of: tuple[Recipe, Origin],
    stages: Stages,
    *,
    metric: Metric | str | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Score both models on validation and, read here and nowhere else, on test; join all figures.

    Raises:
        CompressionError: a model gives something that the metric cannot judge.
    """
    scores: dict[str, tuple[Score, Score]] = {}
    used = None
    for name, split in (model.data.splits() if model.data else {}).items():
        if name in JUDGED and len(split):
            progress(f"judge: {name}", len(scores), len(JUDGED))
            judge = Judge(model, split, metric)
            used = used or judge.metric
            scores[name] = judge.score(model), judge.score(compressed)
    first = replace(
        stages.found[0],
        score=scores["validation"][0].value if "validation" in scores else None,
        ms=stages.latency.before_ms if stages.latency else None,
    )
    recipe, origin = made_of
    return Outcome(
        original=model,
        compressed=compressed,
        recipe=recipe,
        origin=origin,
        metric=used,
        scores=scores,
        stages=(first, *stages.found[1:]),
        latency=stages.latency,
        latency_note=stages.note,
    )


def finite(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else None
