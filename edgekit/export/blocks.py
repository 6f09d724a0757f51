"""Quantizes rows into llama.cpp's plain types of blocks, with columns that count more than others. Reads no file.

A block of 32 numbers shares a half-precision scale (Q4_0, Q5_0), or a scale and a minimum (Q4_1, Q5_1). Without
weights the bytes are those of the package gguf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.plugins import extra

if TYPE_CHECKING:
    from edgekit.tensors import Array

BLOCK = 32
BITS = {"Q4_0": 4, "Q5_0": 5, "Q4_1": 4, "Q5_1": 5}
"""The types whose scale is searched; the error of Q8_0 is too small to be worth it."""
SHRUNK = tuple(1.0 - 0.025 * step for step in range(-4, 13))
"""What the range of a block is multiplied by: a tenth wider to three tenths narrower."""
ROWS = 1 << 14
"""So many blocks at once: the search holds a few copies of them."""


def quantize(array: Array, kind: str, importance: Array | None = None) -> Array:
    """Return the bytes of a matrix [rows, columns] as GGUF's type ``kind``.

    With ``importance`` [columns], each block takes the scale, refitted by least squares, that has the least squared
    error weighted by it; the weighted error never exceeds that without.
    """
    with extra("export"):
        import gguf
        import numpy as np
    plain: Array = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
    if importance is None or kind not in BITS:
        return plain
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, BLOCK)
    weights = np.maximum(importance, importance.mean() * 1e-6 + 1e-30).astype(np.float32).reshape(-1, BLOCK)
    found = []
    for start in range(0, len(blocks), ROWS):
        part = blocks[start : start + ROWS]
        own = weights[np.arange(start, start + len(part)) % len(weights)]
        found.append(_searched(part, own, kind, plain.reshape(len(blocks), -1)[start : start + ROWS]))
    return np.concatenate(found).reshape(plain.shape)


def _searched(blocks: Array, weights: Array, kind: str, plain: Array) -> Array:
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    best = plain.copy()
    least = (weights * (gguf.quants.dequantize(plain, number) - blocks) ** 2).sum(1)
    for shrunk in SHRUNK:
        scale, low, levels = _rounded(blocks, weights, kind, shrunk)
        error = (weights * (scale * levels + low - blocks) ** 2).sum(1)
        better = error < least
        best[better] = _packed(scale[better], low[better], levels[better], kind)
        least = np.where(better, error, least)
    return best


def _rounded(blocks: Array, weights: Array, kind: str, shrunk: float) -> tuple[Array, Array, Array]:
    """Return scales and minima as halves hold them, and levels from 0 up, for one width of the range."""
    import numpy as np

    most = 2 ** BITS[kind] - 1
    if kind.endswith("_0"):  # levels count from minus half their number, so the largest value takes the sign
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
        scale, middle = extreme * np.float32(shrunk) / -(most // 2 + 1), most // 2 + 1
        signed = _levels(blocks, scale, most, middle) - middle
        scale = _half(
            _quotient((weights * blocks * signed).sum(1, keepdims=True), (weights * signed**2).sum(1, keepdims=True))
        )
        levels = _levels(blocks, scale, most, middle)
        return scale, -middle * scale, levels
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    middle_value, half_width = (low + high) / 2, (high - low) / 2 * np.float32(shrunk)
    low, scale = middle_value - half_width, 2 * half_width / most
    levels = _levels(blocks - low, scale, most, 0)
    total = weights.sum(1, keepdims=True)
    mean_x, mean_l = ((weights * a).sum(1, keepdims=True) / total for a in (blocks, levels))
    spread = (weights * (levels - mean_l) ** 2).sum(1, keepdims=True)
    scale = _half(_quotient((weights * (levels - mean_l) * (blocks - mean_x)).sum(1, keepdims=True), spread))
    low = _half(mean_x - scale * mean_l)
    return scale, low, _levels(blocks - low, scale, most, 0)


def _levels(values: Array, scale: Array, most: int, middle: int) -> Array:
    import numpy as np

    found: Array = np.clip(np.rint(values * _quotient(np.ones_like(scale), scale)) + middle, 0, most)
    return found


def _quotient(above: Array, below: Array) -> Array:
    """Divide; by zero gives zero: such a block holds one value."""
    import numpy as np

    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    return found


def _half(values: Array) -> Array:
    import numpy as np

    return values.astype(np.float16).astype(np.float32)


def _packed(scale: Array, low: Array, levels: Array, kind: str) -> Array:
    """Lay out as ggml does: scale, minimum, fifth bits, then two levels a byte, half a block apart."""
    import numpy as np

    numbers = levels.astype(np.uint8)
    parts = [scale.astype(np.float16).view(np.uint8)]
    if kind.endswith("_1"):
        parts.append(low.astype(np.float16).view(np.uint8))
    if BITS[kind] == 5:
        parts.append(np.packbits(numbers >> 4, axis=1, bitorder="little"))
    first, second = numbers[:, : BLOCK // 2] & 15, numbers[:, BLOCK // 2 :] & 15
    return np.concatenate([*parts, first | (second << 4)], axis=1)
