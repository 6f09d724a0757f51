"""GPTQ: rounds a layer's weights one input after the other, and lets the rest make up for what each loses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress.feedback import BLOCK, compensated
from edgekit.compress.gram import Aim, Problem, problem, shifted_offsets
from edgekit.compress.passes import CompressionPass
from edgekit.compress.refining import Choice, calibration, planned, refine
from edgekit.compress.rows import some_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.model import Model
    from edgekit.plan import WeightRule
    from edgekit.progress import Progress


class Gptq(CompressionPass, frozen=True):
    """Choose the integers of each planned layer so that its output, not its weight, comes near the float one.

    Inputs are rounded one by one, those with the largest activations first (``order = "activations"``), each error
    spread over the rest by the inverse Hessian (Frantar et al. 2022, "GPTQ", section 3). The Hessian is that of
    ``rows`` input rows of the planned network, ``damping`` of its mean diagonal added. ``asymmetric`` aims at the
    output of the float network, whatever the earlier layers lost (as Nagel et al. 2020, equation 25), else at
    the same weight. ``sweeps`` go over all inputs again and take the best integer of each while the others stand
    (Behdin et al. 2023, "QuantEase", section 3). ``scales = "fit"`` alternates that with the least-squares scale of
    each channel; groups and tensors keep the plan's. Both fit the calibration data closer, and wide networks worse
    beyond it: they are off. ``bias`` restores the mean of each output. Depthwise and grouped
    convolutions are solved group by group.
    """

    asymmetric: bool = True
    damping: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    order: Literal["activations", "stored"] = "activations"
    sweeps: Annotated[int, msgspec.Meta(ge=0, le=20)] = 0
    scales: Literal["plan", "fit"] = "plan"
    bias: bool = True
    rows: Annotated[int, msgspec.Meta(ge=64)] = 8192
    samples: Annotated[int, msgspec.Meta(ge=1)] = 512
    seed: int = 0

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the model with weights on the grid of its plan.

        Raises:
            CompressionError: no plan, no calibration data, or a network that cannot be walked through.
        """
        planned(model, "gptq")
        return refine(model, calibration(model, self.samples), self._choose, progress, name="gptq")

    def _choose(
        self, layer: Layer, rule: WeightRule, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]
    ) -> Choice:
        rows = some_rows(layer, floats, planned, self.rows, seed=self.seed)
        shifts = self.bias and layer.offsets is not None
        aim = Aim(damping=self.damping, is_asymmetric=self.asymmetric, is_centred=shifts)
        task = problem(layer, rule, rows, aim)
        nearest = task.share(task.values(task.integers(task.weight)))
        solved, integers = self._solve(task)
        values = solved.as_weight(solved.values(integers))
        offsets = shifted_offsets(layer, rows, values) if shifts else None
        return Choice(solved.rule, values, offsets, solved.share(solved.values(integers)), nearest)

    def _solve(self, task: Problem) -> tuple[Problem, torch.Tensor]:
        integers = sweep(task, compensated(task, by_activations=self.order == "activations"), self.sweeps)
        if self.scales == "plan" or task.rule.granularity != "channel":
            return task, integers
        for _ in range(FITS):
            task = task.rescaled(fitted(task, integers))
            integers = sweep(task, integers, self.sweeps)
        return task, integers


FITS = 3
"""Rounds of fitting scales and integers in turn: later ones change hardly anything."""


def sweep(task: Problem, integers: torch.Tensor, times: int) -> torch.Tensor:
    """Take, input after input, the integer of least error while the others stand; until none moves."""
    integers = integers.clone()
    diagonal = task.gram.diagonal(dim1=1, dim2=2)
    for _ in range(times):
        values = task.values(integers)
        slopes = (values - task.target) @ task.gram
        moved = False
        for start in range(0, integers.shape[2], BLOCK):
            end = min(start + BLOCK, integers.shape[2])
            before = values[:, :, start:end].clone()
            for at in range(start, end):
                best = task.integers(values[:, :, at] - slopes[:, :, at] / diagonal[:, None, at], at)
                step = (best - integers[:, :, at]) * task.scales[:, :, at]
                integers[:, :, at] = best
                values[:, :, at] += step
                slopes[:, :, at:end] += step[:, :, None] * task.gram[:, None, at, at:end]
            changed = values[:, :, start:end] - before
            if bool(changed.any()):
                moved = True
                slopes[:, :, end:] += changed @ task.gram[:, start:end, end:]
        if not moved:
            break
    return integers


def fitted(task: Problem, integers: torch.Tensor) -> torch.Tensor:
    """Return the scale of least error for each channel's integers, [groups, outputs / groups]."""
    import torch

    apart = integers - task.zeros
    weighed = apart @ task.gram
    above, below = (weighed * task.target).sum(2), (weighed * apart).sum(2)
    found: torch.Tensor = torch.where((above > 0) & (below > 0), above / below, task.scales[:, :, 0])
    return found


PLUGIN: type[CompressionPass] = Gptq
