"""The options of every pass that trains: how long, how fast, on what pictures. Knows no pass and no loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress.losses import mimicry, truth_of
from edgekit.compress.passes import CompressionPass
from edgekit.compress.training import Lesson, Schedule
from edgekit.errors import CompressionError
from edgekit.model import TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from edgekit.model import Model, Split


class LearningPass(CompressionPass, frozen=True, kw_only=True):
    """A pass that trains; the options are those of `Schedule`."""

    epochs: Annotated[int, msgspec.Meta(ge=0)] = 10
    lr: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    batch: Annotated[int, msgspec.Meta(ge=2)] = 32
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 1e-4
    warmup: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    flip: bool = False
    shift: Annotated[int, msgspec.Meta(ge=0)] = 0
    keep: Literal["last", "best"] = "last"
    mixed_precision: Literal["auto", "off"] = "auto"

    def schedule(self, epochs: int | None = None) -> Schedule:
        """Return how to train, for ``epochs`` where they are not the pass's own."""
        own = {name: getattr(self, name) for name in Schedule.__dataclass_fields__}
        return Schedule(**(own if epochs is None else own | {"epochs": epochs}))


def trainable(model: Model, verb: str) -> TorchNetwork:
    """Return the network if its modules can be changed and trained.

    Raises:
        CompressionError: an ONNX file, a language model, a graph that edgekit saved, or a model with a plan.
    """
    with extra("compress"):
        import torch
    network = model.network
    if not isinstance(network, TorchNetwork) or isinstance(network.module, torch.fx.GraphModule):
        kind = "a saved graph" if isinstance(network, TorchNetwork) else f"a {type(network).__name__}"
        raise CompressionError(
            f"{verb} needs PyTorch modules, {model.name} is {kind}",
            "give file.py:build with --checkpoint, and put all passes into one recipe",
        )
    if model.plan is not None:
        raise CompressionError(
            f"{verb} must come before quantize: the plan fits the weights as they are now",
            "put the pass before quantize in the recipe",
        )
    return network


def train_split(model: Model, verb: str, way_out: str) -> Split:
    """Return the split to learn from.

    Raises:
        CompressionError: there is none.
    """
    if model.data is None or model.data.train is None:
        raise CompressionError(f"{verb} has no train split to {way_out.partition(':')[0]}", way_out.partition(":")[2])
    return model.data.train


def recovery(model: Model, alpha: float, temperature: float) -> Lesson:
    """Return how a changed copy learns to be the model again: labels by ``1 - alpha``, the model's scores by ``alpha``.

    Where there are no labels, the scores alone. For pruning, sparsity and quantization-aware training.

    Raises:
        CompressionError: there is no train split.
    """
    split = train_split(model, "recovery", "learn from:give data with one")
    truth = truth_of(model, split, 1 - alpha)
    share = alpha if truth else 1.0
    taught = mimicry(model, share, temperature) if share else ()
    losses = (*taught, *((truth,) if truth and truth.weight else ()))
    return Lesson(split, losses, model.network if taught else None, model.data.validation if model.data else None)
