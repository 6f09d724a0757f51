"""Planes of small numbers as bytes: all of them, two in a byte, or the gaps between those that are not zero. Packed by
zstd where that is shorter, and unpacked into no more bytes than were announced.

A residual is mostly zeros. zstd spends no less than a bit on a byte; gaps it packs to within a few percent of what
entropy allows. Knows no field and no file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import BundleError
from edgekit.ota.deltas.container import Part, Plane
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

NOTHING, ALL, PAIRS, GAPS = range(4)
"""How a plane lies in its parts, as the wire counts: all zero, every byte, two nibbles a byte, gaps and values."""
FAR = 255
"""A gap of so many zeros, with no value behind it."""
MAX_WINDOW_BYTES = 8 << 20
LEVEL, QUICK = 19, 3
"""How hard zstd tries, and how hard where forms are only weighed: a tenth of the time, and the same order."""


def planes(symbols: NDArray[Any], bits: int) -> list[Bytes]:
    """Split symbols into their bytes, the highest first."""
    width = symbols.dtype.itemsize
    if bits <= 8:
        return [symbols.ravel().astype(np.uint8)]
    apart = np.ascontiguousarray(symbols, symbols.dtype.newbyteorder(">")).view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(apart[:, byte]) for byte in range(width)]


def symbols(found: Sequence[Bytes]) -> NDArray[Any]:
    """Join the bytes of symbols; the inverse of `planes`."""
    if len(found) == 1:
        return found[0]
    joined = np.ascontiguousarray(np.stack(found, axis=1))
    return joined.view(f">u{len(found)}").ravel().astype(f"<u{len(found)}")


def pack_plane(plane: Bytes) -> tuple[Plane, list[bytes]]:
    """Return the shortest form of a plane and the bytes of its parts."""
    used = int(np.count_nonzero(plane))
    if not used:
        return Plane(NOTHING, ()), []
    tries = [(ALL, [plane.tobytes()])]
    if used < 0.6 * len(plane):
        tries.append((GAPS, _gaps(plane)))
    if int(plane.max()) < 16:
        padded = np.append(plane, np.zeros(len(plane) % 2, np.uint8))
        tries.append((PAIRS, [(padded[::2] | padded[1::2] << 4).tobytes()]))
    form, shortest = min(tries, key=lambda one: sum(len(_compressor(QUICK).compress(data)) for data in one[1]))
    packed = [pack(data) for data in shortest]
    return Plane(form, tuple(part for part, _ in packed)), [data for _, data in packed]


def unpack_plane(plane: Plane, data: Sequence[bytes], count: int) -> Bytes:
    """Return the ``count`` bytes of a plane.

    Raises:
        BundleError: its parts do not give so many.
    """
    found = [np.frombuffer(unpack(part, one), np.uint8) for part, one in zip(plane.parts, data, strict=True)]
    match plane.form, found:
        case 0, []:
            return np.zeros(count, np.uint8)
        case 1, [every]:
            return _counted(every, count)
        case 2, [pairs]:
            return _pairs(count, pairs)
        case 3, [gaps, values]:
            return _between(count, gaps, values)
    raise BundleError(f"the delta has a plane of form {plane.form} with {len(found)} parts")


def _pairs(count: int, pairs: Bytes) -> Bytes:
    apart = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()
    return _counted(apart[: count if len(apart) == count + 1 else None], count)


def _counted(found: Bytes, count: int) -> Bytes:
    if len(found) != count:
        raise BundleError(f"a plane of the delta has {len(found)} numbers, and {count} are needed")
    return found


def _gaps(plane: Bytes) -> list[bytes]:
    places = np.flatnonzero(plane)
    between = np.diff(places, prepend=-1) - 1
    far = between // FAR
    gaps = np.full(len(places) + int(far.sum()), FAR, np.uint8)
    gaps[np.arange(len(places)) + np.cumsum(far)] = between % FAR
    return [gaps.tobytes(), plane[places].tobytes()]


def _between(count: int, gaps: Bytes, values: Bytes) -> Bytes:
    is_value = gaps != FAR
    places = np.cumsum(gaps.astype(np.int64) + is_value)[is_value] - 1
    if len(places) != len(values) or (len(places) and places[-1] >= count):
        raise BundleError("a plane of the delta leaves its field")
    found = np.zeros(count, np.uint8)
    found[places] = values
    return found


def pack(data: bytes, before: bytes = b"") -> tuple[Part, bytes]:
    """Pack bytes; ``before`` is what stands before them."""
    packed = _compressor(LEVEL, before).compress(data)
    if len(packed) >= len(data):
        return Part(len(data), len(data)), data
    return Part(len(data), len(packed)), packed


def weight(data: bytes, before: bytes = b"") -> int:
    """Return about how long bytes are once packed, in a tenth of the time that packing takes."""
    return min(len(data), len(_compressor(QUICK, before).compress(data)))


def unpack(part: Part, data: bytes, before: bytes = b"") -> bytes:
    """Return the bytes that a part announces.

    Raises:
        BundleError: they are more, fewer, or none at all.
    """
    if part.size == part.length:
        return data
    with extra("device"):
        import zstandard
    try:
        told = zstandard.get_frame_parameters(data)
        if told.content_size != part.length or told.window_size > MAX_WINDOW_BYTES:
            raise BundleError(f"a part of the delta unpacks to {told.content_size} bytes, not to {part.length}")
        opener = zstandard.ZstdDecompressor(dict_data=_dictionary(before), max_window_size=MAX_WINDOW_BYTES)
        found: bytes = opener.decompress(data, max_output_size=part.length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BundleError(f"a part of the delta cannot be unpacked: {error}") from error
    return found


def _compressor(level: int, before: bytes = b"") -> Any:  # noqa: ANN401  # zstandard's own class, imported here only
    with extra("device"):
        import zstandard
    return zstandard.ZstdCompressor(level=level, dict_data=_dictionary(before), write_checksum=False)


def _dictionary(before: bytes) -> Any:  # noqa: ANN401  # as above
    import zstandard

    return zstandard.ZstdCompressionDict(before, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if before else None
