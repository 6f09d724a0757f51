"""Does llama.cpp compute from a GGUF file what was computed from its bytes? Compares next-token probabilities.

Knows no model: the same file is asked twice, by two implementations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgekit import plugins
from edgekit.errors import ParityError
from edgekit.export.quiet import silence
from edgekit.runtime import backends
from edgekit.runtime.backends import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgekit.runtime.backends import TextEngine
    from edgekit.tensors import Array

PLACES = (1, 4, 16)
"""After how many tokens of each sample llama.cpp is asked, and after all of them."""
TOLD = 256
"""So many likely tokens are asked for: llama.cpp takes seconds to tell all of 50,000."""
LEAST = 1e-9
"""The probability of all others where rounding leaves them none."""
MOST = {"f32": 1e-4, "f16": 1e-3, "bf16": 1e-3}
QUANTIZED = 0.05
"""The largest KL divergence: where weights are integers, llama.cpp rounds activations to 8 bits."""


def agreed(main: Path, precision: str, tokens: Array, logits: Array) -> str:
    """Compare with ``logits`` [samples, length, vocabulary] that were computed for ``tokens`` [samples, length].

    Returns:
        A sentence with the largest divergence; empty where the engine tells no probabilities.

    Raises:
        ParityError: llama.cpp computes something else.
        MissingExtra, HealthError: there is no engine, or it refuses the file.
    """
    with silence():
        backend = cast("backends.Backend", plugins.load(backends.__name__, "gguf", "engine"))
        engine = cast("TextEngine", backend.open(main, EngineOptions(threads=1, context=tokens.shape[1] + 8)))
        try:
            found = list(_divergences(engine, tokens, logits))
        finally:
            engine.close()
    if not found:
        return ""
    worst, limit = max(0.0, *found), MOST.get(precision, QUANTIZED)
    if not worst <= limit:
        raise ParityError(
            f"llama.cpp computes something else from {main.name} than its bytes say: KL {worst:.3g} (at most"
            f" {limit:g})",
            "the order of a tensor's rows, or a number of the header, is not what llama.cpp takes it for",
        )
    return (
        f"{engine.engine} gives the same next tokens, KL at most {worst:.2g} in {len(found)} places, where {limit:g} is"
        " allowed"
    )


def _divergences(engine: TextEngine, tokens: Array, logits: Array) -> Iterator[float]:
    """Give the KL divergence of what the engine says from what was computed, place by place."""
    import numpy as np

    for sample, scores in zip(tokens, logits, strict=True):
        for count in sorted({min(place, len(sample)) for place in (*PLACES, len(sample))}):
            told = engine.next_scores([int(token) for token in sample[:count]], min(TOLD, scores.shape[-1]))
            if told:
                yield _divergence(scores[count - 1].astype(np.float64), told)


def _divergence(scores: Array, told: Mapping[int, float]) -> float:
    """Return the KL divergence of ``told`` from computed scores [vocabulary], all tokens that are not told as one.

    That is never more than the divergence over all tokens (the data processing inequality).
    """
    import numpy as np

    here = (scores - np.logaddexp.reduce(scores))[list(told)]
    there = np.array(list(told.values()))
    rest, other = (max(1 - np.exp(one).sum(), LEAST) for one in (here, there))
    return float((np.exp(here) * (here - there)).sum() + rest * np.log(rest / other))
