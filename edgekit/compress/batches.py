"""One batch of a lesson: samples, augmented, on the right device, and what the teacher says of them.

Knows no optimizer and no loss.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekit.compress.losses import Hint, Seen
from edgekit.errors import CompressionError, UnknownName
from edgekit.model import TorchNetwork, run_batched
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgekit.compress.training import Lesson, Schedule

    Features = dict[str, torch.Tensor]
    Watched = Any  # a torch.nn.Module whose class can only be written where torch is imported

MOST_SCORES = 1 << 28
"""Bytes of a teacher's scores that are kept; a language model's are larger, and computed batch by batch."""


class Batches:
    """The samples of a lesson, ready for a network on ``device``."""

    def __init__(self, network: TorchNetwork, lesson: Lesson, schedule: Schedule, device: torch.device) -> None:
        with extra("compress"):
            import torch
        split = lesson.split
        self._names, self._device, self._schedule = network.input_names, device, schedule
        self._inputs = [torch.as_tensor(split.inputs[name]) for name in network.input_names]
        self._labels = None if split.labels is None else torch.as_tensor(split.labels)
        self._teacher = lesson.teacher
        self._hints = [loss for loss in lesson.losses if isinstance(loss, Hint)]
        self._watched = _watched_teacher(lesson, [one.teacher for one in self._hints], device)
        self._scores = self._precomputed(lesson)

    def __len__(self) -> int:
        return len(self._inputs[0])

    def draw(self, chosen: torch.Tensor, *, augmented: bool) -> tuple[list[torch.Tensor], Seen]:
        """Return the inputs of the chosen samples, and what is known of them before the student answers."""
        inputs = [tensor[chosen] for tensor in self._inputs]
        if augmented and (self._schedule.flip or self._schedule.shift):
            inputs = _augmented(inputs, self._schedule)
        inputs = [_placed(tensor, self._device) for tensor in inputs]
        told, features = self._taught(inputs, chosen)
        named = dict(zip(self._names, inputs, strict=True))
        targets = named.get("input_ids")  # a language model learns the next of its own tokens
        if self._labels is not None:
            targets = self._labels[chosen].to(self._device)
        mask = named.get("attention_mask")
        return inputs, Seen(outputs=(), targets=targets, mask=mask, teacher=told, teacher_features=features)

    def projections(self, student: Watched) -> dict[str, torch.nn.Module]:
        """Make the projections that the hints need, from two samples."""
        import torch

        if not self._hints:
            return {}
        inputs, seen = self.draw(torch.arange(min(2, len(self))), augmented=False)
        student.eval()
        with torch.no_grad():
            _, features = student(*inputs)
        return {
            one.student: one.projection(features[one.student], seen.teacher_features[one.teacher])
            for one in self._hints
        }

    def _precomputed(self, lesson: Lesson) -> tuple[torch.Tensor, ...] | None:
        import torch

        changing = self._schedule.flip or self._schedule.shift
        if self._teacher is None or self._hints or changing:
            return None
        one = run_batched(self._teacher, lesson.split.head(1))
        if sum(array.nbytes for array in one.values()) * len(lesson.split) > MOST_SCORES:
            return None
        return tuple(torch.as_tensor(array) for array in run_batched(self._teacher, lesson.split, 64).values())

    def _taught(
        self, inputs: list[torch.Tensor], chosen: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], Mapping[str, torch.Tensor]]:
        import torch

        if self._teacher is None:
            return (), {}
        if self._scores is not None:
            return tuple(scores[chosen].to(self._device) for scores in self._scores), {}
        if self._watched is not None:
            with torch.no_grad():
                outputs, features = self._watched(*inputs)
            return outputs, features
        arrays = self._teacher.run({n: t.cpu().numpy() for n, t in zip(self._names, inputs, strict=True)})
        return tuple(torch.as_tensor(array).to(self._device) for array in arrays.values()), {}


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move to the device; pictures with their channels last, by which a CPU trains a fifth faster."""
    import torch

    if tensor.dim() == 4:
        return tensor.to(device, memory_format=torch.channels_last)
    return tensor.to(device)


def seen_by(student: torch.nn.Module, inputs: list[torch.Tensor], seen: Seen) -> Seen:
    """Let the student answer."""
    outputs, features = student(*inputs)
    return replace(seen, outputs=outputs, features=features)


def watched(module: torch.nn.Module, names: list[str]) -> Watched:
    """Wrap a module so that it gives all outputs as a tuple, and what the modules ``names`` gave.

    Raises:
        UnknownName: the module has no such part.
    """
    from torch import nn

    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            raise UnknownName("module of the hints", name, [n for n in known if n])

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            self.projections = nn.ModuleList()
            self.projected: list[str] = []

        def forward(self, *inputs: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Features]:
            features: Features = {}
            hooks = [known[name].register_forward_hook(_keep(features, name)) for name in names]
            try:
                result = self.inner(*inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            for name, projection in zip(self.projected, self.projections, strict=True):
                features[name] = projection(features[name])
            outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
            return tuple(o.float() if o.is_floating_point() else o for o in outputs), features

        def project(self, projections: Mapping[str, torch.nn.Module]) -> None:
            self.projected = list(projections)
            self.projections = nn.ModuleList(projections.values())

    return Watching()


def _keep(features: Features, name: str) -> Any:  # noqa: ANN401  # torch's hooks have no nameable type
    def hook(_module: torch.nn.Module, _inputs: object, result: Any) -> None:  # noqa: ANN401  # whatever a module gives
        features[name] = result[0] if isinstance(result, tuple | list) else result

    return hook


def _watched_teacher(lesson: Lesson, names: list[str], device: torch.device) -> Watched | None:
    if not isinstance(lesson.teacher, TorchNetwork):
        if names:
            raise CompressionError("hints need a teacher of PyTorch modules", "give the teacher's file.py:build")
        return None
    module = lesson.teacher.module
    module = module if device.type == "cpu" else copy.deepcopy(module).to(device)
    return watched(module.eval(), names).eval()


def _augmented(inputs: list[torch.Tensor], schedule: Schedule) -> list[torch.Tensor]:
    """Flip each picture at random, and shift it by up to ``shift`` pixels over zeros, all of a sample alike."""
    import torch

    count = len(inputs[0])
    is_flipped = torch.rand(count) < (0.5 if schedule.flip else 0.0)
    moves = torch.randint(0, 2 * schedule.shift + 1, (2, count))
    return [
        _moved(torch.where(is_flipped[:, None, None, None], t.flip(-1), t), moves, schedule.shift)
        if t.dim() == 4 and t.is_floating_point()
        else t
        for t in inputs
    ]


def _moved(pictures: torch.Tensor, moves: torch.Tensor, most: int) -> torch.Tensor:
    import torch

    if not most:
        return pictures
    count, channels, height, width = pictures.shape
    padded = torch.nn.functional.pad(pictures, (most, most, most, most))
    rows = (moves[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (moves[1][:, None] + torch.arange(width))[:, None, None, :]
    every = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[(*every, rows, columns)]
