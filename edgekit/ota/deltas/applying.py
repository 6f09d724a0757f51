"""Makes the new file out of the old one and a delta, a piece at a time, in memory that no delta can raise.

The delta is signed, and read as if it were not. What was written counts only once its hash is the signed one. Knows
no repository and no bundle.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from edgekit.errors import BundleError
from edgekit.ota.deltas import container
from edgekit.ota.deltas.container import PIECE_BYTES, Change, Copy, Fresh, Prefixed
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from edgekit.manifest import FileEntry
    from edgekit.ota.deltas.container import Header, Record


def apply(delta: Path, base: Path, entry: FileEntry, target: Path) -> None:
    """Write ``target``, the file that was signed, from ``base`` and ``delta``; what lay there is replaced.

    After a failure or a kill ``target`` is worth nothing: call again, or fetch the whole file.

    Raises:
        BundleError: the delta is malformed, for another file, or does not give the signed one.
        MissingExtra: numpy or zstandard is not installed.
        OSError: the disk is full, or does not answer.
    """
    with extra("device"):
        import numpy as np
        import zstandard
    del np, zstandard
    with delta.open("rb") as source, base.open("rb") as old, target.open("wb") as out:
        header = container.read_header(source)
        _require(header, os.fstat(old.fileno()).st_size, entry)
        hasher, done = hashlib.sha256(), 0
        while done < entry.size:
            record, parts = container.read_record(source)
            done += container.made_by(record)
            if done > entry.size:
                raise BundleError(f"the delta makes more than the {entry.size} bytes of {entry.path}")
            for piece in _pieces(record, parts, old):
                hasher.update(piece)
                out.write(piece)
        if source.read(1):
            raise BundleError("the delta goes on behind its end")
        if hasher.hexdigest() != entry.sha256:
            raise BundleError(f"the delta does not give the signed bytes of {entry.path}")
        out.flush()
        os.fsync(out.fileno())


def _require(header: Header, base_size: int, entry: FileEntry) -> None:
    if (header.new.hex(), header.new_size) != (entry.sha256, entry.size):
        raise BundleError(f"the delta is for another file than {entry.path}")
    if header.base_size != base_size:
        raise BundleError(f"the delta begins at a file of {header.base_size} bytes, here are {base_size}")


def _pieces(record: Record, parts: list[bytes], old: BinaryIO) -> Iterator[bytes]:
    from edgekit.ota.deltas import coders

    match record:
        case Copy(base=base, length=length):
            for at in range(0, length, PIECE_BYTES):
                yield _old(old, base + at, min(PIECE_BYTES, length - at))
        case Fresh(part=part):
            yield coders.unpack(part, parts[0])
        case Prefixed(base=base, sight=sight, part=part):
            yield coders.unpack(part, parts[0], _old(old, base, sight))
        case Change():
            yield _changed(record, parts, _old(old, record.base, record.length))


def _old(file: BinaryIO, at: int, length: int) -> bytes:
    if at + length > os.fstat(file.fileno()).st_size:
        raise BundleError(f"the delta reads {length} bytes at {at}, behind the end of the old file")
    file.seek(at)
    return file.read(length)


def _changed(record: Change, parts: list[bytes], base: bytes) -> bytes:
    from edgekit.ota.deltas import coders, layouts, residuals

    if record.layout >= len(layouts.LAYOUTS):
        raise BundleError(f"the delta has the layout {record.layout}, which this edgekit does not know")
    layout = layouts.LAYOUTS[record.layout]
    if record.length % layout.size or len(record.fields) != len(layout.fields):
        raise BundleError(f"the delta cuts {record.length} bytes into {layout.name} of {layout.size}")
    old = layouts.cut(layout, base)
    new: list[layouts.Symbols] = []
    waiting = iter(parts)
    for index, left in enumerate(record.fields):
        field, before = layout.fields[index], old[index]
        if left.way != residuals.SAME and left.way not in residuals.ways(layout, index):
            raise BundleError(f"the delta changes {layout.name} in the way {left.way}, which there is not")
        wanted = 0 if left.way == residuals.SAME else (field.bits + 7) // 8
        if len(left.planes) != wanted:
            raise BundleError(f"the delta has {len(left.planes)} planes for a field, and {wanted} are needed")
        planes = [
            coders.unpack_plane(plane, [next(waiting) for _ in plane.parts], before.size) for plane in left.planes
        ]
        given = coders.symbols(planes).reshape(before.shape) if planes else before
        if field.bits < 8 and given.size and int(given.max()) >> field.bits:
            raise BundleError(f"the delta has numbers of more than {field.bits} bits")
        new.append(residuals.give(left.way, layout, old, new, left=given))
    return layouts.join(layout, new)
