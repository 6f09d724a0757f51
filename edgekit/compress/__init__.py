"""Makes a model smaller by the passes of a recipe. Decides and measures; lowers nothing into a file format."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.compress.evaluate import figures, teacher_of
from edgekit.manifest import Step
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.compress.cache import Cache
    from edgekit.compress.metrics import Metric
    from edgekit.compress.passes import CompressionPass
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Model
    from edgekit.progress import Progress

__all__ = ["compress"]


def compress(  # noqa: PLR0913  # three positional; the rest are keywords with a default
    model: Model,
    recipe: Recipe,
    progress: Progress = silent,
    *,
    metric: Metric | str | None = None,
    cache: Cache | None = None,
    follow: Callable[[Model], None] | None = None,
) -> Model:
    """Apply the passes in order to copies of ``model``; each leaves a `Step` with its options and what was measured.

    A step's ``measured`` holds ``parameters``, ``bytes`` and, with data, the validation score (see `evaluate.figures`).
    ``metric`` is by what it scores, chosen by the data where None; where the recipe distils, likeness is that to the
    teacher, before and after, else to ``model``.
    With a ``cache``, a pass that an earlier run finished on the same content is not done again. ``follow`` is shown
    the model after each pass.

    Raises:
        CompressionError: a pass does not fit the model or its data.
    """
    model = replace(model, documents={})  # they tell of the model as it was
    teacher = teacher_of(model, recipe)
    judged = functools.partial(figures, reference=model, metric=metric, teacher=teacher)
    # the figures of a pass hang on the teacher, though it stands before the distillation
    likeness = (teacher.source, teacher.checkpoint) if teacher else ()
    key = cache.start(model, _named(metric), *likeness) if cache else None
    for done, (name, step) in enumerate(recipe.passes):
        progress(f"compress: {name}", done, len(recipe.passes))
        work = functools.partial(_apply, model, (name, step), judged, progress)
        if cache is None:
            model = work()
        else:
            key = cache.after(key, name, step)
            model = cache.run(key, model, work, progress)
        if follow:
            follow(model)
    progress("compress: done", len(recipe.passes), len(recipe.passes))
    return model


def _apply(
    model: Model, named: tuple[str, CompressionPass], judged: Callable[[Model], dict[str, float]], progress: Progress
) -> Model:
    name, step = named
    changed = step.apply(model, progress)
    own = changed.lineage[len(model.lineage) :]
    return replace(changed, lineage=(*model.lineage, _step(name, step, own, judged(changed))))


def _named(metric: Metric | str | None) -> str:
    return metric if isinstance(metric, str) else metric.name if metric else ""


def _step(name: str, step: CompressionPass, own: tuple[Step, ...], measured: dict[str, float]) -> Step:
    """Join what the pass noted itself with its options and the figures that every pass gets."""
    options: dict[str, Any] = msgspec.to_builtins(step)
    for note in own:
        options |= note.options
        measured = note.measured | measured
    told = {"name": name, "options": options, "measured": measured}
    return msgspec.json.decode(msgspec.json.encode(told), type=Step)  # as a saved model will tell it
