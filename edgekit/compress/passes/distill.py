"""Knowledge distillation: a large network's scores teach the model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit import workload
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.prune import trainable
from edgekit.compress.training import Lesson, Schedule, train
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import run_batched

if TYPE_CHECKING:
    from edgekit.model import Model, Split
    from edgekit.progress import Progress
    from edgekit.tensors import Array


class Distill(CompressionPass, frozen=True):
    """Train the model on a teacher's softened scores, and by ``1 - alpha`` on the labels (Hinton et al. 2015).

    ``teacher`` is anything that `workload.load` reads, relative to the working folder; its scores are computed once.
    """

    teacher: str
    teacher_checkpoint: str = ""
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    epochs: Annotated[int, msgspec.Meta(ge=1)] = 20
    lr: Annotated[float, msgspec.Meta(gt=0)] = 5e-3
    batch: Annotated[int, msgspec.Meta(ge=2)] = 32
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the trained model.

        Raises:
            CompressionError: not a PyTorch network with modules, no train split, a teacher with other outputs.
            UsageError: the teacher cannot be loaded.
        """
        network = trainable(model, "distill")
        split = model.data.train if model.data else None
        if split is None:
            raise CompressionError("distill has no train split to learn from", "give data with one")
        if split.labels is None and self.alpha < 1:
            raise CompressionError(f"alpha {self.alpha} needs labels, the train split has none", "set alpha = 1")
        progress("distill: the teacher's scores", 0, 1)
        lesson = Lesson(split, self._teach(model, split), self.alpha, self.temperature)
        student = replace(network, module=copy.deepcopy(network.module))
        schedule = Schedule(epochs=self.epochs, lr=self.lr, batch=self.batch, seed=self.seed)
        loss = train(student, lesson, schedule, progress)
        note = Step(name="distill", measured={"train_loss": loss})
        return replace(model, network=student, lineage=(*model.lineage, note))

    def _teach(self, model: Model, split: Split) -> Array:
        checkpoint = Path(self.teacher_checkpoint) if self.teacher_checkpoint else None
        teacher = workload.load(self.teacher, checkpoint, model.data)
        scores: Array = next(iter(run_batched(teacher.network, split, 64).values()))
        if scores.shape[1:] != model.outputs[0].shape[1:] or scores.ndim != 2:
            raise CompressionError(
                f"the teacher gives {list(scores.shape[1:])} scores, {model.name} {list(model.outputs[0].shape[1:])}",
                "choose a teacher for the same classes",
            )
        return scores


PLUGIN: type[CompressionPass] = Distill
