"""ONNX: every tensor that lies elsewhere lies in a listed file beside the graph, within it; nothing else is read.

Walks the graph, its subgraphs, functions and sparse tensors. Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.guards import Damaged, ModelFile, number
from edgekit.guards._protobuf import MOST_DEPTH, Wire

if TYPE_CHECKING:
    from edgekit.guards import Guard

MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "operator", 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
ONCE = {("model", 7), ("training", 1), ("training", 2), ("attribute", 5), ("attribute", 6), ("attribute", 22),
        ("sparse", 1), ("sparse", 2)}  # fmt: skip
"""Told twice, parsers merge the two: what each half hides would only be seen in the whole."""
EXTERNAL_DATA, DATA_LOCATION = 13, 14
KEYS = {b"location", b"offset", b"length", b"checksum"}
READS_FILES = {b"EPContext"}
"""Operators that name a compiled file by a path in an attribute; no exporter of ours writes one."""
MOST_KEY = 4096


class _Walk:
    def __init__(self, file: ModelFile, wire: Wire) -> None:
        self._file = file
        self._wire = wire

    def message(self, kind: str, start: int, end: int, depth: int = 0) -> int:
        """Look into a message and all below it; return how many graphs it holds itself."""
        if depth > MOST_DEPTH:
            raise Damaged(start, f"more than {MOST_DEPTH} messages in each other")
        inside = MESSAGES[kind]
        seen: set[int] = set()
        for field, at, stop in self._wire.fields(start, end, inside):
            if stop < 0:
                continue  # a number under a message's field is unknown to protobuf
            if field in seen and (kind, field) in ONCE:
                raise Damaged(at, f"a {kind} tells its field {field} twice")
            seen.add(field)
            below = inside[field]
            if below == "tensor":
                self._tensor(at, stop)
            elif below == "operator":
                self._operator(at, stop)
            else:
                self.message(below, at, stop, depth + 1)
        return len(seen & {7}) if kind == "model" else 0

    def _operator(self, at: int, stop: int) -> None:
        name = bytes(self._wire.data[at : min(stop, at + MOST_KEY)])
        if name in READS_FILES:
            raise Damaged(at, f"the operator {name.decode()} would read a file by its path")

    def _tensor(self, start: int, end: int) -> None:
        told: dict[bytes, tuple[bytes, int]] = {}
        is_external = False
        for field, at, stop in self._wire.fields(start, end, (EXTERNAL_DATA, DATA_LOCATION)):
            if field == DATA_LOCATION and stop < 0:
                is_external = at == 1
            elif field == EXTERNAL_DATA and stop >= 0:
                key, value = self._entry(at, stop)
                if key in told or key not in KEYS:
                    raise Damaged(at, f"a tensor's external data tell {key[:40]!r}" + " twice" * (key in told))
                told[key] = value, at
        if is_external or told:
            self._elsewhere(told, start)

    def _entry(self, start: int, end: int) -> tuple[bytes, bytes]:
        texts = {1: b"", 2: b""}
        for field, at, stop in self._wire.fields(start, end, texts):
            if stop - at > MOST_KEY:
                raise Damaged(at, f"a text of {stop - at} bytes where a name belongs")
            texts[field] = bytes(self._wire.data[at:stop]) if stop >= 0 else texts[field]
        return texts[1], texts[2]

    def _elsewhere(self, told: dict[bytes, tuple[bytes, int]], at: int) -> None:
        location, at = told.get(b"location", (b"", at))
        try:
            size = self._file.size_of(location.decode(), at)
        except UnicodeDecodeError as error:
            raise Damaged(at, f"the name {location[:80]!r} is no text") from error
        offset, length = (number(*told[key]) if key in told else 0 for key in (b"offset", b"length"))
        if offset + length > size:
            raise Damaged(at, f"it reads {length} bytes at {offset} of {location.decode()!r}, which has {size}")


def check(file: ModelFile) -> None:
    """Look at an ONNX file; see `Guard`."""
    if file.path.suffix == ".ort":
        raise Damaged(0, "ONNX Runtime would read a .ort file by another format")
    with file.mapped() as data:
        if not _Walk(file, Wire(data)).message("model", 0, len(data)):
            raise Damaged(0, "this is no ONNX model: it has no graph")


PLUGIN: Guard = check
