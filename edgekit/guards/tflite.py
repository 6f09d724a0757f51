"""LiteRT: every offset, index and buffer of the flatbuffer lies within it, or within a listed file beside it.

Schema: https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.guards import Damaged, ModelFile
from edgekit.guards._flatbuffer import Flatbuffer

if TYPE_CHECKING:
    from edgekit.guards import Guard
    from edgekit.guards._flatbuffer import Slot

IDENTIFIER = b"TFL3"
SCHEMA: dict[str, dict[int, Slot]] = {
    "model": {
        0: 4, 1: ("code",), 2: ("subgraph",), 3: "text", 4: ("buffer",), 5: (4,), 6: ("metadata",), 7: ("signature",),
        8: ("group",), 9: ("external",),
    },
    "code": {0: 1, 1: "text", 2: 4, 3: 4},
    "subgraph": {0: ("tensor",), 1: (4,), 2: (4,), 3: ("operator",), 4: "text", 5: 4},
    "tensor": {
        0: (4,), 1: 1, 2: 4, 3: "text", 4: "quantization", 5: 1, 6: "sparsity", 7: (4,), 8: 1, 9: ("shape",), 10: 4,
    },
    "quantization": {0: (4,), 1: (4,), 2: (4,), 3: (8,), 4: 1, 5: "union", 6: 4},
    "sparsity": {0: (4,), 1: (4,), 2: ("dimension",)},
    "dimension": {0: 1, 1: 4, 2: 1, 3: "union", 4: 1, 5: "union"},
    "shape": {0: (4,), 1: 1, 2: 1},
    "operator": {
        0: 4, 1: (4,), 2: (4,), 3: 1, 4: "union", 5: (1,), 6: 1, 7: (1,), 8: (4,), 9: 8, 10: 8, 11: 1, 12: "union",
        13: 4,
    },
    "buffer": {0: (1,), 1: 8, 2: 8},
    "metadata": {0: "text", 1: 4},
    "signature": {0: ("entry",), 1: ("entry",), 2: "text", 4: 4},
    "entry": {0: "text", 1: 4},
    "group": {0: "text"},
    "external": {0: 4, 1: 4, 2: 8, 3: 8, 4: "text"},
}  # fmt: skip
BEHIND = 1
"""A buffer's offset above this is one into the file, behind the flatbuffer; 0 and 1 mean that there is none."""


class _Look:
    """Looks at the numbers that a table holds: where they point into the file, or into a vector of the model's."""

    def __init__(self, file: ModelFile, flat: Flatbuffer, end: int) -> None:
        self._file = file
        self._flat = flat
        self._end = end
        model = flat.slots(flat.root())
        counted = {"code": 1, "subgraph": 2, "buffer": 4}
        self._count = {name: len(flat.tables(model[slot])) if slot in model else 0 for name, slot in counted.items()}
        self._groups = [self._group(place) for place in flat.tables(model[8])] if 8 in model else []

    def see(self, name: str, at: int, slots: dict[int, int]) -> None:
        """Look at one table."""
        look = getattr(self, f"_{name}", None)
        if look is not None and name != "group":
            look(at, slots)

    def _number(self, slots: dict[int, int], slot: int, width: int = 4) -> int:
        return self._flat.unsigned(slots[slot], width) if slot in slots else 0

    def _below(self, at: int, value: int, of: str) -> None:
        if value >= self._count[of]:
            raise Damaged(at, f"{of} {value} is named, the file has {self._count[of]}")

    def _within(self, at: int, offset: int, size: int) -> None:
        if offset > BEHIND and offset + size > self._end:
            raise Damaged(at, f"{size} bytes are told at {offset}, the file has {self._end}")

    def _tensor(self, at: int, slots: dict[int, int]) -> None:
        self._below(at, self._number(slots, 2), "buffer")

    def _metadata(self, at: int, slots: dict[int, int]) -> None:
        self._below(at, self._number(slots, 1), "buffer")

    def _buffer(self, at: int, slots: dict[int, int]) -> None:
        self._within(at, self._number(slots, 1, 8), self._number(slots, 2, 8))

    def _operator(self, at: int, slots: dict[int, int]) -> None:
        self._below(at, self._number(slots, 0), "code")
        self._within(at, self._number(slots, 9, 8), self._number(slots, 10, 8))

    def _subgraph(self, at: int, slots: dict[int, int]) -> None:
        """Look at which tensors are named: by the graph's own ends, and by its operators; -1 is none."""
        tensors = len(self._flat.tables(slots[0])) if 0 in slots else 0
        named = [slots[slot] for slot in (1, 2) if slot in slots]
        for place in self._flat.tables(slots[3]) if 3 in slots else ():
            operator = self._flat.slots(place)
            named += [operator[slot] for slot in (1, 2, 8) if slot in operator]
        for slot in named:
            for number in self._flat.numbers(slot):
                if not -1 <= number < tensors:
                    raise Damaged(at, f"tensor {number} is named, the graph has {tensors}")

    def _signature(self, at: int, slots: dict[int, int]) -> None:
        self._below(at, self._number(slots, 4), "subgraph")

    def _group(self, place: int) -> tuple[str, int]:
        slots = self._flat.slots(place)
        name = self._flat.text(slots[0]) if 0 in slots else b""
        return name.decode(errors="replace"), place

    def _external(self, at: int, slots: dict[int, int]) -> None:
        group = self._number(slots, 1)
        if group >= len(self._groups):
            raise Damaged(at, f"group {group} of buffers is named, the file has {len(self._groups)}")
        name, place = self._groups[group]
        size, offset, length = self._file.size_of(name, place), *(self._number(slots, slot, 8) for slot in (2, 3))
        if offset + length > size:
            raise Damaged(at, f"it reads {length} bytes at {offset} of {name!r}, which has {size}")


def check(file: ModelFile) -> None:
    """Look at a LiteRT file; see `Guard`."""
    with file.mapped() as data:
        if data[4:8] != IDENTIFIER:
            raise Damaged(4, "this is no LiteRT file")
        flat = Flatbuffer(data, SCHEMA)
        flat.verify("model", flat.root(), _Look(file, flat, len(data)).see)


PLUGIN: Guard = check
