"""Follows a flatbuffer's offsets in a mapped file by a schema, and never out of it.

Reference: https://flatbuffers.dev/internals
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from edgekit.guards import Damaged

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Mapping

    Slot = int | str | tuple[str | int]
    """Bytes of a number; "text", "union" or a table's name; in a tuple, a vector of those."""
    Schema = Mapping[str, Mapping[int, Slot]]

MOST_TABLES = 1_000_000
"""As many as the verifier of flatbuffers takes: tables may be shared, and looked at once for each that points there."""


class Flatbuffer:
    """A mapped file and its schema. Positions are bytes from its beginning."""

    def __init__(self, data: mmap.mmap, schema: Schema) -> None:
        self._data = data
        self._end = len(data)
        self._schema = schema
        self._left = MOST_TABLES

    def root(self) -> int:
        """Return where the root table lies."""
        return self.indirect(0)

    def unsigned(self, at: int, width: int) -> int:
        """Read a number of so many bytes."""
        self._require(at, width)
        return int.from_bytes(self._data[at : at + width], "little")

    def numbers(self, at: int) -> tuple[int, ...]:
        """Read a vector of int32 that a slot points to."""
        target = self.vector(at, 4)
        count = self.unsigned(target, 4)
        return struct.unpack_from(f"<{count}i", self._data, target + 4)

    def tables(self, at: int) -> list[int]:
        """Return where the tables lie that a slot's vector names."""
        target = self.vector(at, 4)
        first = target + 4
        return [self.indirect(first + 4 * place) for place in range(self.unsigned(target, 4))]

    def text(self, at: int) -> bytes:
        """Read a text that a slot points to."""
        target = self.vector(at, 1)
        size = self.unsigned(target, 4)
        if self.unsigned(target + 4 + size, 1):
            raise Damaged(target, "a text without an end")
        return bytes(self._data[target + 4 : target + 4 + size])

    def indirect(self, at: int) -> int:
        """Follow an offset."""
        target = at + self.unsigned(at, 4)
        if target == at:
            raise Damaged(at, "an offset that leads nowhere")
        self._require(target, 4)
        return target

    def vector(self, at: int, width: int) -> int:
        """Follow an offset to a vector whose items have so many bytes; return where its length stands."""
        target = self.indirect(at)
        self._require(target + 4, self.unsigned(target, 4) * width)
        return target

    def slots(self, at: int) -> dict[int, int]:
        """Return where the fields of a table lie that are there, by their number."""
        self._left -= 1
        if self._left < 0:
            raise Damaged(at, f"more than {MOST_TABLES} tables")
        self._require(at, 4)
        virtual = at - int(struct.unpack_from("<i", self._data, at)[0])
        length = self.unsigned(virtual, 2)
        size = self.unsigned(virtual + 2, 2)
        if length < 4 or length % 2 or size < 4:
            raise Damaged(virtual, f"a table of {size} bytes, described in {length}")
        self._require(virtual, length)
        self._require(at, size)
        offsets = struct.unpack_from(f"<{length // 2 - 2}H", self._data, virtual + 4)
        return {slot: at + self._inside(at, offset, size) for slot, offset in enumerate(offsets) if offset}

    def verify(self, name: str, at: int, see: Callable[[str, int, dict[int, int]], None]) -> None:
        """Follow a table and all below it; ``see`` is told of each: its name, its place, its slots."""
        slots = self.slots(at)
        for slot, kind in self._schema[name].items():
            if slot not in slots:
                continue
            for below, place in self._field(kind, slots[slot]):
                self.verify(below, place, see)
        see(name, at, slots)

    def _field(self, kind: Slot, at: int) -> list[tuple[str, int]]:
        """Check a field's own bytes; return the tables that it leads to."""
        if isinstance(kind, int):
            self._require(at, kind)
        elif isinstance(kind, tuple):
            (item,) = kind
            if isinstance(item, str):
                return [(item, place) for place in self.tables(at)]
            self.vector(at, item)
        elif kind == "text":
            self.text(at)
        elif kind == "union":
            self.slots(self.indirect(at))
        else:
            return [(kind, self.indirect(at))]
        return []

    def _inside(self, at: int, offset: int, size: int) -> int:
        if not 4 <= offset < size:
            raise Damaged(at, f"a field at {offset} of a table of {size} bytes")
        return offset

    def _require(self, at: int, size: int) -> None:
        if at < 0 or size > self._end - at:
            raise Damaged(max(0, min(at, self._end)), f"{size} bytes are told at {at}, the file has {self._end}")
