"""Reads the `.npy` files of a bundle: plain numbers, as many as the file holds, whatever its header promises."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from edgekit.errors import BundleError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from edgekit.tensors import Array

_LENGTHS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4, b"\x93NUMPY\x03\x00": 4}
"""How wide the header's length is, by what a file begins with."""
_HEADER = re.compile(
    rb"\{'descr': '[<>|](?P<kind>[biufcSU])(?P<width>[0-9]{1,9})', 'fortran_order': (True|False), "
    rb"'shape': \((?P<shape>[0-9, ]*)\), \} *\n"
)
MOST_HEADER = 4096


def read(path: Path) -> Array:
    """Read one array, and never a pickle; an archive is none either.

    Raises:
        BundleError: the file holds no array, or not as many numbers as it says.
    """
    with extra("device"):
        import numpy as np
    try:
        with path.open("rb") as file:
            _require_numbers(file, path.stat().st_size)
            array: Array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BundleError(f"{path.name} is no .npy file: {error}", "export the bundle again") from error
    return array


def _require_numbers(file: BinaryIO, size: int) -> None:
    """Compare the header with the file's length: NumPy makes room for what is told before it reads.

    Read is what NumPy writes and nothing like it: its own parser takes Python's literals, and fails in many ways.
    """
    start = file.read(8)
    length = int.from_bytes(file.read(_LENGTHS.get(start, 0)), "little")
    found = _HEADER.fullmatch(file.read(min(length, MOST_HEADER)))
    if found is None:
        raise ValueError("its header tells of no plain numbers: objects are pickled, and not read")
    width = int(found["width"]) * (4 if found["kind"] == b"U" else 1)
    told = math.prod(int(axis) for axis in found["shape"].split(b",") if axis.strip()) * width
    if told != size - file.tell():
        raise ValueError(f"its header tells of {told} bytes, {size - file.tell()} follow")
    file.seek(0)
