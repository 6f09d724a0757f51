"""The ways in which Core ML stores a weight, and the bytes of each. NumPy only; knows no program and no plan.

A weight that takes few values can be a table and indices, one with many zeros a mask and the rest. Both lose nothing,
and both are seen from the weight itself, whatever made it so. Source: the constexpr operators of coremltools.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.tensors import Array

PLAIN_IOS, FIRST_IOS, JOINT_IOS = 15, 16, 18
"""The first iOS with floats, with one table or zeros left out, and with several tables or both at once."""
TABLE_IOS = {1: 16, 2: 16, 3: 18, 4: 16, 6: 16, 8: 16}
"""The first iOS by the bits of an index."""
ALIGNED = 64
"""An array starts at a multiple of these bytes in the weight file, behind a header of as many."""


class Integers(NamedTuple):
    """A weight in integers of ``bits``; ``scales`` and ``offsets`` have its rank, and one entry a block."""

    data: Array
    scales: Array
    offsets: Array | None
    bits: int


class Table(NamedTuple):
    """Indices in the shape of the weight into ``values`` [tables along each axis of the weight, 2**bits, 1]."""

    indices: Array
    values: Array
    bits: int


class Form(NamedTuple):
    """One way to store a weight, the first iOS that reads it, and the bytes that it takes in the weight file.

    ``mask`` says where the weight is not zero, if its zeros are left out.
    """

    stored: Array | Integers | Table
    ios: int
    size: int
    mask: Array | None = None

    @property
    def is_plain(self) -> bool:
        """Say whether the floats are stored as they are."""
        return self.mask is None and not isinstance(self.stored, Integers | Table)

    @property
    def told(self) -> str:
        """Say in words how the weight lies in the file."""
        stored = self.stored
        kind = "floats"
        if isinstance(stored, Integers):
            kind = f"{stored.bits}-bit integers"
        elif isinstance(stored, Table):
            kind = f"{stored.bits}-bit indices into tables"
        return kind if self.mask is None else f"{kind} without the zeros"


def shortest(floats: Array, integers: Integers | None, ios: int) -> tuple[Form, Form]:
    """Return the form of fewest bytes that an iOS reads, and the one of fewest bytes of all; the plain one on a tie.

    ``floats`` are the weight's values as the program has them, ``integers`` what a plan makes of them.
    """
    plain, *sparse = _floats(floats)
    found = [plain] if integers is None else list(_integers(integers))
    found += [*sparse, *_tables(floats)]
    return min((f for f in found if f.ios <= ios), key=_size), min(found, key=_size)


def _size(form: Form) -> int:
    return form.size


def _floats(floats: Array) -> Iterator[Form]:
    width = 8 * floats.itemsize
    yield Form(floats, PLAIN_IOS, _bytes(floats.size, width))
    mask = floats != 0
    if _has_both(mask):
        yield Form(floats, FIRST_IOS, _bytes(floats.size, 1) + _bytes(int(mask.sum()), width), mask)


def _integers(integers: Integers) -> Iterator[Form]:
    """Yield integers, legal where the program is: it was written for an iOS that has the plan's."""
    import numpy as np

    data, scales, offsets, bits = integers
    beside = _bytes(scales.size, 8 * scales.itemsize) + (0 if offsets is None else _bytes(scales.size, bits))
    yield Form(integers, FIRST_IOS, _bytes(data.size, bits) + beside)
    mask = data.astype(np.int32) != (0 if offsets is None else _spread(offsets.astype(np.int32), data.shape))
    if _has_both(mask):
        yield Form(integers, JOINT_IOS, _bytes(data.size, 1) + _bytes(int(mask.sum()), bits) + beside, mask)


def _tables(floats: Array) -> Iterator[Form]:
    """Yield the shortest tables that old systems read, that new ones read, and those without zeros."""
    import numpy as np

    values, found = np.unique(_sortable(floats), return_inverse=True)
    codes = found.reshape(floats.shape).astype(np.uint16 if len(values) < 2**16 else np.uint32)
    mask = floats != 0
    for ios, kept in ((FIRST_IOS, None), (JOINT_IOS, None), (JOINT_IOS, mask)):
        if kept is not None and not _has_both(kept):
            continue
        numbered = codes if kept is None else np.where(kept, codes, len(values))
        count = floats.size if kept is None else int(kept.sum())
        spared = 0 if kept is None else _bytes(floats.size, 1)
        cuts = [
            (spared + _bytes(count, bits) + _bytes(tables * 2**bits, 8 * floats.itemsize), axis, tables, bits)
            for axis, tables, bits in _cuts(numbered, len(values), ios)
        ]
        if cuts:
            size, axis, tables, bits = min(cuts)
            yield Form(_table(floats, kept, axis=axis, tables=tables, bits=bits), ios, size, kept)


def _cuts(codes: Array, none: int, ios: int) -> Iterator[tuple[int, int, int]]:
    """Yield along which axis a weight can be cut into how many tables of how many bits.

    The code ``none`` needs no entry. One table, or one for each run of outputs, which lie on one of the first two axes.
    """
    import numpy as np

    for axis in range(2 if ios >= JOINT_IOS else 1):
        channels = codes.shape[axis]
        for tables in range(channels, 0, -1) if ios >= JOINT_IOS else (1,):
            if channels % tables or (axis and tables == 1):
                continue
            rows = np.sort(np.moveaxis(codes, axis, 0).reshape(tables, -1), axis=1, kind="stable")
            used = 1 + (np.diff(rows, axis=1) != 0).sum(axis=1) - (rows[:, -1] == none)
            bits = next((b for b, first in TABLE_IOS.items() if first <= ios and 2**b >= used.max()), None)
            if bits is not None:
                yield axis, tables, bits
            elif tables == channels:
                break  # a run of several channels has no fewer values than one


def _table(floats: Array, kept: Array | None, *, axis: int, tables: int, bits: int) -> Table:
    """Make the tables: the values of each run in order, the last repeated up to the end."""
    import numpy as np

    moved = np.moveaxis(floats, axis, 0)
    rows = moved.reshape(tables, -1)
    masks = np.ones_like(rows, bool) if kept is None else np.moveaxis(kept, axis, 0).reshape(rows.shape)
    found = [_values(row[mask]) if mask.any() else row[:1] for row, mask in zip(rows, masks, strict=True)]
    indices = [np.searchsorted(own, row).clip(0, len(own) - 1) for own, row in zip(found, rows, strict=True)]
    values = np.stack([np.pad(own, (0, 2**bits - len(own)), mode="edge") for own in found])
    shape = [tables if n == axis else 1 for n in range(floats.ndim)]
    cut = np.stack(indices).reshape(moved.shape)
    return Table(np.moveaxis(cut, 0, axis).astype(np.uint8), values.reshape(*shape, 2**bits, 1), bits)


def _values(floats: Array) -> Array:
    """Return the different values in order."""
    import numpy as np

    return np.unique(_sortable(floats)).astype(floats.dtype)


def _sortable(floats: Array) -> Array:
    """Return the same numbers as NumPy sorts them rightly: 2.3 leaves halves unsorted on x86 with AVX-512 VBMI2."""
    return floats.astype("f4") if floats.dtype == "f2" else floats


def _has_both(mask: Array) -> bool:
    return bool(mask.any() and not mask.all())


def _spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Repeat the entry of each block along all axes."""
    import numpy as np

    for axis, size in enumerate(shape):
        blocks = np.repeat(blocks, size // blocks.shape[axis], axis)
    return blocks


def _bytes(count: int, bits: int) -> int:
    return ALIGNED * (1 + math.ceil(count * bits / 8 / ALIGNED))
