"""How long passes will take, told before they run: from one measured batch and the options of each pass.

Counts in computed samples: what a pass does is some number of them, whatever the network. Reads a clock only through
what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.compress.layers import layers
from edgekit.errors import UsageError
from edgekit.model import whole_batches

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.compress.passes import CompressionPass
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Model

TIMES = 3
"""How often a batch is computed; the fastest counts."""
TRAINED = 8
"""Samples that one sample of training costs: forward, backward, the optimizer and the rounding between them."""
LOOKS = 5
"""How often a pass looks at the graph."""
PLANNED = 4
"""Samples that one sample of a planned network costs: each value is rounded after it was computed."""
WATCHED = 3
"""Samples that one calibration sample costs: two goes, and the histograms between them."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What one sample and one look at the graph cost here, in seconds, and how many samples and layers there are."""

    sample: float
    graph: float
    layers: int
    calibration: int
    train: int
    validation: int

    def of_pass(self, step: CompressionPass) -> float:
        """Estimate the seconds of a pass from those of its options that say how much it computes."""
        return LOOKS * self.graph + self.sample * self._samples(step)

    def of_judging(self) -> float:
        """Estimate the seconds in which a candidate is scored on validation."""
        return 2 * self.graph + self.sample * PLANNED * self.validation

    def of_recipe(self, recipe: Recipe) -> float:
        """Estimate the seconds of all passes and of judging after each."""
        return sum(self.of_pass(step) + self.of_judging() for _, step in recipe.passes) + self.of_judging()

    def _samples(self, step: CompressionPass) -> float:
        known = {name: getattr(step, name) for name in step.__struct_fields__}
        if "epochs" in known:
            return TRAINED * float(known["epochs"]) * self.train
        seen = min(int(known.get("samples") or self.calibration), self.calibration)
        repeats = known.get("iterations") or known.get("steps")
        if repeats:  # layer by layer, so that all layers together are one network
            return WATCHED * seen + TRAINED * float(repeats) * min(int(known.get("batch") or seen), seen)
        return float(WATCHED * seen)


def pace(model: Model, clock: Callable[[], float]) -> Pace:
    """Compute one batch of calibration samples a few times and look at the graph once.

    Raises:
        UsageError: no data.
    """
    if model.data is None:
        raise UsageError(f"{model.name} has no data to measure its speed with", "give --data file.py:function")
    samples, size = whole_batches(model, model.data.calibration)
    batch = samples.head(size).inputs
    times = []
    for _ in range(TIMES):
        started = clock()
        model.network.run(batch)
        times.append(clock() - started)
    for _ in range(2):  # the first look imports what the second finds
        started = clock()
        count = len(layers(model))
        graph = clock() - started
    splits = {name: len(split) for name, split in model.data.splits().items()}
    return Pace(
        sample=min(times) / min(size, len(samples)),
        graph=graph,
        layers=count,
        calibration=splits["calibration"],
        train=splits.get("train", 0),
        validation=splits.get("validation", 0),
    )
