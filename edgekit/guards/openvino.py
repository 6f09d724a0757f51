"""OpenVINO: the graph is plain XML without entities, and its weights lie within the listed `.bin` beside it."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from xml.parsers import expat

from edgekit.guards import Damaged, ModelFile, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.guards import Guard

VERSIONS = ("10", "11")
MOST_BYTES = 256 << 20
MOST_DEPTH = 256
"""Bodies of loops lie in layers, so elements lie deep; OpenVINO goes down by recursion."""


class _Look:
    """Is called for every element."""

    def __init__(self, file: ModelFile, parser: expat.XMLParserType) -> None:
        self._file = file
        self._parser = parser
        self._depth = 0
        self._layers: list[str] = []
        self._weights = -1
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.StartDoctypeDeclHandler = self._doctype

    def _doctype(self, *_: object) -> None:
        raise Damaged(self._at, "a document type, which could define entities")

    @property
    def _at(self) -> int:
        return max(0, self._parser.CurrentByteIndex)

    def _start(self, name: str, told: Mapping[str, str]) -> None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise Damaged(self._at, f"more than {MOST_DEPTH} elements in each other")
        if self._depth == 1 and (name != "net" or told.get("version") not in VERSIONS):
            raise Damaged(self._at, f"this is no network of OpenVINO: {name[:40]!r} {told.get('version', '')[:40]}")
        if name == "layer":
            self._layers.append(told.get("type", ""))
        elif name == "data" and self._layers[-1:] == ["Const"]:
            self._constant(told)

    def _end(self, name: str) -> None:
        self._depth -= 1
        if name == "layer":
            self._layers.pop()

    def _constant(self, told: Mapping[str, str]) -> None:
        at = self._at
        offset, size = (number(told.get(key, "0").encode(), at) for key in ("offset", "size"))
        if self._weights < 0:
            self._weights = self._file.size_of(PurePosixPath(self._file.main).with_suffix(".bin").name, at)
        if offset + size > self._weights:
            raise Damaged(at, f"it reads {size} bytes at {offset} of its weights, which have {self._weights}")


def check(file: ModelFile) -> None:
    """Look at a graph; see `Guard`."""
    size = file.path.stat().st_size
    if size > MOST_BYTES:
        raise Damaged(0, f"a graph of {size} bytes, at most {MOST_BYTES} are read")
    parser = expat.ParserCreate()
    _Look(file, parser)
    try:
        with file.path.open("rb") as opened:
            parser.ParseFile(opened)
    except expat.ExpatError as error:
        raise Damaged(max(0, parser.ErrorByteIndex), f"no XML: {expat.ErrorString(error.code)}") from error


PLUGIN: Guard = check
