"""One plain training loop, the same for every pass that learns. Knows neither passes nor recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import CompressionError
from edgekit.plugins import extra

if TYPE_CHECKING:
    import torch

    from edgekit.model import Split, TorchNetwork
    from edgekit.progress import Progress
    from edgekit.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to learn: AdamW, the rate rising for a tenth of the steps and falling as a cosine."""

    epochs: int
    lr: float
    batch: int
    seed: int


@dataclass(frozen=True)
class Lesson:
    """What is learned: the labels of ``split`` by ``1 - alpha``, a teacher's ``scores`` for it by ``alpha``.

    The loss is ``alpha T^2 KL(teacher/T || student/T) + (1 - alpha) CE(labels)`` (Hinton, Vinyals, Dean 2015,
    "Distilling the Knowledge in a Neural Network", section 2).
    """

    split: Split
    scores: Array | None = None
    alpha: float = 0.0
    temperature: float = 1.0


def train(network: TorchNetwork, lesson: Lesson, schedule: Schedule, progress: Progress) -> float:
    """Train the module of ``network`` in place and leave it in eval mode; return the last epoch's mean loss.

    The same seed gives the same weights on the same machine. Batches are drawn without replacement; a remainder
    shorter than a batch is left out of an epoch.

    Raises:
        CompressionError: the loss became NaN or infinite, or there are fewer samples than two.
    """
    with extra("compress"):
        import torch
    split = lesson.split
    size = min(schedule.batch, len(split))
    if size < 2:
        raise CompressionError(f"the train split has {len(split)} sample(s): nothing can be learned from it")
    steps = schedule.epochs * (len(split) // size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        loop = _Loop(network, lesson, schedule, steps)
        mean = 0.0
        for epoch in range(schedule.epochs):
            losses = []
            for chosen in torch.randperm(len(split))[: len(split) // size * size].reshape(-1, size):
                losses.append(loop.step(chosen))
                done = epoch * (len(split) // size) + len(losses)
                progress(f"train: loss {losses[-1]:.3f}", done, steps)
            mean = sum(losses) / len(losses)
    network.module.eval()
    return mean


class _Loop:
    """One optimizer at work on one network."""

    def __init__(self, network: TorchNetwork, lesson: Lesson, schedule: Schedule, steps: int) -> None:
        import torch

        self._module = network.module.train()
        split = lesson.split
        self._inputs = [torch.as_tensor(split.inputs[name]) for name in network.input_names]
        self._labels = None if split.labels is None else torch.as_tensor(split.labels).long()
        self._scores = None if lesson.scores is None else torch.as_tensor(lesson.scores)
        self._lesson = lesson
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=1e-4)
        self._rate = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda done: _rate(done, steps))

    def step(self, chosen: torch.Tensor) -> float:
        """Learn from one batch; return its loss."""
        result = self._module(*[tensor[chosen] for tensor in self._inputs])
        loss = self._loss(result[0] if isinstance(result, tuple | list) else result, chosen)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise CompressionError(f"training diverged: the loss became {value}", "lower lr in the recipe")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._optimizer.step()
        self._rate.step()
        return value

    def _loss(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        alpha, heat = self._lesson.alpha, self._lesson.temperature
        loss = scores.new_zeros(())
        if self._labels is not None and alpha < 1:
            loss = (1 - alpha) * functional.cross_entropy(scores, self._labels[chosen])
        if self._scores is not None and alpha > 0:
            student = functional.log_softmax(scores / heat, 1)
            teacher = functional.log_softmax(self._scores[chosen] / heat, 1)
            divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            loss = loss + alpha * heat**2 * divergence
        return loss


def _rate(done: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if done < warm:
        return (done + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))
