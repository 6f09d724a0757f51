"""Tensors as the Open Inference Protocol writes them: JSON data, or the binary tensor extension. Pure.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md and
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import array as python
import functools
import math
import struct
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.tensors import Array

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_CODES = {"INT8": "b", "UINT8": "B", "INT16": "h", "UINT16": "H", "INT64": "q", "UINT64": "Q", "FP32": "f", "FP64": "d"}
_FLAT = {"f": list[float], "i": list[int], "u": list[int], "b": list[bool], "O": list[str]}

Parameters = dict[str, bool | int | float | str]


class WireInput(msgspec.Struct):
    """One input of a request."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    parameters: Parameters = {}


class WireOutput(msgspec.Struct):
    """One output that a request asks for."""

    name: str
    parameters: Parameters = {}


class InferRequest(msgspec.Struct):
    """The JSON of a request."""

    inputs: list[WireInput]
    id: str | None = None
    outputs: list[WireOutput] = []
    parameters: Parameters = {}


def read_tensors(inputs: Sequence[WireInput], binary: memoryview) -> dict[str, Array]:
    """Return the arrays of a request; ``binary`` is what follows its JSON.

    Raises:
        InputError: an unknown datatype, a shape that its data does not fill, or bytes that are missing or left over.
    """
    arrays: dict[str, Array] = {}
    for wire in inputs:
        if wire.name in arrays:
            raise InputError(f"input {wire.name!r} is given twice")
        size = wire.parameters.get("binary_data_size")
        if "shared_memory_region" in wire.parameters:
            raise InputError(f"input {wire.name!r}: shared memory is not supported")
        if size is None:
            arrays[wire.name] = _from_json(wire)
            continue
        if type(size) is not int or not 0 <= size <= len(binary):
            raise InputError(f"input {wire.name!r} claims {size} binary bytes, {len(binary)} are left")
        arrays[wire.name] = from_binary(wire, binary[:size])
        binary = binary[size:]
    if binary:
        raise InputError(f"{len(binary)} binary bytes belong to no input", "set binary_data_size of each input")
    return arrays


def json_data(array: Array) -> list[Any]:
    """Return the values of an output, flat and in row-major order."""
    if array.dtype.kind == "O":
        return [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel()]
    values: list[Any] = array.ravel().tolist()
    return values


def binary_data(array: Array) -> bytes:
    """Return the bytes of an output: little-endian and row-major; strings with their length in four bytes."""
    import numpy as np

    if array.dtype.kind == "O":
        items = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
        return b"".join(struct.pack("<I", len(item)) + item for item in items)
    return np.ascontiguousarray(array).tobytes()


def _from_json(wire: WireInput) -> Array:
    import numpy as np

    dtype, count = _dtype_and_count(wire)
    if not wire.data:
        raise InputError(f"input {wire.name!r} has neither data nor binary_data_size")
    try:
        values = msgspec.json.decode(wire.data, type=_FLAT[dtype.kind])
    except (msgspec.DecodeError, UnicodeDecodeError):
        values = _flattened(wire, _FLAT[dtype.kind])
    if len(values) != count:
        raise InputError(f"input {wire.name!r} has {len(values)} values, its shape {list(wire.shape)} needs {count}")
    try:
        # Python's own arrays are filled faster, and make infinity of what 32 bits cannot hold without a warning.
        code = _CODES.get(wire.datatype)
        array = np.frombuffer(python.array(code, values), dtype) if code else np.array(values, dtype)
    except (OverflowError, ValueError) as error:
        raise InputError(f"input {wire.name!r} holds a value that {wire.datatype} cannot: {error}") from error
    return _shaped(wire, array)


def _flattened(wire: WireInput, flat: type) -> list[Any]:
    """Read data that is nested by axes, as the protocol allows."""
    try:
        values: list[Any] = msgspec.json.decode(wire.data, type=list)
        for _ in wire.shape[1:]:
            if all(isinstance(row, list) for row in values):
                values = [item for row in values for item in row]
        return msgspec.convert(values, flat)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"input {wire.name!r} is no {wire.datatype}{list(wire.shape)}: {error}") from error


def _shaped(wire: WireInput, array: Array) -> Array:
    # An empty array fits any shape with a zero in it, also one whose other axes no memory could hold.
    try:
        return array.reshape(wire.shape)
    except ValueError as error:
        raise InputError(f"input {wire.name!r} has the impossible shape {list(wire.shape)}") from error


def from_binary(wire: WireInput, data: memoryview) -> Array:
    """Return the array that bytes are: little-endian and row-major; strings after their length in four bytes.

    Raises:
        InputError: an unknown datatype, or a shape that the bytes do not fill.
    """
    import numpy as np

    dtype, count = _dtype_and_count(wire)
    if wire.data:
        raise InputError(f"input {wire.name!r} has both data and binary_data_size")
    if dtype.kind == "O":
        return _shaped(wire, np.array([*_strings(wire, bytes(data), count), None], object)[:-1])
    if len(data) != count * dtype.itemsize:
        raise InputError(
            f"input {wire.name!r} has {len(data)} bytes, "
            f"{wire.datatype}{list(wire.shape)} needs {count * dtype.itemsize}"
        )
    return _shaped(wire, np.frombuffer(data, dtype))


def _strings(wire: WireInput, data: bytes, count: int) -> list[str]:
    items: list[str] = []
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            raise InputError(f"input {wire.name!r} ends inside the length of a string")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if length > len(data) - at:
            raise InputError(f"input {wire.name!r} claims a string of {length} bytes, {len(data) - at} are left")
        items.append(data[at : at + length].decode(errors="replace"))
        at += length
    if len(items) != count:
        raise InputError(f"input {wire.name!r} has {len(items)} strings, its shape {list(wire.shape)} needs {count}")
    return items


def _dtype_and_count(wire: WireInput) -> tuple[Any, int]:
    if wire.datatype not in DATATYPES:
        raise InputError(f"input {wire.name!r} has the unknown datatype {wire.datatype!r}", f"one of {list(DATATYPES)}")
    if len(wire.shape) > 32 or (wire.shape and not (min(wire.shape) >= 0 and max(wire.shape) < 1 << 63)):
        raise InputError(f"input {wire.name!r} has the impossible shape {list(wire.shape)[:32]}")
    return _dtype(wire.datatype), math.prod(wire.shape)


@functools.cache
def _dtype(name: str) -> Any:  # noqa: ANN401  # NumPy is imported late
    import numpy as np

    return np.dtype(DATATYPES[name])


@functools.cache
def datatype(dtype: Any) -> str:  # noqa: ANN401  # NumPy is imported late
    """Return the protocol's name of a dtype; to ask NumPy for its own takes 2 us."""
    return NAMES[dtype.name]


def wants_binary(request: InferRequest, output: WireOutput | None) -> bool:
    """Say whether an output goes out as bytes: its own wish, else the request's."""
    own: Mapping[str, object] = output.parameters if output else {}
    return bool(own.get("binary_data", request.parameters.get("binary_data_output", False)))
