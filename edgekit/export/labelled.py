"""How often a model, and its file, names the label: top-1 on labelled validation samples. Knows no format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.manifest import Labelled
from edgekit.model import Model, Split, run_batched, whole_batches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.tensors import Array

SAMPLES = 128
"""As many validation samples at most are computed for it, chosen by a fixed seed: each file computes them once."""

LOSSES = {"fp32": 0.01, "f32": 0.01, "fp16": 0.02, "f16": 0.02, "bf16": 0.03}
INT8, FEWER = 0.05, 0.30
FLIPS = 2
"""So many samples may always change sides: of few samples one is more than a loss."""


@dataclass(frozen=True)
class Labels:
    """Labelled samples, the output whose best entry is the class, and the model's own share of right ones."""

    split: Split
    output: str
    top1: float


def labels_of(model: Model, output: str | None) -> Labels | None:
    """Choose labelled validation samples and compute the model's top-1 on them; ``None`` where there are none."""
    import numpy as np

    split = model.data.validation if model.data else None
    if split is None or split.labels is None or output is None or split.labels.ndim != 1:
        return None
    if split.labels.dtype.kind not in "iu":
        return None
    chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:SAMPLES])
    fixed = [spec.shape[0] for spec in model.inputs if spec.shape and spec.shape[0] > 0]
    if not len(chosen) or (fixed and len(chosen) < fixed[0]):
        return None
    samples, size = whole_batches(model, split.take(chosen))
    outputs = run_batched(model.network, samples, size)
    return Labels(samples, output, _share(outputs, samples, output))


def _share(outputs: Mapping[str, Array], split: Split, output: str) -> float:
    return round(float((outputs[output].argmax(-1) == split.labels).mean()), 4)


def most_loss(precision: str, samples: int) -> float:
    """Return how much of its top-1 a file of that precision may lose, as a share; fewer than 4 bits may lose all."""
    width = None if "mixed" in precision else re.search(r"\d", precision)
    bits = int(width[0]) if width else 4
    usual = LOSSES.get(precision, INT8 if bits == 8 else FEWER if bits >= 4 else 1.0)
    return min(1.0, round(max(usual, FLIPS / samples), 4))


def measured(labels: Labels, outputs: Mapping[str, Array], precision: str) -> Labelled:
    """Return a file's top-1 beside the model's, and what it may lose."""
    count = len(labels.split)
    share = _share(outputs, labels.split, labels.output)
    return Labelled(metric="top1", samples=count, model=labels.top1, file=share, max_loss=most_loss(precision, count))
