"""Makes the delta from one file to another: tensor by tensor the smallest of what `container` has records for.

Tensors are found by `locating`; a file that it does not know is one stretch of bytes. Reads files by mapping them.
Knows no repository.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from edgekit.ota.deltas import container, locating
from edgekit.ota.deltas.container import PIECE_BYTES, SIGHT_BYTES, Change, Copy, Fresh, Header, Left, Prefixed
from edgekit.plugins import extra
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

    from edgekit.ota.deltas.container import Record
    from edgekit.ota.deltas.layouts import Layout
    from edgekit.ota.deltas.locating import Data, Tensor
    from edgekit.progress import Progress

MOST = 0.7
"""A delta longer than this share of the new file is none: the whole file is fetched."""
NEAR_BYTES = 16 << 10
"""At least so many old bytes does a short piece look at; with more, packing takes long."""
POOR = 0.5
"""Where a change takes more than this share of its bytes, other ways are packed in full, not only weighed."""
SAMPLES, SAMPLE_BYTES = 12, 64
"""So many stretches are looked for elsewhere: zstd's quick levels overlook what moved among small numbers."""
_Made = tuple["Record", list[bytes]]


class Stretch(NamedTuple):
    """New bytes ``start`` to ``end``; the old ones that they are like begin at ``base``, where there are any.

    ``layouts`` can be tried on bytes that keep their place; without any, old and new are only looked at together.
    """

    start: int
    end: int
    base: int | None
    layouts: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A file and the tensors that are known in it from elsewhere, such as those of ONNX external data."""

    path: Path
    tensors: tuple[Tensor, ...] = ()


def make(old: Source, new: Source, target: BinaryIO, *, name: str, progress: Progress = silent) -> int | None:
    """Write the delta from ``old`` to ``new``; return its length, or None where the whole file does better.

    What was written is then of no use. ``progress`` counts the new file's bytes under ``name``.

    Raises:
        MissingExtra: numpy or zstandard is not installed.
    """
    with extra("device"):
        import numpy as np
        import zstandard
    del np, zstandard
    with _mapped(old.path) as before, _mapped(new.path) as after:
        header = Header(hashlib.sha256(before).digest(), len(before), hashlib.sha256(after).digest(), len(after))
        target.write(container.MAGIC)
        length = len(container.MAGIC) + container.write(target, header, [])
        stretches = _stretches(_tensors(old, before), _tensors(new, after), before, after)
        for record, parts in _joined(_records(stretches, before, after, name, progress=progress)):
            length += container.write(target, record, parts)
            if length > MOST * len(after):
                return None
    return length


@contextmanager
def _mapped(path: Path) -> Iterator[Data]:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # nothing cannot be mapped
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _tensors(source: Source, data: Data) -> list[Tensor]:
    found = list(source.tensors) or locating.tensors(data)
    return locating.apart(found, len(data))


def _stretches(old: list[Tensor], new: list[Tensor], before: Data, after: Data) -> Iterator[Stretch]:
    """Cut the new file at its tensors, and say of each stretch where its like begins in the old one."""
    pairs = locating.matched(old, new)
    at = likely = 0
    for tensor in new:
        like = pairs.get(tensor)
        yield from _between(at, tensor.start, likely, before=before, after=after)
        at = tensor.start + tensor.size
        likely = likely + (at - tensor.start) if like is None else like.start + like.size
        if like is None:
            yield Stretch(tensor.start, at, min(max(0, likely - tensor.size), len(before)), ())
        else:
            yield Stretch(tensor.start, at, like.start, (tensor.layout,) if like.size == tensor.size else ())
    yield from _between(at, len(after), likely, before=before, after=after)


def _between(start: int, end: int, base: int, *, before: Data, after: Data) -> Iterator[Stretch]:
    """Bytes that are no tensor's: a header, a graph, or a file that nobody knows."""
    if start < end:
        keeps_place = len(before) == len(after) and base == start
        yield Stretch(start, end, base, locating.UNKNOWN if keeps_place and end - start > 64 else ())


def _records(
    stretches: Iterable[Stretch],
    before: Data,
    after: Data,
    name: str,
    *,
    progress: Progress,  # as above
) -> Iterator[_Made]:
    for stretch in stretches:
        for at, length in _cut(stretch):
            progress(f"delta of {name}", at, len(after))
            base = None if stretch.base is None else stretch.base + at - stretch.start
            yield from _smallest(after[at : at + length], base, before, stretch.layouts)
    progress(f"delta of {name}", len(after), len(after))


def _cut(stretch: Stretch) -> Iterator[tuple[int, int]]:
    """Cut a stretch into pieces of whole items."""
    from edgekit.ota.deltas.layouts import LAYOUTS, NUMBERS

    item = max((LAYOUTS[NUMBERS[name]].size for name in stretch.layouts), default=1)
    step = PIECE_BYTES // item * item
    for at in range(stretch.start, stretch.end, step):
        yield at, min(step, stretch.end - at)


def _smallest(data: bytes, base: int | None, before: Data, layouts: tuple[str, ...]) -> Iterator[_Made]:
    """Choose the record for one piece; what is left over of a last, broken item goes on its own."""
    if base is not None and before[base : base + len(data)] == data:
        yield Copy(base, len(data)), []
        return
    best = None
    if base is not None and layouts and base + len(data) <= len(before):
        old = before[base : base + len(data)]
        best = _changes(data, old, base, min(layouts, key=lambda name: _likely(data, old, name)))
    if best is None or len(data) < 4096 or _cost(best) > min(POOR * len(data), _weighed(data, base, before)):
        rest = [_fresh(data)] + ([] if base is None else [_prefixed(data, base, before)])
        best = min([*([] if best is None else [best]), *([one] for one in rest)], key=_cost)
    yield from best


def _weighed(data: bytes, base: int | None, before: Data) -> int:
    """Return about what a piece takes without a layout; 0 where its rows have moved, as where a token was put in."""
    from edgekit.ota.deltas import coders

    if base is None:
        return coders.weight(data)
    sight = _sight(data, base, before)[1]
    step = max(1, (len(data) - SAMPLE_BYTES) // SAMPLES)
    samples = [data[at : at + SAMPLE_BYTES] for at in range(0, len(data) - SAMPLE_BYTES, step)]
    if 2 * sum(sample in sight for sample in samples) > len(samples):
        return 0
    return min(coders.weight(data), coders.weight(data, sight))


def _cost(made: list[_Made]) -> int:
    return sum(container.length_of(record, parts) for record, parts in made)


def _fresh(data: bytes) -> _Made:
    from edgekit.ota.deltas import coders

    part, packed = coders.pack(data)
    return Fresh(part), [packed]


def _prefixed(data: bytes, base: int, before: Data) -> _Made:
    from edgekit.ota.deltas import coders

    start, sight = _sight(data, base, before)
    part, packed = coders.pack(data, sight)
    if part.size == part.length:
        return Fresh(part), [packed]
    return Prefixed(start, len(sight), part), [packed]


def _sight(data: bytes, base: int, before: Data) -> tuple[int, bytes]:
    """Return the old bytes around a place, and where they begin."""
    wide = min(SIGHT_BYTES, 4 * len(data) + NEAR_BYTES)
    start = max(0, min(base - (wide - len(data)) // 2, len(before) - wide))
    return start, before[start : start + wide]


def _changes(data: bytes, old: bytes, base: int, name: str) -> list[_Made]:
    from edgekit.ota.deltas.layouts import LAYOUTS, NUMBERS

    layout = LAYOUTS[NUMBERS[name]]
    whole = len(data) // layout.size * layout.size
    made = [_change(data[:whole], old[:whole], base, name)] if whole else []
    if whole < len(data):
        made.append(_change(data[whole:], old[whole:], base + whole, "bytes"))
    return made


def _change(data: bytes, old: bytes, base: int, name: str) -> _Made:
    from edgekit.ota.deltas import coders, layouts

    layout = layouts.LAYOUTS[layouts.NUMBERS[name]]
    fields, parts = [], []
    for way, planes in _left(data, old, layout):
        packed = [coders.pack_plane(plane) for plane in planes]
        fields.append(Left(way, tuple(plane for plane, _ in packed)))
        parts += [part for _, own in packed for part in own]
    return Change(base, len(data), layouts.NUMBERS[name], tuple(fields)), parts


def _left(data: bytes, old: bytes, layout: Layout) -> Iterator[tuple[int, list[NDArray[Any]]]]:
    """Choose for each field the way that leaves least, and give the planes of what it leaves."""
    from edgekit.ota.deltas import coders, layouts, residuals

    before, after = layouts.cut(layout, old), layouts.cut(layout, data)
    for index, field in enumerate(layout.fields):
        if (before[index] == after[index]).all():
            yield residuals.SAME, []
            continue
        tries = {
            way: coders.planes(residuals.take(way, layout, before, after, index=index), field.bits)
            for way in residuals.ways(layout, index)
        }
        yield min(tries.items(), key=lambda one: _weight(one[1]))


def _weight(planes: Iterable[NDArray[Any]]) -> float:
    """Return about how many bytes planes take: gaps pack as their frequencies say, zstd finds what repeats."""
    from edgekit.ota.deltas import coders

    return sum(min(_entropy([plane]) / 8, coders.weight(plane.tobytes())) for plane in planes)


def _likely(data: bytes, old: bytes, name: str) -> float:
    """Return about how many bits the bytes would take in a layout."""
    from edgekit.ota.deltas import layouts

    layout = layouts.LAYOUTS[layouts.NUMBERS[name]]
    whole = len(data) // layout.size * layout.size
    return sum(_entropy(planes) for _, planes in _left(data[:whole], old[:whole], layout)) if whole else 0.0


def _entropy(planes: Iterable[NDArray[Any]]) -> float:
    """Return how many bits planes take by their frequencies: what packing comes near."""
    import numpy as np

    total = 0.0
    for plane in planes:
        counts = np.bincount(plane, minlength=256)
        shares = counts[counts > 0] / len(plane)
        total -= len(plane) * float((shares * np.log2(shares)).sum())
    return total


def _joined(records: Iterable[_Made]) -> Iterator[_Made]:
    """Make one of copies that stand side by side in both files."""
    waiting: Copy | None = None
    for record, parts in records:
        if waiting is not None and isinstance(record, Copy) and waiting.base + waiting.length == record.base:
            waiting = Copy(waiting.base, waiting.length + record.length)
            continue
        if waiting is not None:
            yield waiting, []
        waiting = record if isinstance(record, Copy) else None
        if waiting is None:
            yield record, parts
    if waiting is not None:
        yield waiting, []
