"""Opens a GGUF file for its tensors and single values. Skips lists: tokens and merges make up most of the header.

The package gguf makes several objects of each entry of a list; 50,000 tokens take it seconds and a hundred MiB.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING, Any

from edgekit.plugins import extra

if TYPE_CHECKING:
    from pathlib import Path


def opened(path: Path) -> Any:  # noqa: ANN401  # gguf's reader is untyped here
    """Return gguf's reader of a file; its fields that are lists have no contents.

    Raises:
        ValueError, KeyError, IndexError, OSError: the file is damaged.
        MissingExtra: gguf is not installed.
    """
    return _reader()(path)


@cache
def _reader() -> Any:  # noqa: ANN401  # a class of a package that is imported here only
    with extra("export"):
        import gguf
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is untyped here
        """Where gguf renames the method, its own is called: slower, with the same answer."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:  # noqa: ANN401  # as gguf's own
            if raw_type != kinds.ARRAY or self.byte_order == "S":
                return super()._get_field_parts(orig_offs, raw_type)
            raw_kind, count = self._get(orig_offs, "uint32"), self._get(orig_offs + 4, "uint64")
            kind, at = kinds(int(raw_kind[0])), orig_offs + 12
            if kind == kinds.STRING:
                at = _behind_strings(memoryview(self.data), at, int(count[0]))
            elif kind in self.gguf_scalar_to_np:
                at += int(count[0]) * self.gguf_scalar_to_np[kind]().itemsize
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return at - orig_offs, [raw_kind, count], [], [kinds.ARRAY, kind]

    return Reader


def _behind_strings(data: memoryview, at: int, count: int) -> int:
    """Return where a list of strings ends, each behind its length as uint64."""
    try:
        for _ in range(count):
            at += 8 + struct.unpack_from("<Q", data, at)[0]
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a list of {count} strings leaves the file") from error
    return at
