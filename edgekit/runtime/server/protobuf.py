"""The wire format of protocol buffers, for frozen structs. Knows no message.

The fields of a `Message` are numbered from 1 in their order: that is how the protocols that we speak number theirs.
grpcio does without the protobuf package, and so do we: its messages copy each tensor twice and are untyped, while here
bytes are slices of what came in, and numbers wait for NumPy as they travelled.

Specification: https://protobuf.dev/programming-guides/encoding/. Of a message that comes twice the last one counts.
"""

from __future__ import annotations

import functools
import struct
import types
import typing
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import msgspec

from edgekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Blob: TypeAlias = bytes | memoryview
"""A field of bytes."""
MAX_FIELDS = 1 << 18
"""Fields of a message with all that it holds, each of two bytes and more that may become two hundred in memory."""
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}


class Packed(msgspec.Struct, frozen=True):
    """Numbers of a repeated field in pieces as they travelled, one after the other; none is looked at."""

    pieces: tuple[Blob, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pieces)


class Message(msgspec.Struct, frozen=True):
    """What has a field for each of its attributes; those left at their default do not travel."""


Kind = TypeVar("Kind", bound=Message)


class _Field(msgspec.Struct, frozen=True):
    """One field: its type, and whether it is one of many, or the values of a map."""

    name: str
    kind: Any
    many: bool = False
    mapped: bool = False


def decode(data: Blob, kind: type[Kind]) -> Kind:
    """Read a message; fields that ``kind`` lacks are passed over.

    Raises:
        InputError: the bytes end in between, are of another type than the field, or hold too many fields.
    """
    view = memoryview(data)
    try:
        return _Reader(view).message(kind, 0, len(view))
    except UnicodeDecodeError as error:
        raise InputError(f"the message holds a text that is no UTF-8: {error}") from error


def encode(message: Message) -> bytes:
    """Write a message."""
    return b"".join(_pieces(message))


def varint(value: int) -> bytes:
    """Write one number, seven bits a byte; negative ones as 64 bits."""
    value &= (1 << 64) - 1
    if value < 0x80:
        return value.to_bytes()
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


class _Pieces(list[Blob]):
    """The pieces of a `Packed` while they come in."""


class _Reader:
    """Goes through a message, and through those in it."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._left = MAX_FIELDS

    def message(self, kind: type[Kind], at: int, end: int) -> Kind:
        """Read a message that lies between two places."""
        found: dict[str, Any] = {}
        fields = _fields(kind)
        while at < end:
            tag, at = self._number(at, end)
            wire, field = tag & 7, fields.get(tag >> 3)
            start, at = self._extent(wire, at, end)
            self._count()
            if not tag >> 3:
                raise InputError("the message is damaged: a field has the number 0")
            if field is not None:
                self._take(field, found, (wire, start, at))
        for name, values in found.items():
            if isinstance(values, list):
                found[name] = Packed(tuple(values)) if isinstance(values, _Pieces) else tuple(values)
        return kind(**found)

    def _take(self, field: _Field, found: dict[str, Any], place: tuple[int, int, int]) -> None:
        wire, start, end = place
        if field.kind is Packed:
            found.setdefault(field.name, _Pieces()).append(self._data[start:end])
        elif field.mapped:
            entry: Any = self.message(field.kind, start, end)
            found.setdefault(field.name, {})[entry.key] = entry.value
        elif field.many and field.kind is int and wire == LENGTH:
            values = found.setdefault(field.name, [])
            while start < end:
                self._count()
                value, start = self._number(start, end)
                values.append(_signed(value))
        elif field.many:
            found.setdefault(field.name, []).append(self._value(field, wire, start, end))
        else:
            found[field.name] = self._value(field, wire, start, end)

    def _value(self, field: _Field, *place: int) -> Any:  # noqa: ANN401  # of the field's type
        wire, start, end = place
        kind = field.kind
        if wire != _wire(kind):
            raise InputError(f"the message is damaged: {field.name!r} travelled as type {wire}, not {_wire(kind)}")
        if kind is bool or kind is int:
            value = _signed(self._number(start, end)[0])
            return bool(value) if kind is bool else value
        if kind is float:
            return struct.unpack_from("<d", self._data, start)[0]
        if kind is str:
            return str(self._data[start:end], "utf-8")
        return self._data[start:end] if kind is Blob else self.message(kind, start, end)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise InputError(f"the message has more than {MAX_FIELDS} fields", "send tensors as raw bytes")

    def _extent(self, wire: int, at: int, end: int) -> tuple[int, int]:
        """Return where the value of a field starts and ends."""
        start = at
        if wire == VARINT:
            _, at = self._number(at, end)
        elif wire == LENGTH:
            size, start = self._number(at, end)
            at = start + size
        elif wire in _SIZES:
            at += _SIZES[wire]
        else:
            raise InputError(f"the message is damaged: there is no wire type {wire}")
        if at > end:
            raise InputError(f"the message ends too early: a field ends at byte {at}, the message at {end}")
        return start, at

    def _number(self, at: int, end: int) -> tuple[int, int]:
        if at < end and (value := self._data[at]) < 0x80:
            return value, at + 1
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (1 << 64) - 1, at
            shift += 7
        raise InputError("the message ends inside a number" if at == end else "a number has more than ten bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _pieces(message: Message) -> Iterator[Blob]:
    defaults = _defaults(type(message))
    for number, field in _fields(type(message)).items():
        value = getattr(message, field.name)
        if value == defaults[field.name]:
            continue
        if field.kind is Packed:
            yield from _long(number, b"".join(value.pieces))
        elif field.mapped:
            for key, each in value.items():
                yield from _long(number, encode(field.kind(key, each)))
        elif field.many and field.kind is int:
            yield from _long(number, b"".join(map(varint, value)))
        else:
            for each in value if field.many else (value,):
                yield from _single(number, field.kind, each)


def _single(number: int, kind: Any, value: Any) -> Iterator[Blob]:  # noqa: ANN401  # of the field's type
    if kind is bool or kind is int:
        yield varint(number << 3 | VARINT) + varint(value)
    elif kind is float:
        yield varint(number << 3 | FIXED64) + struct.pack("<d", value)
    elif kind is str:
        yield from _long(number, value.encode())
    else:
        yield from _long(number, value if kind is Blob else encode(value))


def _long(number: int, value: Blob) -> Iterator[Blob]:
    yield varint(number << 3 | LENGTH) + varint(len(value))
    yield value


def _wire(kind: Any) -> int:  # noqa: ANN401  # a type, or a union of two
    if kind is bool or kind is int:
        return VARINT
    return FIXED64 if kind is float else LENGTH


@functools.cache
def _fields(kind: type[Message]) -> Mapping[int, _Field]:
    hints = typing.get_type_hints(kind)
    return {number: _field(name, hints[name]) for number, name in enumerate(kind.__struct_fields__, 1)}


@functools.cache
def _defaults(kind: type[Message]) -> Mapping[str, Any]:
    fresh = kind()
    return {name: getattr(fresh, name) for name in kind.__struct_fields__}


def _field(name: str, hint: Any) -> _Field:  # noqa: ANN401  # a type as it was written
    inner = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if hint == Blob:
        return _Field(name, Blob)
    if origin is tuple:
        return _Field(name, inner[0], many=True)
    if origin is dict:
        value = inner[1]
        return _Field(name, _entry(value), mapped=True)
    if origin is types.UnionType:
        return _Field(name, inner[0])  # or None, where it did not come
    return _Field(name, hint)


@functools.cache
def _entry(value: type) -> type[Message]:
    """Return the message of one entry of a map: a text, and a value."""
    fields = [("key", str, ""), ("value", value, value())]
    return cast("type[Message]", msgspec.defstruct("Entry", fields, bases=(Message,), frozen=True))
