"""Rounds the inputs of a weight one by one, each error spread over those that are still to come.

The solver of GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", section 3), and what it makes of one layer that stands alone. Knows no network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit import grid
from edgekit.compress.gram import Aim, Problem, problem, shifted_offsets
from edgekit.compress.layer import Change
from edgekit.compress.rows import fits, some_rows
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.plan import WeightRule

BLOCK = 64
"""Inputs that are rounded before what they lost is spread over all later ones (section 3.3)."""

ROWS = 8192
DAMPING = 0.2
"""How `alone` learns what a layer takes: enough to rank layers by; the pass itself has options."""


def alone(layer: Layer, rule: WeightRule, inputs: Sequence[torch.Tensor]) -> Change:
    """Return what the solver makes of one layer whose inputs are those of the float network; ``rule`` is canonical."""
    if not fits(layer):
        return Change(values=grid.rounded(layer.values, rule))
    rows = some_rows(layer, inputs, inputs, ROWS, seed=0)
    task = problem(layer, rule, rows, Aim(damping=DAMPING, is_asymmetric=False, is_centred=layer.offsets is not None))
    values = task.as_weight(task.values(compensated(task, by_activations=True)))
    return Change(values, shifted_offsets(layer, rows, values))


def compensated(task: Problem, *, by_activations: bool) -> torch.Tensor:
    """Return the integers of GPTQ, [groups, outputs / groups, inputs]."""
    with extra("compress"):
        import torch
    groups, outputs, inputs = task.weight.shape
    order = torch.arange(inputs).expand(groups, inputs)
    if by_activations:
        order = task.gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    across = order[:, None, :].expand(groups, outputs, inputs)
    square = order[:, None, :].expand(groups, inputs, inputs)
    gram = task.gram.gather(1, square.mT).gather(2, square)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    sorted_ = replace(
        task,
        target=task.target.gather(2, across),
        scales=task.scales.gather(2, across),
        zeros=task.zeros.gather(2, across),
    )
    return torch.zeros_like(task.weight).scatter_(2, across, _in_order(sorted_, upper))


def _in_order(task: Problem, upper: torch.Tensor) -> torch.Tensor:
    """Round input after input; spread each error over the later ones of its block, and each block's over the rest."""
    import torch

    left = task.target.clone()
    found = torch.zeros_like(left)
    for start in range(0, left.shape[2], BLOCK):
        end = min(start + BLOCK, left.shape[2])
        errors = torch.zeros_like(left[:, :, start:end])
        for at in range(start, end):
            found[:, :, at] = task.integers(left[:, :, at], at)
            value = (found[:, :, at] - task.zeros[:, :, at]) * task.scales[:, :, at]
            error = (left[:, :, at] - value) / upper[:, None, at, at]
            left[:, :, at:end] -= error[:, :, None] * upper[:, None, at, at:end]
            errors[:, :, at - start] = error
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return found
