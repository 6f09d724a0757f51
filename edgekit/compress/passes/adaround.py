"""AdaRound: learns for each weight whether it is rounded up or down, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit import grid
from edgekit.compress.clamps import FREE, clamps
from edgekit.compress.gram import Aim, problem, shifted_offsets
from edgekit.compress.passes import CompressionPass
from edgekit.compress.refining import Choice, calibration, planned, refine
from edgekit.compress.rows import some_rows
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgekit.compress.clamps import Bounds
    from edgekit.compress.gram import Problem
    from edgekit.compress.layer import Layer
    from edgekit.compress.rows import Rows
    from edgekit.model import Model
    from edgekit.plan import WeightRule
    from edgekit.progress import Progress

LOWEST, HIGHEST = -0.1, 1.1
"""The ends to which the sigmoid is stretched before it is cut to 0..1 (equation 23)."""

STEEPEST, FLATTEST = 20.0, 2.0
"""The exponent of the regularizer at first and at last."""

WARM_UP = 0.2
"""The share of the iterations that know no regularizer."""

CHECKED = 50
"""Iterations between two looks whether every weight has decided."""

DECIDED = 1e-3


class Adaround(CompressionPass, frozen=True):
    """Learn which weights are rounded up and which down, so that each layer's output comes near the float one.

    A rectified sigmoid stands for the share of the way up; a regularizer that steepens drives it to 0 or 1. The layer
    takes the inputs of the planned network and aims at the output of the float one, behind the ReLU or clamp that an
    engine fuses into it (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
    equations 21 to 25). Each of ``iterations`` draws ``batch`` of ``rows`` input rows; a layer whose weights have all
    decided stops, and one where nothing better is learned is rounded to nearest. The error counts as a share of
    nearest rounding's, ``regularization`` weighs a weight's mean indecision against it: weak, and weights that never
    decided are rounded after all. ``bias`` restores the mean of each output.
    """

    iterations: Annotated[int, msgspec.Meta(ge=1)] = 500
    batch: Annotated[int, msgspec.Meta(ge=1)] = 512
    lr: Annotated[float, msgspec.Meta(gt=0)] = 0.05
    regularization: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    bias: bool = True
    rows: Annotated[int, msgspec.Meta(ge=64)] = 8192
    samples: Annotated[int, msgspec.Meta(ge=1)] = 512
    seed: int = 0

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the model with weights on the grid of its plan.

        Raises:
            CompressionError: no plan, no calibration data, or a network that cannot be walked through.
        """
        planned(model, "adaround")
        bounds = clamps(model)

        def choose(
            layer: Layer, rule: WeightRule, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]
        ) -> Choice:
            rows = some_rows(layer, floats, planned, self.rows, seed=self.seed)
            return self._choose(layer, rule, rows, bounds.get(layer.node, FREE))

        return refine(model, calibration(model, self.samples), choose, progress, name="adaround")

    def _choose(self, layer: Layer, rule: WeightRule, rows: Rows, bounds: Bounds) -> Choice:
        shifts = self.bias and layer.offsets is not None
        task = problem(layer, rule, rows, Aim(damping=0.01, is_asymmetric=True, is_centred=shifts))
        integers = self._learn(task, _Outputs.of(layer, rows, bounds, is_centred=shifts))
        values = task.as_weight(task.values(integers))
        return Choice(
            rule,
            values,
            shifted_offsets(layer, rows, values) if shifts else None,
            task.share(task.values(integers)),
            task.share(task.values(task.integers(task.weight))),
        )

    def _learn(self, task: Problem, outputs: _Outputs) -> torch.Tensor:
        """Return the integers, [groups, outputs / groups, inputs]."""
        with extra("compress"):
            import torch
        soft, started = _Soft.of(task), task.integers(task.weight)
        nearest = outputs.error(task.values(started).float())
        if nearest == 0:
            return started
        optimizer = torch.optim.Adam([soft.shares], self.lr)
        random = torch.Generator().manual_seed(self.seed)
        warm = int(WARM_UP * self.iterations)
        for done in range(self.iterations):
            drawn = torch.randint(outputs.planned.shape[1], (self.batch,), generator=random)
            up, slope = soft.up()
            gradient = soft.through(outputs.slopes(soft.values(up), drawn)) / nearest
            if done >= warm:
                late = (done - warm) / (self.iterations - warm)
                gradient += self.regularization * _pull(up, FLATTEST + (STEEPEST - FLATTEST) * (1 - late))
            soft.shares.grad = gradient * slope
            optimizer.step()
            if done % CHECKED == 0 and bool(((up < DECIDED) | (up > 1 - DECIDED)).all()):
                break
        found = soft.integers()
        return min((started, found), key=lambda integers: outputs.error(task.values(integers).float()))


def _pull(up: torch.Tensor, exponent: float) -> torch.Tensor:
    """Return the slope of the mean of ``1 - |2 up - 1|^exponent`` (equation 24)."""
    apart = 2 * up - 1
    return -2 * exponent * apart.abs() ** (exponent - 1) * apart.sign() / up.numel()


@dataclass(frozen=True)
class _Soft:
    """The weights between rounded down and up: float32 [groups, outputs / groups, inputs] each."""

    shares: torch.Tensor
    lower: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    lowest: int
    highest: int

    @staticmethod
    def of(task: Problem) -> _Soft:
        """Start at the float weight."""
        import torch

        lowest, highest = grid.limits(task.rule)
        exact = task.weight / task.scales
        lower = exact.floor()
        wanted = (((exact - lower) - LOWEST) / (HIGHEST - LOWEST)).float()
        shares = torch.nn.Parameter(torch.log(wanted / (1 - wanted)))
        with_zeros = (lower + task.zeros).float()
        return _Soft(shares, with_zeros, task.scales.float(), task.zeros.float(), lowest, highest)

    def up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the share of the way up, 0 to 1, and its slope."""
        sigmoid = self.shares.detach().sigmoid()
        stretched = sigmoid * (HIGHEST - LOWEST) + LOWEST
        moves = (stretched > 0) & (stretched < 1)
        return stretched.clamp(0, 1), (HIGHEST - LOWEST) * sigmoid * (1 - sigmoid) * moves

    def values(self, up: torch.Tensor) -> torch.Tensor:
        """Return the weights that a share of the way up stands for."""
        return ((self.lower + up).clamp(self.lowest, self.highest) - self.zeros) * self.scales

    def through(self, slopes: torch.Tensor) -> torch.Tensor:
        """Return the slope of the share, from that of the weight; none where both ways are the same integer."""
        differs = (self.lower >= self.lowest) & (self.lower < self.highest)
        return slopes * self.scales * differs

    def integers(self) -> torch.Tensor:
        """Decide."""
        up, _ = self.up()
        return (self.lower + (up >= 0.5)).clamp(self.lowest, self.highest).double()


@dataclass(frozen=True)
class _Outputs:
    """What a layer takes as planned, [groups, rows, inputs], and what it should give, [groups, rows, outputs]."""

    planned: torch.Tensor
    wanted: torch.Tensor
    offsets: torch.Tensor
    bounds: Bounds

    @staticmethod
    def of(layer: Layer, rows: Rows, bounds: Bounds, *, is_centred: bool) -> _Outputs:
        """Compute the float outputs; centred, the bias follows the weights so that the mean output stays."""
        import torch

        weight = torch.from_numpy(layer.values).reshape(layer.groups, layer.values.shape[0] // layer.groups, -1)
        wanted = rows.floats @ weight.mT
        offsets, inputs = torch.zeros_like(wanted[:, :1]), rows.planned
        if layer.offsets is not None:
            offsets = torch.from_numpy(layer.offsets).float().reshape(layer.groups, 1, -1)
            wanted = wanted + offsets
        if is_centred:
            inputs, offsets = inputs - inputs.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
        return _Outputs(inputs, wanted.clamp(*bounds), offsets, bounds)

    def error(self, values: torch.Tensor) -> float:
        """Return the squared error of the outputs, mean over rows, summed over channels."""
        made = (self.planned @ values.mT + self.offsets).clamp(*self.bounds)
        return float((made - self.wanted).square().sum()) / made.shape[1]

    def slopes(self, values: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return how that error, estimated from some rows, grows with each weight."""
        inputs = self.planned[:, drawn]
        made = inputs @ values.mT + self.offsets
        inside = (made > self.bounds[0]) & (made < self.bounds[1])
        apart = (made.clamp(*self.bounds) - self.wanted[:, drawn]) * inside
        return apart.mT @ inputs * (2 / len(drawn))


PLUGIN: type[CompressionPass] = Adaround
