"""One plain training loop, the same for every pass that learns. Knows neither passes nor recipes.

Under ``torchrun`` the same call trains on several processes: a batch is split among them, the leader reports and saves.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import zlib
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekit.compress.batches import Batches, seen_by, watched
from edgekit.compress.losses import Hint
from edgekit.compress.processes import Crew, crew
from edgekit.durable import write_file
from edgekit.errors import CompressionError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from edgekit.compress.losses import Loss, Seen
    from edgekit.model import Network, Split, TorchNetwork
    from edgekit.progress import Progress
    from edgekit.tensors import Array

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
"""Flags of x86 and features of ARM, as Linux names them, of processors that multiply bfloat16.

With ``avx512_bf16``, small convolutional networks trained 2.1 to 2.7 times as fast, a transformer 1.6 times.
"""

_CPUINFO = Path("/proc/cpuinfo")
_FOLDER: ContextVar[Path | None] = ContextVar("folder of training checkpoints", default=None)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to learn: the rate rises for ``warmup`` of the steps, then falls as a cosine.

    ``flip`` and ``shift`` (pixels) change the pictures of every batch at random. ``keep`` says whose weights stay: the
    last epoch's, or those of the epoch that was best on the validation split. ``mixed_precision = "auto"`` computes
    in bfloat16 where the machine has units for it.
    """

    epochs: int
    lr: float
    batch: int
    seed: int
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    warmup: float = 0.1
    flip: bool = False
    shift: int = 0
    keep: Literal["last", "best"] = "last"
    mixed_precision: Literal["auto", "off"] = "off"


@dataclass(frozen=True)
class Lesson:
    """What is learned: the sum of ``losses`` on ``split``, with a ``teacher`` where they ask for one.

    The teacher runs in the loop where pictures are augmented or hints need its features, else once. ``validation``
    chooses the best epoch. Weights named in ``masks`` stay zero where their mask is False.
    """

    split: Split
    losses: tuple[Loss, ...]
    teacher: Network | None = None
    validation: Split | None = None
    masks: Mapping[str, Array] = field(default_factory=dict)


@contextmanager
def resumable(folder: Path | None) -> Iterator[None]:
    """Let every `train` inside the block keep its state in ``folder`` after each epoch, and go on from it."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def train(network: TorchNetwork, lesson: Lesson, schedule: Schedule, progress: Progress) -> float:
    """Train the module of ``network`` in place and leave it in eval mode; return the last epoch's mean loss.

    The same seed gives the same weights on the same machine, also after a kill (see `resumable`). Batches are drawn
    without replacement; a remainder shorter than a batch is left out of an epoch.

    Raises:
        CompressionError: the loss became NaN or infinite, there are fewer samples than two, or the best epoch is asked
            for without a validation split.
    """
    with extra("compress"):
        import torch
    if min(schedule.batch, len(lesson.split)) < 2:
        raise CompressionError(
            f"the train split has {len(lesson.split)} sample(s), a batch {schedule.batch}: that teaches nothing",
            "give more samples, and batches of 2 or more",
        )
    if schedule.keep == "best" and lesson.validation is None:
        raise CompressionError('keep = "best" needs a validation split', 'give data with one, or set keep = "last"')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        loop = _Loop(network, lesson, schedule, crew())
        mean = loop.run(progress, _FOLDER.get())
        loop.finish()
    return mean


def has_bfloat16_units() -> bool:
    """Say whether this machine multiplies bfloat16 faster than float32."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if not _CPUINFO.exists():
        return False
    return not BFLOAT16_FLAGS.isdisjoint(_CPUINFO.read_text(encoding="utf-8", errors="replace").split())


class _Loop:
    """One optimizer at work on one network."""

    def __init__(self, network: TorchNetwork, lesson: Lesson, schedule: Schedule, us: Crew) -> None:
        import torch

        device = us.device()
        self._network, self._lesson, self._schedule, self._us = network, lesson, schedule, us
        network.module.to(device)
        if not _has_volumes(network.module):
            network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch takes it, its types do not
        self._batches = Batches(network, lesson, schedule, device)
        self._judges = _judges(network, lesson, schedule, device)
        self._bare = watched(network.module, [one.student for one in lesson.losses if isinstance(one, Hint)])
        self._bare.project(self._batches.projections(self._bare))
        self._bare.to(device).train()
        us.agree(self._bare)
        self._student = us.wrap(self._bare)
        self._optimizer = _optimizer(self._bare, schedule)
        self._size = min(schedule.batch, len(lesson.split)) // us.size * us.size
        self._steps = len(lesson.split) // max(1, self._size)
        self._best: tuple[float, dict[str, torch.Tensor]] | None = None
        self._masks = _masks(network.module, lesson.masks)
        self._half = schedule.mixed_precision == "auto" and has_bfloat16_units()

    def run(self, progress: Progress, folder: Path | None) -> float:
        """Learn all epochs that are left; return the mean loss of the last."""
        import torch

        path = folder / f"training-{self._fingerprint()}.pt" if folder else None
        start, mean = self._resume(path)
        for epoch in range(start, self._schedule.epochs):
            # fresh numbers for every epoch and process: a training that goes on draws what an unbroken one would
            torch.manual_seed(hash((self._schedule.seed, epoch)) % (1 << 62))
            order = torch.randperm(len(self._batches))[: self._steps * self._size].reshape(-1, self._size)
            torch.manual_seed(hash((self._schedule.seed, epoch, self._us.rank)) % (1 << 62))
            mean = self._epoch(epoch, order, progress)
            self._judge()
            if path is not None and self._us.leads:
                write_file(path, self._state(epoch + 1, mean))
        return mean

    def finish(self) -> None:
        """Leave the chosen weights in the module, on the CPU, in eval mode, the same on every process."""
        import torch

        self._us.agree(self._bare)
        if self._best is not None:
            self._network.module.load_state_dict(self._best[1])
        module = self._network.module.to("cpu").eval()
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as above

    def _epoch(self, epoch: int, order: torch.Tensor, progress: Progress) -> float:
        total, right = 0.0, 0.0
        for done, chosen in enumerate(order, 1):
            number = epoch * self._steps + done
            loss, accuracy = self._step(self._us.share(chosen), number - 1)
            total, right = total + loss, right + (accuracy or 0.0)
            if self._us.leads:
                metric = "" if accuracy is None else f" top1 {100 * right / done:.1f} %"
                progress(f"train: loss {loss:.3f}{metric}", number, self._schedule.epochs * self._steps)
        return total / max(1, len(order))

    def _step(self, chosen: torch.Tensor, number: int) -> tuple[float, float | None]:
        """Learn from one batch; return its loss, and the share of samples that were right."""
        import torch

        rate = _rate(number, self._schedule.epochs * self._steps, self._schedule.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.lr * rate
        inputs, known = self._batches.draw(chosen, augmented=True)
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self._half):
            seen = seen_by(self._student, inputs, known)
        loss = self._loss(seen)
        value = self._us.mean(float(loss.detach()))
        if not math.isfinite(value):
            raise CompressionError(
                f"training diverged: the loss became {value} at step {number + 1}", "lower lr in the recipe"
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._optimizer.step()
        with torch.no_grad():
            for weight, mask in self._masks:
                weight.mul_(mask)
        return value, _accuracy(seen)

    def _loss(self, seen: Seen) -> torch.Tensor:
        import torch

        terms = [loss.weight * loss(seen) for loss in self._lesson.losses if loss.weight]
        return torch.stack(terms).sum()

    def _judge(self) -> None:
        """Remember the weights where they are the best so far on the validation split."""
        if self._judges is None:
            return
        self._us.agree(self._bare)
        score = self._validate()
        self._bare.train()
        if self._best is None or score > self._best[0]:
            self._best = score, copy.deepcopy(self._network.module.state_dict())

    def _validate(self) -> float:
        """Return the accuracy on the validation split where samples have classes, else the negative loss."""
        import torch

        batches = self._judges or self._batches
        found = 0.0
        self._bare.eval()
        for chosen in torch.split(torch.arange(len(batches)), 64):
            with torch.no_grad():
                inputs, known = batches.draw(chosen, augmented=False)
                seen = seen_by(self._bare, inputs, known)
                accuracy = _accuracy(seen)
                found += len(chosen) * (-float(self._loss(seen)) if accuracy is None else accuracy)
        return found / len(batches)

    def _fingerprint(self) -> str:
        """Name this training by all that decides its result."""
        import torch

        found = hashlib.sha256(repr((self._schedule, self._lesson.losses, self._us.size)).encode())
        for tensor in self._bare.state_dict().values():
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        split = self._lesson.split
        for array in (*split.inputs.values(), *(() if split.labels is None else (split.labels,))):
            found.update(str((array.shape, zlib.crc32(array.tobytes()))).encode())
        return found.hexdigest()[:20]

    def _state(self, epochs: int, mean: float) -> bytes:
        import torch

        buffer = io.BytesIO()
        state: dict[str, Any] = {
            "epochs": epochs,
            "mean": mean,
            "student": self._bare.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "best": self._best,
        }
        torch.save(state, buffer)
        return buffer.getvalue()

    def _resume(self, path: Path | None) -> tuple[int, float]:
        import torch

        epochs, mean = 0, 0.0
        if path is not None and path.exists():
            state = torch.load(path, map_location=self._us.device(), weights_only=True)
            self._bare.load_state_dict(state["student"])
            self._optimizer.load_state_dict(state["optimizer"])
            epochs, mean, self._best = state["epochs"], state["mean"], state["best"]
        if self._us.mean(epochs) != epochs:
            raise CompressionError(
                f"the processes do not see the same checkpoints in {path.parent if path else None}",
                "put them on a disk that all machines share",
            )
        return epochs, mean


def _has_volumes(module: torch.nn.Module) -> bool:
    """Say whether any tensor has five axes, as a Conv3d's weight has: torch refuses channels_last for those."""
    return any(tensor.dim() == 5 for tensor in (*module.parameters(), *module.buffers()))


def _judges(network: TorchNetwork, lesson: Lesson, schedule: Schedule, device: torch.device) -> Batches | None:
    """Return the samples that choose the best epoch, where one is to be chosen."""
    if schedule.keep == "last" or lesson.validation is None:
        return None
    return Batches(network, replace(lesson, split=lesson.validation), replace(schedule, flip=False, shift=0), device)


def _optimizer(module: torch.nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Make the optimizer; biases and the scales of norms do not decay."""
    import torch

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=schedule.lr)


def _masks(module: torch.nn.Module, masks: Mapping[str, Array]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    weights = dict(module.named_parameters())
    return [(weights[name], torch.as_tensor(mask).to(weights[name])) for name, mask in masks.items()]


def _accuracy(seen: Seen) -> float | None:
    """Return the share of samples where the first output chose the label's class, or the teacher's; None for values."""
    scores = seen.outputs[0]
    if scores.dim() != 2 or scores.shape[1] < 2:
        return None
    if seen.targets is not None and seen.targets.dim() == 1 and not seen.targets.is_floating_point():
        return float((scores.argmax(1) == seen.targets).float().mean())
    if seen.teacher and seen.teacher[0].shape == scores.shape:
        return float((scores.argmax(1) == seen.teacher[0].argmax(1)).float().mean())
    return None


def _rate(done: int, steps: int, warmup: float) -> float:
    warm = max(1, int(steps * warmup))
    if done < warm:
        return (done + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))
