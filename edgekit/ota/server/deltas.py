"""Makes the deltas of a release from the files of those before it. Sees no key: who signs them is the publisher."""

from __future__ import annotations

import difflib
import logging
import mmap
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edgekit import manifest as manifests
from edgekit.bundle import hash_file
from edgekit.durable import sync_folder
from edgekit.errors import BundleError, UnknownName
from edgekit.ota.deltas import applying, locating, making
from edgekit.ota.deltas.listing import Delta
from edgekit.ota.deltas.making import Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgekit.manifest import FileEntry
    from edgekit.ota.release import Release
    from edgekit.progress import Progress

log = logging.getLogger(__name__)

LEAST_BYTES = 4096
"""Shorter files are fetched whole: a delta and its entry in the list would not be shorter."""
NEAR_NAMES = 0.6
"""Files under other paths are taken for the same if their names are so much alike, and neither is twice the other."""

Made = dict[tuple[str, str], Delta | None]


def make(
    repository: Path, release: Release, older: Iterable[Release], made: Made, *, progress: Progress
) -> list[Delta]:
    """Make the deltas from the files of ``older`` releases to those of ``release``; every one is tried out.

    Each becomes ``deltas/<sha256>`` in the repository. ``made`` remembers pairs of files over several calls, with None
    where a delta does not pay.
    """
    new = _files(repository, release)
    found: dict[tuple[str, str], Delta] = {}
    for one in older:
        old = _files(repository, one)
        kept = {entry.sha256 for entry in old}
        for entry in new:
            like = _like(entry, old)
            if like is None or entry.size < LEAST_BYTES or entry.sha256 in kept:
                continue
            pair = (like.sha256, entry.sha256)
            if pair not in made:
                made[pair] = _delta(repository, _source(repository, like, old), entry, new, progress=progress)
            if (delta := made[pair]) is not None:
                found[pair] = delta
    return list(found.values())


def _files(repository: Path, release: Release) -> tuple[FileEntry, ...]:
    path = PurePosixPath(release.path)
    signed = repository / "targets" / path.parent / f"{release.bundle}.{path.name}"
    try:
        manifest = manifests.decode(signed.read_bytes())
        return tuple({e.path: e for variant in release.order for e in manifest.files_of(variant)}.values())
    except (BundleError, UnknownName, OSError) as error:
        log.warning("no deltas from %s: %s", release.path, error)
        return ()


def _like(entry: FileEntry, old: Sequence[FileEntry]) -> FileEntry | None:
    """Find the file that an entry replaces: of the same path, else of nearly the same name and size."""
    for one in old:
        if one.path == entry.path:
            return one
    near = [
        (difflib.SequenceMatcher(None, one.path, entry.path).ratio(), one)
        for one in old
        if PurePosixPath(one.path).suffix == PurePosixPath(entry.path).suffix
        and one.size <= 2 * entry.size <= 4 * one.size
    ]
    likeness, best = max(near, key=lambda pair: pair[0], default=(0.0, None))
    return best if likeness >= NEAR_NAMES else None


def _source(repository: Path, entry: FileEntry, files: Sequence[FileEntry]) -> Source:
    """Return a file with the tensors that an ONNX file of the same bundle says it holds."""
    folder = PurePosixPath(entry.path).parent
    for graph in files:
        if PurePosixPath(graph.path).parent == folder and graph.path.endswith(".onnx") and graph.path != entry.path:
            tensors = _beside(_blob(repository, graph)).get(PurePosixPath(entry.path).name)
            if tensors:
                return Source(_blob(repository, entry), tuple(tensors))
    return Source(_blob(repository, entry))


def _beside(graph: Path) -> dict[str, list[locating.Tensor]]:
    try:
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return locating.beside(data)
    except (OSError, ValueError):  # it is missing or empty
        return {}


def _blob(repository: Path, entry: FileEntry) -> Path:
    return repository / "blobs" / entry.sha256


def _delta(
    repository: Path, base: Source, entry: FileEntry, files: Sequence[FileEntry], *, progress: Progress
) -> Delta | None:
    """Make one delta, apply it, and keep it if it gives the new file."""
    digest = base.path.name
    if not base.path.is_file() or hash_file(base.path) != digest:
        log.warning("no delta from %s: the repository has lost that file", digest[:12])
        return None
    place = repository / "deltas"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix=".deltas.") as scratch:
        file = Path(scratch) / "delta"
        with file.open("wb") as out:
            size = making.make(base, _source(repository, entry, files), out, name=entry.path, progress=progress)
            out.flush()
            os.fsync(out.fileno())
        if size is None:
            return None
        applying.apply(file, base.path, entry, Path(scratch) / "new")
        sha256 = hash_file(file)
        file.replace(place / sha256)
    sync_folder(place)
    return Delta(base=digest, new=entry.sha256, sha256=sha256, size=size)
