"""How numbers lie in the bytes of a tensor: plain integers and floats, and the blocks of GGUF's quantized types.

A layout cuts items into fields of symbols, scales first, and joins them again; both move bits only, so that any bytes
survive the way there and back. Block layouts after ``ggml-common.h`` of llama.cpp. Knows no file and no delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Symbols = NDArray[Any]
    Affine = tuple[Symbols, Symbols]

_WIDE: dict[int, np.dtype[Any]] = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}


@dataclass(frozen=True)
class Whole:
    """Numbers of ``width`` bytes, side by side from byte ``start`` on; ``is_float``: their bits sort as floats do."""

    start: int
    width: int = 1
    count: int = 1
    is_float: bool = False

    @property
    def bits(self) -> int:
        """How many bits a symbol has."""
        return 8 * self.width

    def cut(self, items: Bytes) -> Symbols:
        """Take the symbols [items, count] out of items [items, size]."""
        part = np.ascontiguousarray(items[:, self.start : self.start + self.width * self.count])
        symbols: Symbols = part.view(_WIDE[self.width])
        return symbols

    def put(self, symbols: Symbols, items: Bytes) -> None:
        """Write the symbols into their place."""
        part = np.ascontiguousarray(symbols, _WIDE[self.width]).view(np.uint8)
        items[:, self.start : self.start + self.width * self.count] = part


@dataclass(frozen=True)
class Scattered:
    """Symbols whose bits lie in several places of an item: ``places`` [symbol][bit], the lowest first."""

    places: tuple[tuple[int, ...], ...]
    is_float: bool = False

    @property
    def bits(self) -> int:
        """How many bits a symbol has."""
        return len(self.places[0])

    @property
    def count(self) -> int:
        """How many symbols an item has."""
        return len(self.places)

    @cached_property
    def _wanted(self) -> NDArray[np.intp]:
        return np.array(self.places, np.intp).ravel()

    def cut(self, items: Bytes) -> Symbols:
        """Take the symbols [items, count] out of items [items, size]."""
        bits = np.unpackbits(items, axis=1, bitorder="little")[:, self._wanted]
        return np.packbits(bits.reshape(len(items), self.count, self.bits), axis=2, bitorder="little")[..., 0]

    def put(self, symbols: Symbols, items: Bytes) -> None:
        """Write the symbols into their place; bits of other fields stay."""
        first, last = int(self._wanted.min()) // 8, int(self._wanted.max()) // 8 + 1
        bits = np.unpackbits(items[:, first:last], axis=1, bitorder="little")
        single = np.unpackbits(symbols[..., None].astype(np.uint8), axis=2, bitorder="little", count=self.bits)
        bits[:, self._wanted - 8 * first] = single.reshape(len(items), self.count * self.bits)
        items[:, first:last] = np.packbits(bits, axis=1, bitorder="little")


@dataclass(frozen=True)
class Layout:
    """Items of ``size`` bytes. ``scale``: from the fields of scales, what the last field's symbols are worth.

    It gives ``factor`` and ``offset``, both [items, groups], so that a symbol stands for ``factor * symbol + offset``.
    """

    name: str
    size: int
    fields: tuple[Whole | Scattered, ...]
    scale: Callable[[Sequence[Symbols]], Affine] | None = None
    is_signed: bool = False
    """The last field's symbols are two's complement."""


def _half(symbols: Symbols) -> Symbols:
    return np.ascontiguousarray(symbols, "<u2").view("<f2").astype(np.float64)


def _centred(zero: int) -> Callable[[Sequence[Symbols]], Affine]:
    """Levels around ``zero`` times one scale."""

    def scale(fields: Sequence[Symbols]) -> Affine:
        factor = _half(fields[0])
        return factor, -zero * factor

    return scale


def _lifted(fields: Sequence[Symbols]) -> Affine:
    """Levels times a scale plus a least value: Q4_1 and Q5_1."""
    return _half(fields[0]), _half(fields[1])


def _twice_scaled(fields: Sequence[Symbols]) -> Affine:
    """Levels times scale times scale, less a least value scaled alike: Q2_K, Q4_K and Q5_K."""
    d, least, scales, minima = (_half(fields[0]), _half(fields[1]), fields[2], fields[3])
    return d * scales, -least * minima


def _sixteen_scaled(zero: int, shift: int) -> Callable[[Sequence[Symbols]], Affine]:
    """Levels around ``zero`` times scale times scale: Q3_K and Q6_K."""

    def scale(fields: Sequence[Symbols]) -> Affine:
        small = fields[1].astype(np.float64) - shift if shift else fields[1].astype(np.int8).astype(np.float64)
        factor = _half(fields[0]) * small
        return factor, -zero * factor

    return scale


def _bits(byte: int, low: int, count: int) -> tuple[int, ...]:
    return tuple(8 * byte + low + i for i in range(count))


def _nibbles(start: int, count: int, extra: Callable[[int], tuple[int, ...]] = lambda _: ()) -> Scattered:
    """All low nibbles of ``count`` bytes, then all high ones; ``extra`` gives a symbol's further bits."""
    low = [_bits(start + i, 0, 4) for i in range(count)]
    high = [_bits(start + i, 4, 4) for i in range(count)]
    return Scattered(tuple(bits + extra(i) for i, bits in enumerate(low + high)))


def _k_nibbles(start: int, high: int | None = None) -> Scattered:
    """256 levels of Q4_K and Q5_K: of each 32 bytes the low, then the high nibbles; fifth bits stand in ``high``."""
    places = []
    for i in range(256):
        turn, inside = divmod(i, 64)
        bits = _bits(start + 32 * turn + inside % 32, 4 * (inside // 32), 4)
        places.append(bits if high is None else (*bits, 8 * (high + i % 32) + i // 32))
    return Scattered(tuple(places))


def _k_scales(start: int) -> tuple[Scattered, Scattered]:
    """Eight scales and eight minima of six bits in twelve bytes (``get_scale_min_k4``)."""
    scales = [_bits(start + i, 0, 6) for i in range(4)]
    scales += [_bits(start + 8 + i, 0, 4) + _bits(start + i, 6, 2) for i in range(4)]
    minima = [_bits(start + 4 + i, 0, 6) for i in range(4)]
    minima += [_bits(start + 8 + i, 4, 4) + _bits(start + 4 + i, 6, 2) for i in range(4)]
    return Scattered(tuple(scales)), Scattered(tuple(minima))


def _q6_levels() -> Scattered:
    places = []
    for i in range(256):
        half, inside = divmod(i, 128)
        quarter, column = divmod(inside, 32)
        low = _bits(64 * half + column + 32 * (quarter % 2), 4 * (quarter // 2), 4)
        places.append(low + _bits(128 + 32 * half + column, 2 * quarter, 2))
    return Scattered(tuple(places))


def _q2_levels(start: int, high: int | None = None) -> Scattered:
    """256 levels of two bits; the third ones of Q3_K stand in ``high``."""
    places = []
    for i in range(256):
        half, inside = divmod(i, 128)
        quarter, column = divmod(inside, 32)
        bits = _bits(start + 32 * half + column, 2 * quarter, 2)
        places.append(bits if high is None else (*bits, 8 * (high + column) + 4 * half + quarter))
    return Scattered(tuple(places))


def _q3_scales() -> Scattered:
    """Sixteen scales of six bits in twelve bytes."""
    low = [_bits(96 + i % 8, 4 * (i // 8), 4) for i in range(16)]
    return Scattered(tuple(bits + _bits(104 + i % 4, 2 * (i // 4), 2) for i, bits in enumerate(low)))


_D = Whole(0, 2, is_float=True)
_D2 = (_D, Whole(2, 2, is_float=True))

LAYOUTS: tuple[Layout, ...] = (
    Layout("bytes", 1, (Whole(0),)),
    Layout("16 bits", 2, (Whole(0, 2),)),
    Layout("32 bits", 4, (Whole(0, 4),)),
    Layout("float16", 2, (Whole(0, 2, is_float=True),)),
    Layout("float32", 4, (Whole(0, 4, is_float=True),)),
    Layout("nibbles", 1, (Scattered((_bits(0, 0, 4), _bits(0, 4, 4))),)),
    Layout("q8_0", 34, (_D, Whole(2, 1, 32)), _centred(0), is_signed=True),
    Layout("q4_0", 18, (_D, _nibbles(2, 16)), _centred(8)),
    Layout("q4_1", 20, (*_D2, _nibbles(4, 16)), _lifted),
    Layout("q5_0", 22, (_D, _nibbles(6, 16, lambda i: (16 + i,))), _centred(16)),
    Layout("q5_1", 24, (*_D2, _nibbles(8, 16, lambda i: (32 + i,))), _lifted),
    Layout(
        "q2_k", 84,
        (Whole(80, 2, is_float=True), Whole(82, 2, is_float=True), Scattered(tuple(_bits(i, 0, 4) for i in range(16))),
         Scattered(tuple(_bits(i, 4, 4) for i in range(16))), _q2_levels(16)),
        _twice_scaled,
    ),
    Layout("q3_k", 110, (Whole(108, 2, is_float=True), _q3_scales(), _q2_levels(32, 0)), _sixteen_scaled(4, 32)),
    Layout("q4_k", 144, (*_D2, *_k_scales(4), _k_nibbles(16)), _twice_scaled),
    Layout("q5_k", 176, (*_D2, *_k_scales(4), _k_nibbles(48, 16)), _twice_scaled),
    Layout("q6_k", 210, (Whole(208, 2, is_float=True), Whole(192, 1, 16), _q6_levels()), _sixteen_scaled(32, 0)),
    Layout("iq4_nl", 18, (_D, _nibbles(2, 16))),
    Layout("float64", 8, (Whole(0, 8, is_float=True),)),
)  # fmt: skip
"""Their order is the wire's: a new one is appended, none is ever changed."""

NUMBERS = {layout.name: number for number, layout in enumerate(LAYOUTS)}


def cut(layout: Layout, data: bytes) -> list[Symbols]:
    """Return the symbols of each field, [items, count]; the data are whole items."""
    items = np.frombuffer(data, np.uint8).reshape(-1, layout.size)
    return [field.cut(items) for field in layout.fields]


def join(layout: Layout, fields: Sequence[Symbols]) -> bytes:
    """Return the bytes of items; the inverse of `cut`."""
    items = np.zeros((len(fields[0]), layout.size), np.uint8)
    for field, symbols in zip(layout.fields, fields, strict=True):
        field.put(symbols, items)
    return items.tobytes()
