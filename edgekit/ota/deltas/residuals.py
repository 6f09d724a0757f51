"""What is left of new symbols where the old ones are known: five ways, each with its inverse. Exact for any bits.

Fields come in a layout's order, so that scales are known when levels are foretold. Knows no file and no delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgekit.ota.deltas.layouts import Layout

    Symbols = NDArray[Any]

SAME, XOR, SUBTRACT, ORDERED, SCALED = range(5)
"""As the wire counts them: unchanged, exclusive or, difference, difference of floats by rank, difference from what the
scales foretell."""
AT_ONCE = 1 << 16
"""So many levels are foretold at a time."""


def ways(layout: Layout, index: int) -> list[int]:
    """List what can be done with a field, without `SAME`."""
    field = layout.fields[index]
    found = [XOR, SUBTRACT]
    if field.is_float:
        found.append(ORDERED)
    if layout.scale is not None and index == len(layout.fields) - 1:
        found.append(SCALED)
    return found


def take(way: int, layout: Layout, old: Sequence[Symbols], new: Sequence[Symbols], *, index: int) -> Symbols:
    """Return what is left of field ``index`` of ``new``."""
    one, other = old[index], new[index]
    if way == XOR:
        return one ^ other
    bits = layout.fields[index].bits
    if way == ORDERED:
        one, other = _rank(one, bits), _rank(other, bits)
    elif way == SCALED:
        one = _foretold(layout, old, new)
    return _folded(other - one, bits)


def give(way: int, layout: Layout, old: Sequence[Symbols], new: Sequence[Symbols], *, left: Symbols) -> Symbols:
    """Return the next field of ``new``, which holds all fields before it; the inverse of `take`."""
    one = old[len(new)]
    if way == SAME:
        return one
    if way == XOR:
        return one ^ left
    bits = layout.fields[len(new)].bits
    difference = _unfolded(left, bits)
    if way == ORDERED:
        return _unranked(_cut(_rank(one, bits) + difference, bits), bits)
    if way == SCALED:
        one = _foretold(layout, old, new)
    return _cut(one + difference, bits)


def _cut(symbols: Symbols, bits: int) -> Symbols:
    found: Symbols = symbols & symbols.dtype.type((1 << bits) - 1)
    return found


def _folded(difference: Symbols, bits: int) -> Symbols:
    """Let small differences of either sign be small numbers: 0, -1, 1, -2 become 0, 1, 2, 3."""
    difference = _cut(difference, bits)
    kind = difference.dtype.type
    is_negative = difference >> kind(bits - 1)
    return _cut((difference << kind(1)) ^ (kind(0) - is_negative), bits)


def _unfolded(folded: Symbols, bits: int) -> Symbols:
    kind = folded.dtype.type
    return _cut((folded >> kind(1)) ^ (kind(0) - (folded & kind(1))), bits)


def _rank(symbols: Symbols, bits: int) -> Symbols:
    """Order the bits of floats as their values: negative ones turn around."""
    kind = symbols.dtype.type
    sign = kind(1 << (bits - 1))
    return np.where(symbols & sign, ~symbols, symbols | sign)


def _unranked(ranks: Symbols, bits: int) -> Symbols:
    kind = ranks.dtype.type
    sign = kind(1 << (bits - 1))
    return np.where(ranks & sign, ranks ^ sign, ~ranks)


def _foretold(layout: Layout, old: Sequence[Symbols], new: Sequence[Symbols]) -> Symbols:
    """Return the levels that give the old values at the new scales; some items at a time, for the memory's sake."""
    levels = old[len(layout.fields) - 1]
    found = np.empty_like(levels)
    step = max(1, AT_ONCE // levels.shape[1])
    for start in range(0, len(levels), step):
        part = slice(start, start + step)
        found[part] = _foretold_here(layout, [field[part] for field in old], [field[part] for field in new])
    return found


def _foretold_here(layout: Layout, old: Sequence[Symbols], new: Sequence[Symbols]) -> Symbols:
    assert layout.scale is not None  # noqa: S101  # the caller asked
    levels = old[len(layout.fields) - 1]
    bits = layout.fields[-1].bits
    middle = 1 << (bits - 1) if layout.is_signed else 0
    numbers = (levels ^ levels.dtype.type(middle)).astype(np.float64) - middle
    with np.errstate(all="ignore"):  # any bits may come, and what is no number is caught below
        (factor, offset), (target, base) = layout.scale(old), layout.scale(new)
        groups = numbers.reshape(*factor.shape, -1)
        wanted = (groups * factor[..., None] + (offset - base)[..., None]) / target[..., None]
    usable = np.where(np.isfinite(wanted), wanted, groups)
    # Quotients, products and rint are rounded alike by every processor that keeps to IEEE 754.
    rounded = np.rint(np.clip(usable, -middle, (1 << bits) - 1 - middle)).astype(np.int64) + middle
    found: Symbols = rounded.reshape(levels.shape).astype(levels.dtype) ^ levels.dtype.type(middle)
    return found
