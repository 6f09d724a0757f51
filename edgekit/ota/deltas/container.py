"""The file of a delta: a magic, a header, and records that give the new file from its first byte to its last.

Each record is a short MessagePack array behind its length, then the bytes that it says. Every count is bounded before
anything is read for it. Knows no tensor and no repository.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from edgekit.errors import BundleError

if TYPE_CHECKING:
    from typing import BinaryIO

MAGIC = b"EKDELTA\x01"
"""The last byte is the version: whoever knows another one only fetches the whole file."""
PIECE_BYTES = 1 << 20
"""So many new bytes at most does a record make that is worked on in memory."""
SIGHT_BYTES = 4 << 20
"""So many old bytes at most does a record look at."""
MAX_RECORD_BYTES = 4096
_LENGTH = struct.Struct("<H")

T = TypeVar("T")

Place = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Length = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
Piece = Annotated[int, msgspec.Meta(ge=1, le=PIECE_BYTES)]
Symbols = Annotated[int, msgspec.Meta(ge=0, le=4 * PIECE_BYTES)]
Number = Annotated[int, msgspec.Meta(ge=0, le=255)]
Sha256 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class _Packed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Header(_Packed, frozen=True):
    """Which file becomes which."""

    base: Sha256
    base_size: Place
    new: Sha256
    new_size: Place


class Part(_Packed, frozen=True):
    """``length`` bytes, packed by zstd into ``size``; as they are where both are the same."""

    length: Symbols
    size: Symbols


class Plane(_Packed, frozen=True):
    """One byte of each symbol of a field, the highest first; ``form`` says how it lies in its parts."""

    form: Number
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=2)]


class Left(_Packed, frozen=True):
    """What is left of a field: see `residuals`."""

    way: Number
    planes: Annotated[tuple[Plane, ...], msgspec.Meta(max_length=8)]


class Copy(_Packed, frozen=True, tag=0):
    """Old bytes as they are."""

    base: Place
    length: Length


class Fresh(_Packed, frozen=True, tag=1):
    """New bytes by themselves."""

    part: Part


class Prefixed(_Packed, frozen=True, tag=2):
    """New bytes, packed with ``sight`` old ones from ``base`` on as what stands before them."""

    base: Place
    sight: Annotated[int, msgspec.Meta(ge=1, le=SIGHT_BYTES)]
    part: Part


class Change(_Packed, frozen=True, tag=3):
    """Items of a layout that lie at ``base`` in the old file, field by field."""

    base: Place
    length: Piece
    layout: Number
    fields: Annotated[tuple[Left, ...], msgspec.Meta(max_length=8)]


Record = Copy | Fresh | Prefixed | Change


def made_by(record: Record) -> int:
    """Return how many new bytes a record gives."""
    return record.part.length if isinstance(record, Fresh | Prefixed) else record.length


def parts_of(record: Record) -> list[Part]:
    """List the parts whose bytes follow a record, in their order."""
    if isinstance(record, Copy):
        return []
    if isinstance(record, Change):
        return [part for left in record.fields for plane in left.planes for part in plane.parts]
    return [record.part]


def write(file: BinaryIO, entry: Header | Record, parts: list[bytes]) -> int:
    """Append a header, or a record with the bytes of its parts; return how many bytes that took."""
    data = msgspec.msgpack.encode(entry)
    return file.write(_LENGTH.pack(len(data)) + data + b"".join(parts))


def length_of(record: Record, parts: list[bytes]) -> int:
    """Return how many bytes `write` would take."""
    return _LENGTH.size + len(msgspec.msgpack.encode(record)) + sum(map(len, parts))


def read_header(file: BinaryIO) -> Header:
    """Read magic and header.

    Raises:
        BundleError: this is no delta of a known version.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise BundleError("this is no delta that this edgekit knows", "update edgekit")
    return _decoded(file, Header)


def read_record(file: BinaryIO) -> tuple[Record, list[bytes]]:
    """Read the next record and the bytes of its parts.

    Raises:
        BundleError: cut off, no record, or a count out of bounds.
    """
    record: Record = _decoded(file, Record)  # type: ignore[arg-type]  # a union is a type to msgspec
    if not 0 < made_by(record) <= PIECE_BYTES and not isinstance(record, Copy):
        raise BundleError(f"a record of the delta makes {made_by(record)} bytes")
    parts = parts_of(record)
    if sum(part.size for part in parts) > 2 * PIECE_BYTES:
        raise BundleError("a record of the delta is longer than what it makes")
    return record, [_exactly(file, part.size) for part in parts]


def _decoded(file: BinaryIO, kind: type[T]) -> T:
    (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
    if length > MAX_RECORD_BYTES:
        raise BundleError(f"a record of the delta has {length} bytes, more than {MAX_RECORD_BYTES}")
    try:
        return msgspec.msgpack.decode(_exactly(file, length), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"the delta is malformed: {error}") from error


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise BundleError("the delta is cut off")
    return data
