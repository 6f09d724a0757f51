"""Quantization-aware training: the network learns with its weights and activations rounded as the plan says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress.fake_quantization import FakeQuantized
from edgekit.compress.layers import with_parameters
from edgekit.compress.losses import TEMPERATURE, mimicry, refuse_idle, truth_of
from edgekit.compress.passes._learning import LearningPass, train_split
from edgekit.compress.training import Lesson, train
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import TorchNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.compress.losses import Loss
    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress
    from edgekit.tensors import Array

Choice = Literal["learned", "fixed"]


class Qat(LearningPass, frozen=True, kw_only=True):
    """Train the planned weights and their biases, rounded in every step; the gradient passes the rounding.

    ``alpha`` is the share of what the network's own float answers teach, scores of classes softened by ``temperature``,
    anything else as values; the rest are labels. ``scales`` of weights and ``ranges`` of activations may be learned
    besides (Esser et al. 2020, "Learned Step Size Quantization"). The weights come to lie on the plan's grid. Nagel et
    al. 2021, "A White Paper on Neural Network Quantization", section 4. Run it on the plan of quantize or
    mixed_precision.
    """

    alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    temperature: Annotated[float, msgspec.Meta(gt=0)] = TEMPERATURE
    scales: Choice = "learned"
    ranges: Choice = "fixed"
    mixed_precision: Literal["auto", "off"] = "off"

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the trained model with its plan's new scales and ranges.

        Raises:
            CompressionError: not a PyTorch network, no plan with integers, no train split, no labels where they are
                to teach, labels or a temperature that do not fit the outputs, or the training diverged.
        """
        network, plan = _planned(model)
        split = train_split(model, "qat", "learn from:give data with one")
        losses = self._losses(model, split)
        student = FakeQuantized(
            model, plan, learns_scales=self.scales == "learned", learns_ranges=self.ranges == "learned"
        )
        teacher = _Answers(network) if self.alpha else None
        lesson = Lesson(split, losses, teacher, model.data.validation if model.data else None)
        rounded = TorchNetwork(student.module, network.input_names, network.output_names)
        loss = train(rounded, lesson, self.schedule(), progress)
        learned = student.learned()
        note = Step(name="qat", measured={"train_loss": loss, "weights": len(learned.rules)})
        changed = msgspec.structs.replace(
            plan, weights={**plan.weights, **learned.rules}, activations=learned.activations
        )
        return replace(with_parameters(model, learned.changes), plan=changed, lineage=(*model.lineage, note))

    def _losses(self, model: Model, split: Split) -> tuple[Loss, ...]:
        truth = truth_of(model, split, 1 - self.alpha)
        if truth is None and self.alpha < 1:
            raise CompressionError(f"alpha {self.alpha} needs labels, the train split has none", "set alpha = 1")
        taught = mimicry(model, self.alpha, self.temperature) if self.alpha else ()
        if taught:
            refuse_idle(self.temperature, taught, model.name)
        return (*(() if truth is None else (truth,)), *taught)


@dataclass(frozen=True)
class _Answers:
    """The float network as a teacher that only answers: a graph that edgekit saved has no modes to switch."""

    network: TorchNetwork

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs for a batch."""
        return self.network.run(inputs)


def _planned(model: Model) -> tuple[TorchNetwork, QuantizationPlan]:
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(
            f"qat needs a PyTorch network, {model.name} is a {type(model.network).__name__}",
            "give file.py:build with --checkpoint",
        )
    if model.plan is None or not model.plan.weights:
        raise CompressionError(
            f"{model.name} has no plan with integer weights ({model.precision}): there is nothing to round while "
            "learning",
            "put quantize before qat in the recipe",
        )
    return model.network, model.plan


PLUGIN: type[CompressionPass] = Qat
