"""ExecuTorch: the program's table and every segment of weights lie within the file.

What a delegate makes of its own segment is for that delegate to judge. Layout: the `.pte` header behind a flatbuffer's,
https://github.com/pytorch/executorch/blob/main/docs/source/pte-file-format.md
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from edgekit.guards import Damaged, ModelFile
from edgekit.guards._flatbuffer import Flatbuffer

if TYPE_CHECKING:
    import mmap

    from edgekit.guards import Guard

IDENTIFIER, EXTENDED = b"ET", b"eh00"
SEGMENTS, OFFSET, SIZE = 4, 0, 1
"""Slots of the program's table, and of a segment's."""
_HEADER = struct.Struct("<IQQ")


def _extent(data: mmap.mmap) -> tuple[int, int]:
    """Return the length of the program, and where its segments begin; without an extended header there are none."""
    if data[8:12] != EXTENDED:
        return len(data), len(data)
    if len(data) < 12 + _HEADER.size:
        raise Damaged(len(data), "the file ends within its header")
    _, program, base = _HEADER.unpack_from(data, 12)
    if program > len(data) or base > len(data):
        raise Damaged(12, f"a program of {program} bytes, segments from {base}: the file has {len(data)}")
    return program, base


def check(file: ModelFile) -> None:
    """Look at a program; see `Guard`."""
    with file.mapped() as data:
        if data[4:6] != IDENTIFIER:
            raise Damaged(4, "this is no ExecuTorch program")
        _, base = _extent(data)
        flat = Flatbuffer(data, {})
        slots = flat.slots(flat.root())
        for place in flat.tables(slots[SEGMENTS]) if SEGMENTS in slots else ():
            own = flat.slots(place)
            offset, size = (flat.unsigned(own[slot], 8) if slot in own else 0 for slot in (OFFSET, SIZE))
            if base + offset + size > len(data):
                raise Damaged(place, f"a segment ends at {base + offset + size}, the file has {len(data)} bytes")


PLUGIN: Guard = check
