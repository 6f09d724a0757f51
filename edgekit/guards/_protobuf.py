"""Steps through protobuf's wire format in a mapped file: only what is asked for, and never beyond a message's end.

Reference: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.guards import Damaged

if TYPE_CHECKING:
    import mmap
    from collections.abc import Container, Iterator

MOST_FIELDS = 1 << 24
"""All together: who writes more wants to keep the reader busy. Lists of numbers are packed into one field."""
MOST_DEPTH = 64
"""Messages in messages; protobuf itself ends at 100."""
_MOST_BYTES = (1 << 31) - 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Wire:
    """The fields of messages. Every step counts against one bound."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self._left = MOST_FIELDS

    def fields(self, at: int, end: int, wanted: Container[int]) -> Iterator[tuple[int, int, int]]:
        """Yield number, start and end of each wanted field that has a length; of a number its value, and -1.

        Raises:
            Damaged: what stands there is no message that ends at ``end``.
        """
        data = self.data
        try:
            while at < end:
                start = at
                tag = data[at]
                at += 1
                if tag & 0x80:  # most numbers are one byte, and in these lines all the time is spent
                    tag, at = self._varint(start, 5)
                kind, field = tag & 7, tag >> 3
                self._left -= 1
                if self._left < 0 or not field:
                    raise self._endless(start)
                if kind not in (_VARINT, _BYTES):
                    at += _width(start, kind)
                    continue
                value = data[at]
                at += 1
                if value & 0x80:
                    value, at = self._varint(at - 1, 5 if kind else 10)
                size = value if kind else 0
                if size > end - at:
                    raise Damaged(start, f"field {field} has {size} bytes, {end - at} are left")
                if field in wanted:
                    yield (field, at, at + size) if kind else (field, value, -1)
                at += size
        except IndexError as error:
            raise Damaged(at, "the file ends within a field") from error
        if at > end:
            raise Damaged(at, "a field leaves its message")

    def _endless(self, at: int) -> Damaged:
        return Damaged(at, f"more than {MOST_FIELDS} fields" if self._left < 0 else "a field without a number")

    def _varint(self, at: int, most: int) -> tuple[int, int]:
        data, value = self.data, 0
        for place in range(most):
            byte = data[at + place]
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if most < 10 and value > _MOST_BYTES:
                    raise Damaged(at, f"{value} is longer than protobuf allows")
                return value, at + place + 1
        raise Damaged(at, f"a number of more than {most} bytes")


def _width(at: int, kind: int) -> int:
    if kind == _FIXED64:
        return 8
    if kind == _FIXED32:
        return 4
    raise Damaged(at, f"wire type {kind}")
