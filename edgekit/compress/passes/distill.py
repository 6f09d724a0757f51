"""Knowledge distillation: a large network teaches the model, by its scores, or by what its modules give."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit import workload
from edgekit.compress.losses import (
    TEMPERATURE,
    Decoupled,
    hint,
    is_language_model,
    is_scores,
    mimicry,
    refuse_idle,
    truth_of,
)
from edgekit.compress.passes._learning import LearningPass, train_split, trainable
from edgekit.compress.training import Lesson, train
from edgekit.errors import CompressionError, UsageError
from edgekit.manifest import Step

if TYPE_CHECKING:
    from edgekit.compress.losses import Loss
    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model, Network, Split
    from edgekit.progress import Progress


LOOKED_AT = 32
"""On how many samples a teacher has to answer with numbers before anybody learns from it."""


class Distill(LearningPass, frozen=True, kw_only=True):
    """Train the model on a teacher's answers, and by ``1 - alpha`` on the labels.

    ``teacher`` is anything that `workload.load` reads, relative to the working folder. ``method``: ``kd`` softened
    scores (Hinton et al. 2015), ``dkd`` target class and the others apart (Zhao et al. 2022; ``beta`` for the others),
    ``hints`` softened scores and features besides (Romero et al. 2015), the pairs in ``hints`` as ``student.module =
    teacher.module``. Language models learn the distribution of every token, and by ``1 - alpha`` the next token.

    Outputs that are not known to be scores of classes are learned by their squared error, and ``temperature`` means
    nothing to them: so it is for values and hidden states, for one class a position, and for a classifier whose data
    has neither labels nor the classes' names.
    """

    teacher: str
    teacher_checkpoint: str = ""
    method: Literal["kd", "dkd", "hints"] = "kd"
    temperature: Annotated[float, msgspec.Meta(gt=0)] = TEMPERATURE
    alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    beta: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    hints: tuple[str, ...] = ()
    hint_weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    epochs: Annotated[int, msgspec.Meta(ge=1)] = 20
    lr: Annotated[float, msgspec.Meta(gt=0)] = 5e-3

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the trained model.

        Raises:
            CompressionError: not a PyTorch network with modules, no train split, a teacher with other outputs or with
                NaN in them, hints that do not fit each other, labels, a method or a temperature that do not fit the
                outputs.
            UsageError: the teacher or a module of the hints cannot be found.
        """
        network = trainable(model, "distill")
        split = train_split(model, "distill", "learn from:give data with one")
        losses = self._losses(model, split)
        progress("distill: the teacher", 0, 1)
        lesson = Lesson(split, losses, self._teacher(model, split), model.data.validation if model.data else None)
        student = replace(network, module=copy.deepcopy(network.module))
        note = Step(name="distill", measured={"train_loss": train(student, lesson, self.schedule(), progress)})
        return replace(model, network=student, lineage=(*model.lineage, note))

    def _losses(self, model: Model, split: Split) -> tuple[Loss, ...]:
        truth = truth_of(model, split, 1 - self.alpha)
        if truth is None and self.alpha < 1:
            raise CompressionError(f"alpha {self.alpha} needs labels, the train split has none", "set alpha = 1")
        if self.hints and self.method != "hints":
            raise CompressionError(f"hints are given, the method is {self.method!r}", 'set method = "hints"')
        if self.method == "hints" and not self.hints:
            raise CompressionError("the method hints has no hints", 'give hints = ["student.module = teacher.module"]')
        taught = self._decoupled(model, split) if self.method == "dkd" else mimicry(model, self.alpha, self.temperature)
        refuse_idle(self.temperature, taught, model.name)
        own = () if truth is None else (truth,)
        return (*own, *taught, *(hint(pair, self.hint_weight) for pair in self.hints))

    def _decoupled(self, model: Model, split: Split) -> tuple[Loss, ...]:
        if is_language_model(model) or not is_scores(model, 0) or split.labels is None:
            raise CompressionError(
                f"dkd tells the label's class from the others: {model.name} has no classes with labels",
                'set method = "kd"',
            )
        first = Decoupled(self.alpha, self.temperature, 1.0, self.beta)
        return (first, *mimicry(model, self.alpha, self.temperature)[1:])

    def _teacher(self, model: Model, split: Split) -> Network:
        checkpoint = Path(self.teacher_checkpoint) if self.teacher_checkpoint else None
        try:
            teacher = workload.load(self.teacher, checkpoint, model.data)
        except UsageError as error:
            hint = error.hint.replace("--checkpoint", "teacher_checkpoint")
            raise UsageError(f"the teacher {self.teacher}: {error.message}", hint) from error
        theirs, mine = ([list(o.shape[1:]) for o in one.outputs] for one in (teacher, model))
        if theirs != mine:
            raise CompressionError(
                f"the teacher gives {_sizes(theirs)} scores, {model.name} {_sizes(mine)}",
                "choose a teacher with the same outputs, for the same classes",
            )
        _refuse_nonsense(teacher, split.head(LOOKED_AT))
        return teacher.network


def _refuse_nonsense(teacher: Model, samples: Split) -> None:
    import numpy as np

    for name, answers in teacher.network.run(samples.inputs).items():
        if np.isnan(answers).any():
            raise CompressionError(
                f"the teacher {teacher.name}: it gives NaN as {name} for samples of the train split",
                "take another checkpoint of it, and the preprocessing that it was trained with",
            )


def _sizes(outputs: list[list[int]]) -> str:
    return " and ".join(map(str, outputs))


PLUGIN: type[CompressionPass] = Distill
