"""GGUF: every count, length and offset of the header lies within the file, as llama.cpp takes it, before that reads it.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.guards import Damaged, ModelFile

if TYPE_CHECKING:
    import mmap

    from edgekit.guards import Guard

    Value = int | float | bool | str | tuple[int, ...] | None

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_PAIRS = MOST_TENSORS = 1 << 16
MOST_ITEMS = 1 << 22
"""Of all lists of texts together. The largest vocabularies have 262,144 tokens and somewhat more merges."""
MOST_TEXT = 1 << 24
MOST_NAME = 63
MOST_AXES = 4
MOST_ALIGNMENT = 1 << 20
MOST_NUMBERS = (1 << 63) - 1
KEPT_ITEMS = 4096
"""Longer lists of numbers are stepped over; one a layer is the longest that anybody asks for."""
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Weights and bytes in a block of each tensor type."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``offset`` counts from the beginning of the data."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself, and its tensors, whose data begin at byte ``data``. Long lists are ``None``."""

    pairs: dict[str, Value]
    tensors: tuple[Tensor, ...]
    data: int


class _Reader:
    """Steps through the header; ``_at`` is the byte where it stands."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._end = len(data)
        self._at = len(MAGIC)
        self._items = MOST_ITEMS

    def header(self) -> Header:
        if self._data[: len(MAGIC)] != MAGIC:
            raise Damaged(0, "this is no GGUF file")
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise Damaged(4, f"version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
        count = self._count("<Q", MOST_TENSORS, "tensors")
        pairs: dict[str, Value] = {}
        for _ in range(self._count("<Q", MOST_PAIRS, "keys")):
            at = self._at
            key = self._text()
            if key in pairs:
                raise Damaged(at, f"the key {key!r} comes twice")
            pairs[key] = self._value(int(self._scalar("<I")))
        alignment = pairs.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise Damaged(self._at, f"an alignment of {alignment}")
        tensors = tuple(self._tensor(alignment) for _ in range(count))
        return Header(pairs, tensors, -(-self._at // alignment) * alignment)

    def _tensor(self, alignment: int) -> Tensor:
        at = self._at
        name = self._text(MOST_NAME)
        shape = tuple(int(self._scalar("<Q")) for _ in range(self._count("<I", MOST_AXES, "axes")))
        kind, offset = int(self._scalar("<I")), int(self._scalar("<Q"))
        if kind not in BLOCKS:
            raise Damaged(at, f"{name!r} has the tensor type {kind}, which nobody knows")
        weights, size = BLOCKS[kind]
        total = 1
        for length in shape:  # one after the other: the product of all may be larger than what a C++ int64 holds
            total *= length
            if total > MOST_NUMBERS:
                raise Damaged(at, f"{name!r} has more numbers than can be counted: {shape}")
        if (shape[0] if shape else 1) % weights:
            raise Damaged(at, f"{name!r} has rows of {shape[0] if shape else 1}, its blocks have {weights}")
        if offset % alignment:
            raise Damaged(at, f"{name!r} begins at {offset}, which is no multiple of {alignment}")
        return Tensor(name, kind, shape, offset, total // weights * size)

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise Damaged(self._at, f"a value of type {kind}")
        return self._scalar(SCALARS[kind])

    def _array(self) -> tuple[int, ...] | None:
        kind, count = int(self._scalar("<I")), int(self._scalar("<Q"))
        if kind == STRING:
            self._step_over_texts(count)
            return None
        if kind not in SCALARS:
            raise Damaged(self._at, f"a list of values of type {kind}")
        if kind in INTEGERS and count <= KEPT_ITEMS:
            return tuple(int(self._scalar(SCALARS[kind])) for _ in range(count))
        self._step_over(count * struct.calcsize(SCALARS[kind]))
        return None

    def _step_over_texts(self, count: int) -> None:
        self._items -= count
        if self._items < 0:
            raise Damaged(self._at, f"lists of more than {MOST_ITEMS} texts")
        at, end, data, length = self._at, self._end, self._data, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length(data, at)[0]
        except (struct.error, OverflowError) as error:
            raise Damaged(min(at, end), f"a list of {count} texts leaves the file") from error
        self._at = at
        self._step_over(0)

    def _text(self, most: int = MOST_TEXT) -> str:
        start = self._at
        size = self._count("<Q", most, "bytes in a text")
        self._step_over(size)
        try:
            return self._data[self._at - size : self._at].decode()
        except UnicodeDecodeError as error:
            raise Damaged(start, "a text that is no UTF-8") from error

    def _count(self, form: str, most: int, of: str) -> int:
        at = self._at
        value = int(self._scalar(form))
        if value > most:
            raise Damaged(at, f"{value} {of}, at most {most} are taken")
        return value

    def _step_over(self, size: int) -> None:
        if size > self._end - self._at:
            raise Damaged(min(self._at, self._end), f"{size} bytes are told, {max(0, self._end - self._at)} are left")
        self._at += size

    def _scalar(self, form: str) -> int | float | bool:
        self._step_over(size := struct.calcsize(form))
        (value,) = struct.unpack_from(form, self._data, self._at - size)
        return value  # type: ignore[no-any-return]  # struct gives Any


def read(file: ModelFile) -> Header:
    """Read a file's header, every length bounded by the file's.

    Raises:
        Damaged: it is no GGUF file, or its header leads beyond its end.
    """
    with file.mapped() as data:
        header = _Reader(data).header()
        _require_room(header, len(data))
    return header


def _require_room(header: Header, end: int) -> None:
    taken, names = 0, set()
    for tensor in sorted(header.tensors, key=lambda one: (one.offset, one.size)):
        if tensor.offset < taken:
            raise Damaged(header.data + tensor.offset, f"{tensor.name!r} begins within the tensor before it")
        taken = tensor.offset + tensor.size
        if header.data + taken > end:
            raise Damaged(end, f"{tensor.name!r} ends at byte {header.data + taken}, behind the file's end")
        if tensor.name in names:
            raise Damaged(header.data, f"the tensor {tensor.name!r} comes twice")
        names.add(tensor.name)


def check(file: ModelFile) -> None:
    """Look at a GGUF file; see `Guard`."""
    parts = read(file).pairs.get("split.count", 1)
    if parts not in (0, 1):  # llama.cpp would open the others by names that it makes from this one
        raise Damaged(0, f"this is one of {parts} parts: merge them first, with llama-gguf-split --merge")


PLUGIN: Guard = check
