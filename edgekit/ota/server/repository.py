"""Hands out the public half of a fleet folder, block by block. Never opens a key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.ota import blocks
from edgekit.ota.server import bucket

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.messages import Block, BlockRequest


def read_block(folder: Path, request: BlockRequest) -> Block:
    """Answer one request out of ``folder/repository``, else the bucket; a missing file is ``Block(error="not found")``.

    Links, traversal and anything but a regular file count as missing: the keys lie next door.

    Raises:
        TransferError: the bucket cannot be reached.
    """
    block = blocks.read(folder / "repository", request)
    if block.error != blocks.NOT_FOUND:
        return block
    store = bucket.of(folder)
    return store.read(request) if store else block
