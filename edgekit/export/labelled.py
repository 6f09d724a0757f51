"""How good a model, and its file, is on labelled samples: top-1 of classes, R2 of targets. Knows no format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgekit.datasets import IGNORED, class_axis
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
    """Labelled samples, the output that they judge, and the model's own figure.

    ``metric``: ``top1``, the share of samples, or of positions that count, whose best class is their label; ``r2``, how
    much of the targets' variance the output explains.
    """

    split: Split
    output: str
    metric: Literal["top1", "r2"]
    value: float


def labels_of(model: Model, output: str | None) -> Labels | None:
    """Choose labelled validation samples and compute the model's figure on them; ``None`` where there are none.

    ``output`` holds a classifier's scores; the first one is judged where there is none.
    """
    import numpy as np

    split = model.data.validation if model.data else None
    if split is None or split.labels is None or not model.outputs:
        return None
    chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:SAMPLES])
    fixed = [spec.shape[0] for spec in model.inputs if spec.shape and spec.shape[0] > 0]
    if not len(chosen) or (fixed and len(chosen) < fixed[0]):
        return None
    samples, size = whole_batches(model, split.take(chosen))
    output = output or model.outputs[0].name
    found = run_batched(model.network, samples, size)[output]
    value = _value(found, samples)
    if value is None or value < 0:  # worse than saying the mean: nothing to lose
        return None
    return Labels(samples, output, "r2" if _are_targets(samples) else "top1", value)


def _are_targets(split: Split) -> bool:
    return split.labels is not None and split.labels.dtype.kind == "f"


def _value(found: Array, split: Split) -> float | None:
    """Judge an output; ``None`` where its shape tells no classes apart, or all targets are the same."""
    import numpy as np

    labels = np.asarray(split.labels)
    if _are_targets(split):
        wanted = labels.reshape(found.shape).astype(np.float64)
        spread = np.square(wanted - wanted.mean(0)).sum()
        return round(1 - float(np.square(found - wanted).sum() / spread), 4) if spread else None
    axis = class_axis(labels.shape, found.shape)
    counts = labels != IGNORED if labels.ndim > 1 else np.ones(labels.shape, bool)
    if axis is None or not counts.any():
        return None
    return round(float((found.argmax(axis) == labels)[counts].mean()), 4)


def most_loss(precision: str, samples: int) -> float:
    """Return how much of its figure a file of that precision may lose, as a share; fewer than 4 bits may lose all."""
    width = None if "mixed" in precision else re.search(r"\d", precision)
    bits = int(width[0]) if width else 4
    usual = LOSSES.get(precision, INT8 if bits == 8 else FEWER if bits >= 4 else 1.0)
    return min(1.0, round(max(usual, FLIPS / samples), 4))


def measured(labels: Labels, outputs: Mapping[str, Array], precision: str) -> Labelled:
    """Return a file's figure beside the model's, and what it may lose."""
    count = len(labels.split)
    value = _value(outputs[labels.output], labels.split) or 0.0
    loss = most_loss(precision, count)
    return Labelled(metric=labels.metric, samples=count, model=labels.value, file=value, max_loss=loss)
