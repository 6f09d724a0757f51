"""The tensors of a GGUF file: a header of keys and values, a table of tensors, then their blocks."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

from edgekit.ota.deltas.locating.tensor import Tensor

if TYPE_CHECKING:
    from edgekit.ota.deltas.locating.tensor import Data

MAX_DEPTH = 4
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""How many bytes a value of each kind takes."""
STRING, ARRAY = 8, 9
KINDS = {
    0: ("float32", 1, 4), 1: ("float16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 16: ("bytes", 256, 66), 17: ("bytes", 256, 74),
    18: ("bytes", 256, 98), 19: ("bytes", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("bytes", 256, 110),
    22: ("bytes", 256, 82), 23: ("bytes", 256, 136), 24: ("bytes", 1, 1), 25: ("16 bits", 1, 2), 26: ("32 bits", 1, 4),
    27: ("32 bits", 1, 8), 28: ("float64", 1, 8), 29: ("bytes", 256, 56), 30: ("float16", 1, 2),
    34: ("bytes", 256, 54), 35: ("bytes", 256, 66), 39: ("bytes", 32, 17),
}  # fmt: skip
"""By ggml's number of a type: its layout, how many numbers a block has, how many bytes."""


def is_mine(data: Data) -> bool:
    """Say whether the file looks like one."""
    return len(data) > 24 and data[:4] == b"GGUF"


def tensors(data: Data) -> list[Tensor]:
    """List them; a type that nobody knows ends the list.

    Raises:
        ValueError, struct.error, KeyError: the file is damaged, or of another version.
    """
    version, count, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3) or count > len(data) // 24 or pairs > len(data) // 12:
        raise ValueError(f"GGUF {version} with {count} tensors and {pairs} keys")
    at, alignment = 24, 32
    for _ in range(pairs):
        key, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        if key == "general.alignment" and SCALARS.get(kind) == 4:
            (alignment,) = struct.unpack_from("<I", data, at + 4)
        at = _behind(data, at + 4, kind, 0)
    entries = []
    for _ in range(count):
        name, at = _text(data, at)
        (rank,) = struct.unpack_from("<I", data, at)
        shape = struct.unpack_from(f"<{_few(rank)}Q", data, at + 4)
        kind, start = struct.unpack_from("<IQ", data, at + 4 + 8 * rank)
        entries.append((name, shape, KINDS[kind], start))
        at += 16 + 8 * rank
    first = -(-at // alignment) * alignment
    return [
        Tensor(name, layout, shape, first + start, math.prod(shape) // numbers * size)
        for name, shape, (layout, numbers, size), start in entries
    ]


def _few(rank: int) -> int:
    if rank > 8:
        raise ValueError(f"a tensor of {rank} dimensions")
    return rank


def _text(data: Data, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    if length > len(data) - at:
        raise ValueError(f"a text of {length} bytes")
    return data[at + 8 : at + 8 + length].decode(errors="replace"), at + 8 + length


def _behind(data: Data, at: int, kind: int, depth: int) -> int:
    """Return where a value ends."""
    if kind == STRING:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != ARRAY:
        return at + SCALARS[kind]
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if count > len(data) or depth > MAX_DEPTH:
        raise ValueError(f"a list of {count} values")
    if kind in SCALARS:
        return at + int(count) * SCALARS[kind]
    for _ in range(count):
        at = _behind(data, at, kind, depth + 1)
    return at
