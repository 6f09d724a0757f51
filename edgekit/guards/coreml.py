"""Core ML: a package's items lie within it and are listed, and so do the blobs that its program reads.

Schemas: `Manifest.json` of a package, and Model.proto and MIL.proto of coremltools.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from edgekit.guards import Damaged, ModelFile
from edgekit.guards._protobuf import MOST_DEPTH, Wire

if TYPE_CHECKING:
    from edgekit.guards import Guard

MOST_BYTES = 1 << 20
MODEL_PATH = "@model_path/"
MESSAGES: dict[str, dict[int, str]] = {
    "model": {200: "holder", 201: "holder", 202: "pipeline", 502: "program", 555: "elsewhere", 556: "elsewhere"},
    "holder": {1: "pipeline"},
    "pipeline": {1: "model"},
    "program": {2: "functions", 4: "values"},
    "functions": {2: "function"},
    "function": {3: "blocks", 4: "values"},
    "blocks": {2: "block"},
    "block": {3: "operation", 4: "values"},
    "operation": {2: "arguments", 4: "block", 5: "values"},
    "arguments": {2: "argument"},
    "argument": {1: "binding"},
    "binding": {2: "value"},
    "values": {2: "value"},
    "value": {3: "immediate", 5: "blob"},
    "immediate": {2: "list", 3: "list", 4: "dictionary"},
    "list": {1: "value"},
    "dictionary": {1: "pair"},
    "pair": {1: "value", 2: "value"},
    "blob": {1: "name"},
}
MOST_NAME = 4096


class _Item(msgspec.Struct, frozen=True):
    path: str


class _Package(msgspec.Struct, frozen=True, rename="camel"):
    item_info_entries: dict[str, _Item]
    root_model_identifier: str


class _Walk:
    """Gathers the names of all blobs that a program reads, with where they stand."""

    def __init__(self, wire: Wire) -> None:
        self.blobs: dict[str, int] = {}
        self._wire = wire

    def message(self, kind: str, start: int, end: int, depth: int = 0) -> None:
        """Look into a message and all below it."""
        if depth > MOST_DEPTH:
            raise Damaged(start, f"more than {MOST_DEPTH} messages in each other")
        for field, at, stop in self._wire.fields(start, end, MESSAGES[kind]):
            below = MESSAGES[kind][field]
            if below == "elsewhere":
                raise Damaged(at, "a part of the model lies in the app, not in the package")
            if below == "name" and stop >= 0:
                name = bytes(self._wire.data[at : min(stop, at + MOST_NAME)]).decode(errors="replace")
                self.blobs.setdefault(name, at)
            elif stop >= 0:
                self.message(below, at, stop, depth + 1)


def _package(file: ModelFile) -> _Package:
    if file.path.stat().st_size > MOST_BYTES:
        raise Damaged(0, f"a package's list of more than {MOST_BYTES} bytes")
    try:
        return msgspec.json.decode(file.path.read_bytes(), type=_Package)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(0, f"this is no Core ML package: {error}") from error


def _check_model(file: ModelFile) -> None:
    with file.mapped() as data:
        walk = _Walk(Wire(data))
        walk.message("model", 0, len(data))
    for name, at in walk.blobs.items():
        if not name.startswith(MODEL_PATH):
            raise Damaged(at, f"{PurePosixPath(file.main).name} reads {name[:200]!r}, which is not in the package")
        file.size_of(name.removeprefix(MODEL_PATH), at)


def check(file: ModelFile) -> None:
    """Look at the package of a ``Manifest.json``; see `Guard`."""
    package = _package(file)
    folder = PurePosixPath(file.main).parent / "Data"
    held = {name for name in file.listed or () if PurePosixPath(name).is_relative_to(folder)}
    for item in package.item_info_entries.values():  # one may be a folder, and empty where there are no weights
        if item.path.startswith("/") or ".." in PurePosixPath(item.path).parts:
            raise Damaged(0, f"the package names {item.path[:200]!r}, which is not in it")
    root = package.item_info_entries.get(package.root_model_identifier)
    if root is None or str(folder / root.path) not in held:
        raise Damaged(0, "the package has no model")
    for name in sorted(held):
        if name.endswith(".mlmodel"):
            _check_model(ModelFile(file.folder, name, file.listed))


PLUGIN: Guard = check
