"""From an encoder's output to one vector a text. Knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import HealthError

if TYPE_CHECKING:
    from edgekit.manifest import Embedding
    from edgekit.tensors import Array


def pooled(output: Array, mask: Array | None, how: Embedding) -> Array:
    """Return float32 [batch, width]; ``mask`` [batch, tokens] is 1 where a token counts, None where all do.

    As Sentence Transformers does (Reimers and Gurevych 2019).

    Raises:
        HealthError: the output has another shape than the manifest says, or holds NaN.
    """
    import numpy as np

    values = np.asarray(output, np.float32)
    if values.ndim != (2 if how.pooling == "none" else 3):
        raise HealthError(f"{how.output!r} {list(output.shape)} is not pooled by {how.pooling}")
    counts = np.ones(values.shape[:2], np.float32) if mask is None else np.asarray(mask, np.float32)
    if how.pooling == "mean":
        values = (values * counts[..., None]).sum(1) / np.maximum(counts.sum(1, keepdims=True), 1)
    elif how.pooling == "max":
        values = np.where(counts[..., None] > 0, values, -np.inf).max(1)
    elif how.pooling == "cls":
        values = values[:, 0]
    elif how.pooling == "last":
        values = values[np.arange(len(values)), np.maximum(counts.sum(1).astype(int) - 1, 0)]
    if not np.isfinite(values).all():
        raise HealthError(f"the vectors of {how.output!r} hold NaN or infinity")
    if how.normalize:
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return np.asarray(values, np.float32)
