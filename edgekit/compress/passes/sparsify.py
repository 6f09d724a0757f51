"""Sparse weights: zeros in a pattern that hardware skips, or anywhere, and the training that makes up for them.

Layers keep their sizes. Who profits: ``2:4`` runs faster on NVIDIA GPUs since Ampere (Jetson Orin, not Nano), where
TensorRT builds with sparse weights; ``unstructured`` zeros make nothing faster, but the file packs smaller on its way
to the device (``packed_bytes``).
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress import graph
from edgekit.compress.passes._learning import LearningPass, recovery, train_split, trainable
from edgekit.compress.training import train
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model
    from edgekit.progress import Progress

Pattern = Literal["2:4", "unstructured"]
HALF = 0.5
"""What the pattern 2:4 zeroes."""


class Sparsify(LearningPass, frozen=True, kw_only=True):
    """Set the smallest weights to zero, then train the others for ``epochs``.

    ``2:4`` zeroes two of every four weights along the input channels (Mishra et al. 2021, section 3; transposed
    convolutions and layers whose input channels are no multiple of four stay dense), ``unstructured`` the share
    ``sparsity`` of each layer or, by ``scope``, of all (Han et al. 2015). Recovery learns the labels by ``1 - alpha``
    and the dense network by ``alpha``. Zeros survive ``quantize``; a pass that trains afterwards without masks would
    fill them, so this one comes last before it.
    """

    pattern: Pattern = "2:4"
    sparsity: Annotated[float, msgspec.Meta(gt=0, lt=1)] = HALF
    scope: Literal["global", "layer"] = "layer"
    alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 2.0

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the sparse, fine-tuned model; the step's ``sparsity:NAME`` tells the share of zeros of each layer.

        Raises:
            CompressionError: not a PyTorch network with modules, no train split, no layer that the pattern fits, or a
                sparsity that the pattern cannot have.
        """
        network = trainable(model, "sparsify")
        if self.pattern == "2:4" and self.sparsity != HALF:
            raise CompressionError(
                f"the pattern 2:4 zeroes half of the weights, sparsity is {self.sparsity}",
                'drop sparsity, or set pattern = "unstructured"',
            )
        if self.epochs:
            train_split(model, "sparsify", "recover on:give data with one, or set epochs = 0 to only set zeros")
        progress("sparsify: masks", 0, 1)
        module = copy.deepcopy(network.module)
        weights = dict(module.named_parameters())
        names = _names(model, with_transposed=self.pattern != "2:4")
        masks = self._masks({name: weights[name].detach() for name in names if name in weights})
        if not masks:
            raise CompressionError(
                f"{model.name} has no layer that {self.pattern} fits", 'set pattern = "unstructured", or drop the pass'
            )
        packed_before = _packed(module)
        with extra("compress"):
            import torch
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].mul_(mask)
        measured = _shares(masks) | {"packed_bytes_before": packed_before}
        smaller = replace(network, module=module)
        if self.epochs:
            lesson = recovery(model, self.alpha, self.temperature)
            lesson = replace(lesson, masks={name: mask.numpy() for name, mask in masks.items()})
            measured["train_loss"] = train(smaller, lesson, self.schedule(), progress)
        measured["packed_bytes"] = _packed(module)
        return replace(model, network=smaller, lineage=(*model.lineage, Step(name="sparsify", measured=measured)))

    def _masks(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.pattern == "2:4":
            return {name: _two_of_four(w) for name, w in weights.items() if w.dim() > 1 and not w.shape[1] % 4}
        if self.scope == "layer":
            return {name: w.abs() > _limit(w.abs().flatten(), self.sparsity) for name, w in weights.items()}
        with extra("compress"):
            import torch
        limit = _limit(torch.cat([w.abs().flatten() for w in weights.values()]), self.sparsity) if weights else 0
        return {name: w.abs() > limit for name, w in weights.items()}


def _two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of every four neighbours along the input channels."""
    import torch

    moved = weight.abs().movedim(1, -1)
    fours = moved.reshape(*moved.shape[:-1], -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2, -1).indices, value=True)
    return kept.reshape(moved.shape).movedim(-1, 1).contiguous()


def _limit(magnitudes: torch.Tensor, share: float) -> torch.Tensor:
    return magnitudes.kthvalue(max(1, min(len(magnitudes), round(share * len(magnitudes))))).values


def _names(model: Model, *, with_transposed: bool) -> list[str]:
    """Find the weights; axis 1 of a transposed convolution's are outputs, along which no hardware skips zeros."""
    traced = trace(model).module(check_guards=False)
    found = graph.weighted(traced.graph)
    return sorted({name for node, name in found if with_transposed or graph.operation(node) not in graph.TRANSPOSED})


def _shares(masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    found = {f"sparsity:{name}": zeros[name] / mask.numel() for name, mask in masks.items()}
    return found | {"sparsity": sum(zeros.values()) / sum(mask.numel() for mask in masks.values())}


def _packed(module: nn.Module) -> float:
    """Return the bytes of the weights after a common packer."""
    return float(sum(len(zlib.compress(t.detach().contiguous().numpy().tobytes())) for t in module.parameters()))


PLUGIN: type[CompressionPass] = Sparsify
