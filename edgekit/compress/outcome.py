"""What a run of passes did, in figures: scores with intervals, sizes, multiplications, milliseconds, step by step.

Reads the test split, once, at the end. Draws and writes nothing.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgekit.compress.evaluate import Judge, parameters, stored_bytes, teacher_of
from edgekit.compress.macs import macs
from edgekit.errors import EdgekitError
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.compress.evaluate import Score
    from edgekit.compress.ladder import Climb, Work
    from edgekit.compress.latency import Compared
    from edgekit.compress.metrics import Metric
    from edgekit.compress.origin import Origin
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Model
    from edgekit.progress import Progress

JUDGED = ("validation", "test")

SLOWER = 1.02
"""From which share of the original's latency on a model counts as slower: less is noise."""

NAMED = 8
"""Layers that a note names; of more, those that it hits hardest."""

UNCOMPRESSED = "the uncompressed model"


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

    ``floats`` is the model that the plan was made for, before any pass chose integers: what rounding is measured by.
    ``reference`` names what the metric compares with, empty where it compares with labels. ``latency`` is None where
    nothing was measured; ``latency_note`` says of what it is, or why there is none. ``ladder`` is what a search tried,
    as ``ladder.json`` tells it. ``missed`` are the budgets that are not kept, ``notes`` what is no reason for alarm.
    """

    original: Model
    compressed: Model
    recipe: Recipe
    origin: Origin
    metric: Metric | None
    scores: Mapping[str, tuple[Score, Score]]
    stages: tuple[Stage, ...]
    floats: Model | None = None
    reference: str = ""
    latency: Compared | None = None
    latency_note: str = ""
    ladder: Mapping[str, Any] | None = None
    missed: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person has to know before shipping the model."""
        if self.latency is None or self.latency.fraction < SLOWER:
            return self.missed
        slower = (
            f"the compressed model is SLOWER on this machine: {self.latency.after_ms:.3g} ms after, "
            f"{self.latency.before_ms:.3g} ms before; export and measure on the device before you ship it"
        )
        return (slower, *self.missed)

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

    ``speed`` compares a candidate with the original, ``note`` says of what its milliseconds are. ``floats`` is the
    first model with a plan: the weights that it was made for.
    """

    def __init__(self, original: Model, speed: Callable[[Model], Compared] | None = None, note: str = "") -> None:
        self._speed = speed
        self.note = note
        self.latency: Compared | None = None
        self.floats: Model | None = None
        self.found = [Stage(name="load", bytes=stored_bytes(original), macs=macs(original))]

    def climbed(self, climb: Climb, best: Model) -> None:
        """Weigh the model that a search kept, and take note of the tries that it weighed on the way there.

        Their milliseconds are the target's; beside those measured here they are told as this machine's, by the ratio
        that the kept one has.
        """
        self.seen(best)
        kept, reached = self.found.pop(), climb.best.reached
        seconds = reached.latency if reached else None
        scale = kept.ms / seconds if kept.ms and seconds else 1e3
        for tried in climb.tries:
            if tried.reached is not None and tried is not climb.best:
                ms = None if tried.reached.latency is None else scale * tried.reached.latency
                one = Stage(name=tried.rung, bytes=tried.reached.bytes, score=tried.reached.value, ms=ms)
                self.found.append(one)
        if kept.ms is None and seconds:
            kept = replace(kept, ms=1e3 * seconds)
            self.note += "; the milliseconds of the tries are the target's, as the search took them"
        self.found.append(replace(kept, name=f"{climb.best.rung} (kept)"))

    def seen(self, model: Model) -> None:
        """Weigh the model as it is now; a latency that cannot be measured is noted, and no error."""
        last, ms = model.lineage[-1], None
        if self.floats is None and model.plan is not None:
            self.floats = model
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


class Floats:
    """Remembers of candidates what their plans were made for: passes that choose integers leave none of it."""

    def __init__(self) -> None:
        self._found: dict[int, Model] = {}

    def of(self, candidate: Model) -> Model:
        """Return the first model with a plan on the way to a candidate, or the candidate itself."""
        return self._found.get(id(candidate), candidate)

    def remembering(self, compress: Callable[..., Model]) -> Work:
        """Return what runs a recipe as `compress` does, and remembers as long as somebody holds what comes out."""

        def work(model: Model, recipe: Recipe, progress: Progress) -> Model:
            first: list[Model] = []

            def follow(seen: Model) -> None:
                if seen.plan is not None and not first:
                    first.append(seen)

            made = compress(model, recipe, progress, follow)
            if first and first[0] is not made:
                self._found[id(made)] = first[0]
                weakref.finalize(made, self._found.pop, id(made))  # a search forgets all but the best: they are large
            return made

        return work


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
    used, reference = None, ""
    recipe, origin = made_of
    teacher = teacher_of(model, recipe)
    for name, split in (model.data.splits() if model.data else {}).items():
        if name in JUDGED and len(split):
            progress(f"judge: {name}", len(scores), len(JUDGED))
            judge = Judge(model, split, metric, teacher=teacher)
            used = used or judge.metric
            scores[name] = judge.score(model), judge.score(compressed)
            if judge.compares:
                reference = teacher.told if teacher else UNCOMPRESSED
    first = replace(
        stages.found[0],
        score=scores["validation"][0].value if "validation" in scores else None,
        ms=stages.latency.before_ms if stages.latency else None,
    )
    return Outcome(
        original=model,
        compressed=compressed,
        recipe=recipe,
        origin=origin,
        metric=used,
        scores=scores,
        stages=(first, *stages.found[1:]),
        floats=stages.floats,
        reference=reference,
        latency=stages.latency,
        latency_note=stages.note,
        notes=_saturation(compressed),
    )


def _saturation(model: Model) -> tuple[str, ...]:
    """Tell which layers the target would have spoiled, and what was done about it."""
    steps = [step for step in model.lineage if step.measured.get("saturating_layers")]
    if not steps:
        return ()
    target, measured = steps[-1].options.get("target"), steps[-1].measured
    told = {name.partition(" ")[2]: share for name, share in measured.items() if name.startswith("saturated ")}
    worst = sorted(told, key=lambda name: -told[name])
    layers = ", ".join(f"{name} ({100 * told[name]:.2g} % of its sums)" for name in worst[:NAMED])
    layers += f" and {len(worst) - NAMED} more" if len(worst) > NAMED else ""
    left = measured.get("saturation_sqnr_db")
    cost = "" if left is None else f", which would leave {left:.1f} dB of the worst"
    note = (
        f"{target} adds products of integers in 16 bits and cuts off what does not fit: on calibration data that hits "
        f"{layers}{cost}; these layers got 7 bits, with which every sum fits"
    )
    return (note,)


def finite(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else None
