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
    from collections.abc import Iterator
    from pathlib import Path

    from edgekit.runtime.backends import TextEngine
    from edgekit.tensors import Array

PLACES = (1, 4, 16)
"""After how many tokens of each sample llama.cpp is asked, and after all of them."""
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
    worst, limit = max(found), MOST.get(precision, QUANTIZED)
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
            told = engine.next_scores([int(token) for token in sample[:count]], scores.shape[-1])
            if not told:
                continue
            here = scores[count - 1].astype(np.float64)
            here -= np.logaddexp.reduce(here)
            there = np.full(len(here), -np.inf)
            there[list(told)] = list(told.values())
            likely = np.exp(here)
            yield float((likely * (here - there))[likely > 0].sum())
