"""Makes a model smaller by the passes of a recipe. Decides and measures; lowers nothing into a file format."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.compress.evaluate import figures
from edgekit.manifest import Step
from edgekit.progress import silent

if TYPE_CHECKING:
    from edgekit.compress.passes import CompressionPass
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Model
    from edgekit.progress import Progress

__all__ = ["compress"]


def compress(model: Model, recipe: Recipe, progress: Progress = silent) -> Model:
    """Apply the passes in order to copies of ``model``; each leaves a `Step` with its options and what was measured.

    A step's ``measured`` holds ``parameters``, ``bytes`` and, with data, the validation score (see `evaluate.figures`).

    Raises:
        CompressionError: a pass does not fit the model or its data.
    """
    original = model
    for done, (name, step) in enumerate(recipe.passes):
        progress(f"compress: {name}", done, len(recipe.passes))
        changed = step.apply(model, progress)
        measured = figures(changed, original)
        model = replace(
            changed, lineage=(*model.lineage, _step(name, step, changed.lineage[len(model.lineage) :], measured))
        )
    progress("compress: done", len(recipe.passes), len(recipe.passes))
    return model


def _step(name: str, step: CompressionPass, own: tuple[Step, ...], measured: dict[str, float]) -> Step:
    """Join what the pass noted itself with its options and the figures that every pass gets."""
    options: dict[str, Any] = msgspec.to_builtins(step)
    for note in own:
        options |= note.options
        measured = note.measured | measured
    return Step(name=name, options=options, measured=measured)
