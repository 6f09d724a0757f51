"""The tensors of an ONNX file: protobuf's fields, walked without a schema, down to the raw data of each tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgekit.ota.deltas.locating.tensor import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.ota.deltas.locating.tensor import Data

GRAPH = 7
NODE, INITIALIZER = 1, 5
ATTRIBUTE, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH = 5, 5, 6
DIMS, TYPE, FLOATS, INTEGERS, NAME, RAW, EXTERNAL, ELSEWHERE = 1, 2, 4, 5, 8, 9, 13, 14
MAX_DEPTH = 8
LAYOUTS = {
    1: "float32", 4: "16 bits", 5: "16 bits", 6: "32 bits", 7: "32 bits", 10: "float16", 11: "float64", 12: "32 bits",
    13: "32 bits", 16: "float16", 21: "nibbles", 22: "nibbles",
}  # fmt: skip
"""By ``TensorProto.DataType``; every other is bytes."""


class _Field(NamedTuple):
    number: int
    value: int
    """A number; of what has a length, where it begins."""
    end: int
    """Where that ends; 0 for a number."""


def is_mine(data: Data) -> bool:
    """Say whether the file begins as a ModelProto does: with the version of its intermediate representation."""
    return len(data) > 16 and data[:1] == b"\x08"


def tensors(data: Data) -> list[Tensor]:
    """List initializers and constants that hold their bytes in the file.

    Raises:
        ValueError, IndexError: this is no ONNX file, or a damaged one.
    """
    return [made for start, end in _protos(data) if (made := _tensor(data, start, end)) is not None]


def external(data: Data) -> dict[str, list[Tensor]]:
    """List what lies in other files, by their paths.

    Raises:
        ValueError, IndexError: this is no ONNX file, or a damaged one.
    """
    found: dict[str, list[Tensor]] = {}
    for start, end in _protos(data):
        fields = list(_fields(data, start, end))
        if any(one.number == ELSEWHERE and one.value == 1 for one in fields):
            told = dict(_pair(data, one) for one in fields if one.number == EXTERNAL)
            if "location" in told and "length" in told:
                size = int(told["length"])
                tensor = _described(data, fields, int(told.get("offset", 0)), size)
                found.setdefault(told["location"], []).append(tensor)
    return found


def _protos(data: Data) -> list[tuple[int, int]]:
    """Find every TensorProto of the graph, of its nodes, and of the graphs inside them."""
    found: list[tuple[int, int]] = []
    for field in _fields(data, 0, len(data)):
        if field.number == GRAPH and field.end:
            found += _in_graph(data, field, 0)
    return found


def _in_graph(data: Data, graph: _Field, depth: int) -> Iterator[tuple[int, int]]:
    if depth > MAX_DEPTH:
        raise ValueError("graphs within graphs without end")
    for field in _fields(data, graph.value, graph.end):
        if field.number == INITIALIZER and field.end:
            yield field.value, field.end
        elif field.number == NODE and field.end:
            for part in _fields(data, field.value, field.end):
                if part.number == ATTRIBUTE and part.end:
                    yield from _in_attribute(data, part, depth)


def _in_attribute(data: Data, attribute: _Field, depth: int) -> Iterator[tuple[int, int]]:
    for field in _fields(data, attribute.value, attribute.end):
        if field.number == ATTRIBUTE_TENSOR and field.end:
            yield field.value, field.end
        elif field.number == ATTRIBUTE_GRAPH and field.end:
            yield from _in_graph(data, field, depth + 1)


def _tensor(data: Data, start: int, end: int) -> Tensor | None:
    fields = list(_fields(data, start, end))
    for number in (RAW, FLOATS, INTEGERS):
        for field in fields:
            if field.number == number and field.end:
                made = _described(data, fields, field.value, field.end - field.value)
                return made._replace(layout="bytes") if number == INTEGERS else made
    return None


def _described(data: Data, fields: list[_Field], start: int, size: int) -> Tensor:
    shape: list[int] = []
    name, layout = b"", "bytes"
    for field in fields:
        if field.number == DIMS:
            shape += [field.value] if not field.end else _packed(data, field)
        elif field.number == TYPE and not field.end:
            layout = LAYOUTS.get(field.value, "bytes")
        elif field.number == NAME:
            name = bytes(data[field.value : field.end])
    return Tensor(name.decode(errors="replace"), layout, tuple(shape), start, size)


def _packed(data: Data, field: _Field) -> list[int]:
    found, at = [], field.value
    while at < field.end:
        value, at = _varint(data, at)
        found.append(value)
    return found


def _pair(data: Data, entry: _Field) -> tuple[str, str]:
    told = {one.number: bytes(data[one.value : one.end]).decode() for one in _fields(data, entry.value, entry.end)}
    return told.get(1, ""), told.get(2, "")


def _fields(data: Data, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field without a number")
        if wire == 0:
            value, at = _varint(data, at)
            yield _Field(number, value, 0)
        elif wire == 2:
            length, at = _varint(data, at)
            if length > end - at:
                raise ValueError(f"a field of {length} bytes leaves what it is in")
            yield _Field(number, at, at + length)
            at += length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of the wire type {wire}")
    if at != end:
        raise ValueError("a field leaves what it is in")


def _varint(data: Data, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without end")
