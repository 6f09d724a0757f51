"""Where a tensor lies in a file."""

from __future__ import annotations

import mmap
from typing import NamedTuple

Data = bytes | mmap.mmap
"""A file's bytes, or what maps them."""


class Tensor(NamedTuple):
    """A name, the layout of its bytes, its shape, and which bytes of the file they are."""

    name: str
    layout: str
    shape: tuple[int, ...]
    start: int
    size: int
