"""The tensors of a safetensors file: a length, a JSON object, then the bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from edgekit.ota.deltas.locating.tensor import Tensor

if TYPE_CHECKING:
    from edgekit.ota.deltas.locating.tensor import Data

MAX_HEADER_BYTES = 64 << 20
LAYOUTS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "float16", "I32": "32 bits", "U32": "32 bits",
    "I64": "32 bits", "U64": "32 bits", "I16": "16 bits", "U16": "16 bits",
}  # fmt: skip


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def is_mine(data: Data) -> bool:
    """Say whether the file looks like one."""
    return len(data) > 10 and data[8:9] == b"{" and struct.unpack_from("<Q", data)[0] <= len(data) - 8


def tensors(data: Data) -> list[Tensor]:
    """List them.

    Raises:
        ValueError: the header is damaged.
    """
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    told = msgspec.json.decode(data[8 : 8 + length], type=dict[str, msgspec.Raw])
    found = []
    for name, raw in told.items():
        if name != "__metadata__":
            entry = msgspec.json.decode(raw, type=_Entry)
            start, end = entry.data_offsets
            layout = LAYOUTS.get(entry.dtype, "bytes")
            found.append(Tensor(name, layout, entry.shape, 8 + length + start, end - start))
    return found
