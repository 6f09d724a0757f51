"""What a network can learn from: losses as values, for distillation, recovery and quantization-aware training alike.

Knows tensors and one batch at a time. Knows no loop, no pass, no recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from edgekit import hugging_face
from edgekit.datasets import IGNORED, class_axis
from edgekit.errors import CompressionError
from edgekit.model import TorchNetwork
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from edgekit.model import Model, Split

Kind = Literal["classes", "values", "tokens"]

TEMPERATURE = 2.0
"""What softens scores where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One batch as the losses see it: what the student gave, the truth, what the teacher gave, features by module."""

    outputs: tuple[torch.Tensor, ...]
    targets: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    teacher: tuple[torch.Tensor, ...] = ()
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """One term of what is minimized."""

    @property
    def weight(self) -> float:
        """Its factor in the sum."""
        ...

    def __call__(self, seen: Seen) -> torch.Tensor:
        """Return one number."""
        ...


@dataclass(frozen=True)
class Labels:
    """The truth: cross entropy for classes, the squared error for values, the next token for language models.

    Classes are one a sample or one a position; padding and positions labelled `IGNORED` do not count.
    """

    weight: float = 1.0
    kind: Kind = "classes"
    output: int = 0

    def __call__(self, seen: Seen) -> torch.Tensor:
        """Compare one output with the labels."""
        from torch.nn import functional

        scores, targets = seen.outputs[self.output], _truth(seen)
        if self.kind == "values":
            return functional.mse_loss(scores.reshape(targets.shape), targets.to(scores.dtype))
        if self.kind == "tokens":
            return _entropy(scores[:, :-1], targets[:, 1:], None if seen.mask is None else seen.mask[:, 1:])
        return _entropy(scores, targets, seen.mask)


@dataclass(frozen=True)
class Softened:
    """``T^2 KL(teacher/T || student/T)`` over the last axis (Hinton, Vinyals, Dean 2015, section 2).

    Per sample for scores [samples, classes], per token for [samples, tokens, vocabulary]; masked tokens do not count.
    """

    weight: float = 1.0
    temperature: float = 1.0
    output: int = 0

    def __call__(self, seen: Seen) -> torch.Tensor:
        """Compare one output with the teacher's."""
        from torch.nn import functional

        told, wanted = (
            functional.log_softmax(side[self.output].float() / self.temperature, -1)
            for side in (seen.outputs, seen.teacher)
        )
        each = functional.kl_div(told, wanted, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * _mean(each, seen.mask)


@dataclass(frozen=True)
class Decoupled:
    """Decoupled distillation: ``alpha`` for the target class, ``beta`` for the rest (Zhao et al. 2022, equation 7)."""

    weight: float = 1.0
    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    output: int = 0

    def __call__(self, seen: Seen) -> torch.Tensor:
        """Compare one output [samples, classes] with the teacher's; needs labels."""
        import torch
        from torch.nn import functional

        targets = _truth(seen).long()
        sides = [side[self.output].float() / self.temperature for side in (seen.outputs, seen.teacher)]
        is_target = functional.one_hot(targets, sides[0].shape[1]).bool()
        binary = []
        rest = []
        for scores in sides:
            total = torch.logsumexp(scores, 1)
            # the log of 1 - p(target), from the other scores: no cancellation where the target takes it all
            others = torch.logsumexp(scores.masked_fill(is_target, -torch.inf), 1)
            binary.append(torch.stack((scores[is_target] - total, others - total), 1))
            rest.append(functional.log_softmax(scores[~is_target].reshape(len(scores), -1), 1))
        target_class, other_classes = (
            functional.kl_div(mine, theirs, reduction="batchmean", log_target=True) for mine, theirs in (binary, rest)
        )
        return self.temperature**2 * (self.alpha * target_class + self.beta * other_classes)


@dataclass(frozen=True)
class Matched:
    """The squared error to the teacher's output, for values instead of scores; masked tokens do not count."""

    weight: float = 1.0
    output: int = 0

    def __call__(self, seen: Seen) -> torch.Tensor:
        """Compare one output with the teacher's."""
        error = (seen.outputs[self.output].float() - seen.teacher[self.output].float()).square()
        return _mean(error.mean(-1), seen.mask) if error.dim() == 3 else error.mean()


@dataclass(frozen=True)
class Hint:
    """The squared error between what two modules give, through a learned 1x1 projection where widths differ.

    FitNets: Romero et al. 2015, equation 3. The loop learns the projection beside the student.
    """

    student: str
    teacher: str
    weight: float = 1.0

    def __call__(self, seen: Seen) -> torch.Tensor:
        """Compare the student's feature, projected already, with the teacher's."""
        from torch.nn import functional

        return functional.mse_loss(seen.features[self.student].float(), seen.teacher_features[self.teacher].float())

    def projection(self, mine: torch.Tensor, theirs: torch.Tensor) -> torch.nn.Module:
        """Return what maps the student's feature to the teacher's width: nothing where they are equal.

        Raises:
            CompressionError: the two features differ in more than their width.
        """
        from torch import nn

        differ = [axis for axis, pair in enumerate(zip(mine.shape, theirs.shape, strict=False)) if pair[0] != pair[1]]
        if mine.dim() != theirs.dim() or len(differ) > 1 or (differ and differ[0] not in (1, mine.dim() - 1)):
            raise CompressionError(
                f"the hint {self.student} = {self.teacher} joins {list(mine.shape[1:])} with {list(theirs.shape[1:])}",
                "choose two modules whose outputs differ only in their width",
            )
        return _projection(differ[0], mine.shape[differ[0]], theirs.shape[differ[0]]) if differ else nn.Identity()


def _projection(axis: int, narrow: int, wide: int) -> torch.nn.Module:
    import torch
    from torch import nn

    class Projection(nn.Linear):
        def forward(self, feature: torch.Tensor) -> torch.Tensor:  # the base class calls its parameter input
            return super().forward(feature.movedim(axis, -1)).movedim(-1, axis)

    with torch.no_grad():
        return Projection(narrow, wide, bias=False)


def hint(pair: str, weight: float) -> Hint:
    """Read ``student.module = teacher.module``.

    Raises:
        CompressionError: no such pair.
    """
    student, sign, teacher = (part.strip() for part in pair.partition("="))
    if not (student and sign and teacher):
        raise CompressionError(f"{pair!r} is no pair of modules", 'write hints = ["student.module = teacher.module"]')
    return Hint(student, teacher, weight)


def truth_of(model: Model, split: Split, weight: float = 1.0) -> Labels | None:
    """Return what the labels of a split teach: classes, values or next tokens; None where there is nothing.

    Raises:
        CompressionError: the labels count by ``weight``, and the first output has no scores for them.
    """
    speaks, labels = is_language_model(model), split.labels
    if labels is None:
        return Labels(weight, "tokens") if speaks else None
    if not speaks and labels.dtype.kind not in "iub":
        return Labels(weight, "values")
    if model.outputs and class_axis(labels.shape, model.outputs[0].shape) is None:
        if weight:
            raise _unfit(labels.shape, model.outputs[0].shape)
        return None
    return Labels(weight, "tokens" if speaks else "classes")


def mimicry(model: Model, weight: float, temperature: float) -> tuple[Loss, ...]:
    """Return what a teacher with the same outputs teaches: its softened scores, or its values, output by output."""
    share = weight / max(1, len(model.outputs))
    scored = (is_scores(model, position) for position in range(len(model.outputs)))
    return tuple(
        Softened(share, temperature, position) if scores else Matched(share, position)
        for position, scores in enumerate(scored)
    )


def refuse_idle(temperature: float, taught: Iterable[Loss], name: str) -> None:
    """Raise CompressionError where somebody set a temperature, and nothing that a teacher teaches is softened by it."""
    if temperature != TEMPERATURE and not any(isinstance(one, Softened | Decoupled) for one in taught):
        raise CompressionError(
            f"temperature {temperature:g} softens scores, {name} is not known to give any: its outputs are learned as "
            "values",
            "leave temperature out; a classifier is one by its labels or its classes' names, Data(…, labels=(…)), "
            'a language model of your own by the name of its output, Data(…, outputs=("logits",))',
        )


def is_scores(model: Model, output: int) -> bool:
    """Say whether an output holds one score a class, or one a word of the vocabulary, along its last axis."""
    shape = model.outputs[output].shape
    if is_language_model(model):
        return output == 0
    return len(shape) == 2 and shape[1] != 1 and model.task == "classification"


def is_language_model(model: Model) -> bool:
    """Say whether the model scores the next word for each token: by this it is both taught and judged.

    What comes from a Hugging Face folder is what its architecture says. Anything else takes ``input_ids`` [samples,
    tokens], and its first output is ``logits`` [samples, tokens, vocabulary] with a score for every token of the data:
    hidden states and tags of words have such axes too.
    """
    if model.task == "text-generation":
        return True
    folder = model.network.folder if isinstance(model.network, TorchNetwork) else None
    if folder is not None and hugging_face.is_folder(folder):
        return hugging_face.is_causal(folder)
    taken = {spec.name: spec for spec in model.inputs}.get("input_ids")
    if taken is None or "int" not in taken.dtype or not model.outputs or model.outputs[0].name != "logits":
        return False
    given = model.outputs[0].shape
    if len(given) != 3 or given[:2] != taken.shape:
        return False
    return given[2] == DYNAMIC or given[2] > _highest_token(model)


def _highest_token(model: Model) -> int:
    splits = model.data.splits().values() if model.data else ()
    tokens = [split.inputs["input_ids"] for split in splits if "input_ids" in split.inputs and len(split)]
    return max((int(array.max()) for array in tokens), default=0)


def _unfit(labels: Iterable[int], scores: Iterable[int]) -> CompressionError:
    return CompressionError(
        f"labels {list(labels)} say no class that the first output {list(scores)} scores",
        "leave them out of the train split, or learn from answers alone: alpha = 1",
    )


def _entropy(scores: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean cross entropy over all that counts."""
    from torch.nn import functional

    axis = class_axis(tuple(targets.shape), tuple(scores.shape))
    if axis is None:
        raise _unfit(targets.shape, scores.shape)
    targets = targets.long()
    each = functional.cross_entropy(scores.movedim(axis, 1), targets, reduction="none", ignore_index=IGNORED)
    counted = targets != IGNORED
    return _mean(each, counted if mask is None or mask.shape != each.shape else counted & (mask != 0))


def _truth(seen: Seen) -> torch.Tensor:
    if seen.targets is None:
        raise CompressionError("the train split has no labels to learn", "add labels, or learn from a teacher alone")
    return seen.targets


def _mean(each: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None or mask.shape != each.shape:
        return each.mean()
    counted = mask.to(each.dtype)
    return (each * counted).sum() / counted.sum().clamp_min(1)
