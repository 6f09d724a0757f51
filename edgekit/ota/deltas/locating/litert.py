"""The tensors of a LiteRT file: a flatbuffer whose tensors name the buffers that hold their bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from edgekit.ota.deltas.locating.tensor import Tensor

if TYPE_CHECKING:
    from edgekit.ota.deltas.locating.tensor import Data

LAYOUTS = {
    0: "float32", 1: "float16", 2: "32 bits", 4: "32 bits", 7: "16 bits", 10: "float64", 15: "32 bits", 16: "16 bits",
    17: "nibbles", 18: "float16",
}  # fmt: skip
"""By the schema's ``TensorType``; every other is bytes."""
SUBGRAPHS, BUFFERS = 2, 4
MOST = 1_000_000
"""Graphs may share tables: a small file can name very many tensors."""


def is_mine(data: Data) -> bool:
    """Say whether the file looks like one."""
    return len(data) > 16 and data[4:8] == b"TFL3"


def tensors(data: Data) -> list[Tensor]:
    """List those whose bytes are in the file; a buffer that several name counts once.

    Raises:
        ValueError, struct.error: the file is damaged.
    """
    model = _number(data, 0)
    places = [_place(data, buffer) for buffer in _tables(data, model, BUFFERS)]
    found: dict[int, Tensor] = {}
    seen = 0
    for graph, subgraph in enumerate(_tables(data, model, SUBGRAPHS)):
        seen += _vector(data, subgraph, 0)[1]
        if seen > MOST:
            raise ValueError(f"more than {MOST} tensors")
        for tensor in _tables(data, subgraph, 0):
            at = _field(data, tensor, 2)
            buffer = _number(data, at) if at else 0
            start, size = places[buffer] if buffer < len(places) else (0, 0)
            if size:
                kind = _field(data, tensor, 1)
                layout = LAYOUTS.get(data[kind] if kind else 0, "bytes")
                name = f"{graph}/{_bytes(data, tensor, 3)!r}"
                found.setdefault(buffer, Tensor(name, layout, _shape(data, tensor), start, size))
    return list(found.values())


def _place(data: Data, buffer: int) -> tuple[int, int]:
    """Return where a buffer's bytes begin, and how many there are: in the flatbuffer, or behind it in a large file."""
    start, size = _vector(data, buffer, 0)
    if size:
        return start, size
    begins, holds = _field(data, buffer, 1), _field(data, buffer, 2)
    if begins and holds:
        return struct.unpack_from("<Q", data, begins)[0], struct.unpack_from("<Q", data, holds)[0]
    return 0, 0


def _number(data: Data, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _field(data: Data, table: int, index: int) -> int:
    """Return where a table's field lies, 0 where it has none."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    if vtable < 0:
        raise ValueError("a table begins before the file")
    (length,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * index + 2 > length:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * index)
    return table + offset if offset else 0


def _vector(data: Data, table: int, index: int) -> tuple[int, int]:
    at = _field(data, table, index)
    if not at:
        return 0, 0
    start = at + _number(data, at)
    count = _number(data, start)
    if count > len(data) - start:
        raise ValueError(f"a vector of {count} entries")
    return start + 4, count


def _tables(data: Data, table: int, index: int) -> list[int]:
    start, count = _vector(data, table, index)
    if count > MOST:
        raise ValueError(f"a vector of {count} tables")
    return [start + 4 * i + _number(data, start + 4 * i) for i in range(count)]


def _bytes(data: Data, table: int, index: int) -> bytes:
    start, count = _vector(data, table, index)
    return bytes(data[start : start + count])


def _shape(data: Data, tensor: int) -> tuple[int, ...]:
    start, count = _vector(data, tensor, 0)
    return struct.unpack_from(f"<{count}i", data, start) if count <= 16 else ()
