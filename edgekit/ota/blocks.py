"""Reads one block of a repository folder. Follows no link, leaves the folder never, knows no network."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from edgekit.ota.messages import Block

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.messages import BlockRequest

NOT_FOUND = "not found"


def read(repository: Path, request: BlockRequest) -> Block:
    """Return the bytes asked for; ``Block(error=…)`` where there are none to give.

    An offset at or behind the end gives an empty block with the true total.
    """
    parts = request.path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return Block(error=NOT_FOUND)
    root = repository.resolve()
    path = root.joinpath(*parts)
    try:
        if path.resolve(strict=True) != path:  # a link somewhere on the way could lead to the keys
            return Block(error=NOT_FOUND)
        return _read_regular(path, request)
    except (FileNotFoundError, NotADirectoryError):
        return Block(error=NOT_FOUND)
    except OSError as error:
        return Block(error=f"cannot read {request.path}: {error.strerror}")


def _read_regular(path: Path, request: BlockRequest) -> Block:
    # O_NONBLOCK: opening a pipe must not hang the server; O_NOFOLLOW: a link swapped in meanwhile.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Block(error=NOT_FOUND)
        data = os.pread(descriptor, request.length, request.offset)
        return Block(total=status.st_size, data=data)
    finally:
        os.close(descriptor)
