"""Typed contents of tensors over gRPC, to and from the raw bytes that they stand for. Knows no message's frame.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import InputError
from edgekit.runtime.server.oip_messages import Contents
from edgekit.runtime.server.oip_tensors import DATATYPES, binary_data
from edgekit.runtime.server.protobuf import Packed

if TYPE_CHECKING:
    from edgekit.runtime.server.oip_messages import Tensor
    from edgekit.runtime.server.protobuf import Blob
    from edgekit.tensors import Array

FIELDS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where the values of each datatype lie. FP16 has no field: it travels raw."""
MAX_DIGITS = 10
BLOCK = 1 << 16
"""Numbers that are read at once: each takes a hundred bytes then, and eight afterwards."""


def raw_bytes(tensor: Tensor) -> Blob:
    """Return the raw bytes of a tensor that has typed contents: little-endian, strings after their length.

    Raises:
        InputError: the values lie in another field than the datatype's, are damaged, or do not fit the datatype.
    """
    contents = tensor.contents or Contents()
    field = FIELDS.get(tensor.datatype)
    if field is None:
        raise InputError(
            f"input {tensor.name!r} has the datatype {tensor.datatype!r}, which has no typed contents",
            f"send it in raw_input_contents, or as one of {list(FIELDS)}",
        )
    strange = [name for name in contents.__struct_fields__ if name != field and getattr(contents, name)]
    if strange:
        raise InputError(f"input {tensor.name!r} has {strange[0]}, {tensor.datatype} travels in {field}")
    if field == "bytes_contents":
        return b"".join(struct.pack("<I", len(one)) + one for one in contents.bytes_contents)
    pieces = getattr(contents, field).pieces
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    return data if tensor.datatype in ("FP32", "FP64") else _integers(tensor, data)


def typed(datatype: str, array: Array) -> Contents:
    """Return the values of an output in the field of its datatype, which is not FP16."""
    field = FIELDS[datatype]
    if array.dtype.kind == "O":
        items = tuple(item if isinstance(item, bytes) else str(item).encode() for item in array.ravel())
        return Contents(bytes_contents=items)
    data = binary_data(array) if array.dtype.kind == "f" else _varints(array)
    return msgspec.structs.replace(Contents(), **{field: Packed((data,) if data else ())})


def _integers(tensor: Tensor, data: Blob) -> Blob:
    """Read numbers of seven bits a byte, a block of them at once."""
    import numpy as np

    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    if len(raw) != (ends[-1] + 1 if len(ends) else 0):
        raise InputError(f"input {tensor.name!r} ends inside a number")
    values = np.empty(len(ends), DATATYPES[tensor.datatype])
    start = 0
    for at in range(0, len(ends), BLOCK):
        block = ends[at : at + BLOCK]
        values[at : at + BLOCK] = _decoded(tensor, raw[start : block[-1] + 1], block - start)
        start = block[-1] + 1
    return values.tobytes()


def _decoded(tensor: Tensor, raw: Array, ends: Array) -> Array:
    import numpy as np

    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_DIGITS:
        raise InputError(f"input {tensor.name!r} holds a number of more than {MAX_DIGITS} bytes")
    values = np.zeros(len(ends), np.uint64)
    for digit in range(lengths.max()):
        there = lengths > digit
        values[there] |= (raw[starts[there] + digit] & 0x7F).astype(np.uint64) << np.uint64(7 * digit)
    dtype = np.dtype(DATATYPES[tensor.datatype])
    if dtype.kind == "b":
        return values.astype(dtype)
    whole = values.view(np.int64) if dtype.kind == "i" else values
    narrow: Array = whole.astype(dtype)
    if (narrow != whole).any():
        raise InputError(f"input {tensor.name!r} holds a value that {tensor.datatype} cannot")
    return narrow


def _varints(array: Array) -> bytes:
    """Write integers in seven bits a byte, all at once; negative ones as 64 bits."""
    import numpy as np

    values = array.ravel().astype(np.int64 if array.dtype.kind == "i" else np.uint64).view(np.uint64)
    digits = np.zeros((len(values), MAX_DIGITS), np.uint8)
    there = np.zeros(digits.shape, bool)
    for digit in range(MAX_DIGITS):
        rest = values >> np.uint64(7 * digit)
        there[:, digit] = (rest > 0) | (digit == 0)
        digits[:, digit] = (rest & np.uint64(0x7F)).astype(np.uint8) | (np.uint8(0x80) * (rest > 0x7F))
    return bytes(digits[there])
