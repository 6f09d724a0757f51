"""What a GGUF file says of itself: its shape, the context that it was trained for, and whether it makes vectors.

What the header's bytes say is read by the guard of the format, which bounds every length by the file's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import HealthError
from edgekit.guards import Damaged, ModelFile
from edgekit.guards import gguf as guard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgekit.guards.gguf import Value


@dataclass(frozen=True)
class GgufHeader:
    """The facts by which a model is given its memory. ``context`` 0: the file does not say.

    ``kv_bytes`` is what one token takes in a cache of 16-bit keys and values; 0 where the file does not tell. Layers
    that look at a window alone (Gemma 2 and 3) take less. ``pools``: the file makes one vector of a text.
    """

    architecture: str = ""
    context: int = 0
    kv_bytes: int = 0
    pools: bool = False
    template: str = ""


def read(path: Path) -> GgufHeader:
    """Read a file's header.

    Raises:
        HealthError: it is no GGUF file, or ends within its header.
    """
    try:
        return _header(guard.read(ModelFile(path.parent, path.name)).pairs)
    except Damaged as error:
        what = f"{path.name} is no GGUF file" if error.at == 0 else f"the header of {path.name} is damaged: {error}"
        raise HealthError(what, "fetch or export the bundle again") from error


def _header(said: dict[str, Value]) -> GgufHeader:
    architecture = said.get("general.architecture")
    name = architecture if isinstance(architecture, str) else ""

    def number(key: str) -> int:
        value = said.get(f"{name}.{key}")
        return value if isinstance(value, int) else 0

    template = said.get("tokenizer.chat_template")
    return GgufHeader(
        architecture=name,
        context=number("context_length"),
        kv_bytes=2 * _kv_heads(said, name, number("block_count")) * _head_width(number),
        pools=number("pooling_type") in (1, 2, 3),  # mean, first, last; 4 ranks pairs
        template=template if isinstance(template, str) else "",
    )


def _kv_heads(said: dict[str, Value], name: str, layers: int) -> int:
    """Count the heads of keys in all layers: one number for each of them, or one a layer."""
    heads = said.get(f"{name}.attention.head_count_kv") or said.get(f"{name}.attention.head_count")
    if isinstance(heads, tuple):
        return sum(heads)
    return heads * layers if isinstance(heads, int) else 0


def _head_width(number: Callable[[str], int]) -> int:
    """Return the numbers that a head keeps of a token, key and value together."""
    heads = number("attention.head_count")
    each = number("embedding_length") // heads if heads else 0
    return (number("attention.key_length") or each) + (number("attention.value_length") or each)
