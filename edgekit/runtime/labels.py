"""From a model's scores to labels. Knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import HealthError

if TYPE_CHECKING:
    from edgekit.manifest import Classification
    from edgekit.tensors import Array


def best_labels(scores: Array, how: Classification, top_k: int) -> list[tuple[str, float]]:
    """Return the best ``top_k`` labels of one sample's scores with their probabilities, best first.

    Raises:
        HealthError: a score is NaN or infinite.
    """
    import numpy as np

    values = np.asarray(scores, np.float64).ravel()
    if not np.isfinite(values).all():
        raise HealthError(f"the scores {how.output!r} hold NaN or infinity")
    if how.softmax:
        values = np.exp(values - values.max())
        values /= values.sum()
    order = np.argsort(-values, kind="stable")[:top_k]
    return [(how.labels[i] if i < len(how.labels) else str(i), float(values[i])) for i in order.tolist()]
