"""Finds the tensors in a file of weights, and the like of each in another file. A file a format beside this one.

Every parser is bounded by the file it reads. What none of them knows, or what is damaged, has no tensors: it is one
stretch of bytes. Reads no disk and computes with no weight.
"""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from typing import TYPE_CHECKING

from edgekit.ota.deltas.locating import gguf, litert, onnx, safetensors
from edgekit.ota.deltas.locating.tensor import Data, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

__all__ = ["UNKNOWN", "Data", "Tensor", "apart", "beside", "matched", "tensors"]

UNKNOWN = ("bytes", "16 bits", "32 bits")
"""What is tried on bytes that no parser knows."""
LEAST = 64
"""Shorter tensors are left among the bytes around them."""
_DAMAGED = (ValueError, IndexError, KeyError, OverflowError, struct.error)


def tensors(data: Data) -> list[Tensor]:
    """List a file's tensors; none where nobody knows the format, or the file is damaged."""
    parsers = ((m.is_mine, m.tensors) for m in (gguf, litert, safetensors, onnx))
    found = next((tensors for is_mine, tensors in parsers if is_mine(data)), None)
    try:
        return found(data) if found else []
    except _DAMAGED:
        return []


def beside(data: Data) -> dict[str, list[Tensor]]:
    """List the tensors that an ONNX file keeps in other files, by their paths from its folder."""
    try:
        return onnx.external(data) if onnx.is_mine(data) else {}
    except _DAMAGED:
        return {}


def apart(found: Iterable[Tensor], length: int) -> list[Tensor]:
    """Return the tensors in the order of their bytes, without those that overlap, leave the file or are short."""
    kept: list[Tensor] = []
    end = 0
    for tensor in sorted(found, key=lambda one: (one.start, -one.size)):
        if tensor.start >= end and LEAST <= tensor.size <= length - tensor.start:
            kept.append(tensor)
            end = tensor.start + tensor.size
    return kept


def matched(old: Iterable[Tensor], new: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Say which old tensor each new one is like: by name, type and shape, else type and shape in turn, else by name."""
    keys: list[Callable[[Tensor], Hashable]] = [
        lambda one: (one.name, one.layout, one.shape, one.size),
        lambda one: (one.layout, one.shape, one.size),
        lambda one: one.name,
    ]
    pairs: dict[Tensor, Tensor] = {}
    left = list(old)
    for key in keys:
        offered: dict[Hashable, deque[Tensor]] = defaultdict(deque)
        for one in left:
            offered[key(one)].append(one)
        for one in new:
            if one not in pairs and offered[key(one)]:
                pairs[one] = offered[key(one)].popleft()
        left = [one for queue in offered.values() for one in queue]
    return pairs
