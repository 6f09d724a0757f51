"""How many conversations a language model holds at once, and how long each may be. Pure; knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.runtime.gguf_header import GgufHeader

MOST_AT_ONCE = 4
"""A processor computes two tokens for little more than one, as it reads the weights once; from four on it is busy."""
ENOUGH = 4096
"""Rather one conversation fewer than contexts shorter than this."""
LEAST, STEP = 512, 256
UNTOLD = 2048
"""The context of a file that does not say for how much it was trained."""
VECTOR_CONTEXT = 2048
"""A text becomes a vector in one piece, and the memory of that grows with the piece."""
MIB = 1 << 20


@dataclass(frozen=True)
class Room:
    """So many conversations at once, of so many tokens each; ``cache_mib`` bounds what is kept of earlier ones."""

    context: int
    at_once: int = 1
    cache_mib: int = 0


def room(header: GgufHeader, memory: int, *, threads: int, asked: int = 0) -> Room:
    """Divide an eighth of ``memory`` bytes: the same for each conversation, and as much for earlier ones together.

    A context is what the model was trained for, or what was asked, if that is less; without being asked, only what
    fits. Where not even one fits that was asked, it is given nevertheless: somebody said so.
    """
    trained = header.context or UNTOLD
    if header.pools:
        return Room(min(asked or VECTOR_CONTEXT, trained))
    budget, wanted = memory // 8, min(asked or trained, trained)
    at_once = min(MOST_AT_ONCE, max(2, threads))
    while at_once > 1 and _fitting(header, budget, at_once) < min(wanted, max(asked, ENOUGH)):
        at_once -= 1
    context = wanted if asked else min(wanted, max(LEAST, _fitting(header, budget, at_once)))
    return Room(context, at_once, max(1, -(-context * header.kv_bytes // MIB)))


def _fitting(header: GgufHeader, budget: int, at_once: int) -> int:
    """Return the tokens that each of so many conversations can have, and as many of earlier ones."""
    if not header.kv_bytes:
        return ENOUGH
    return budget // ((at_once + 1) * header.kv_bytes) // STEP * STEP
