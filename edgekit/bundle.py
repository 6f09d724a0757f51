"""A sealed folder: a manifest and the files it lists, every byte checked. Knows no engine and no format."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit import manifest as manifests
from edgekit.durable import MIB, new_folder, no_room
from edgekit.errors import BundleError, UsageError
from edgekit.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose bytes were checked against its manifest; of one ``variant``, if that alone was read."""

    folder: Path
    manifest: Manifest
    digest: str
    variant: str = ""

    def path(self, relative: str) -> Path:
        """Return where a listed file lies."""
        return self.folder / relative

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size for entry in self.manifest.files)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, draft: Manifest, sources: Mapping[str, Path | bytes]) -> Bundle:
    """Write the bundle ``folder`` in one step from a draft manifest (its ``files`` are ignored) and its files.

    The same draft and bytes give the same digest anywhere.

    Raises:
        BundleError: a path of ``sources`` is unsafe, or the draft uses a file that it lacks; nothing was written.
        UsageError: ``folder`` holds something else than a bundle, which would be replaced.
        ResourceError: its disk has less room than the files and a MiB need.
    """
    refuse_foreign(folder)
    # Before the first write: a path such as ../x or /etc/x would land outside the folder.
    unread = tuple(FileEntry(path=relative, size=0, sha256="0" * 64) for relative in sorted(sources))
    manifests.decode(manifests.encode(msgspec.structs.replace(draft, files=unread)))
    size = sum(len(source) if isinstance(source, bytes) else source.stat().st_size for source in sources.values())
    if lack := no_room(folder, "the bundle", size + MIB):
        raise lack
    with new_folder(folder) as scratch:
        for relative, source in sources.items():
            target = scratch / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                shutil.copyfile(source, target)
        entries = tuple(_entry(scratch, relative) for relative in sorted(sources))
        data = manifests.encode(msgspec.structs.replace(draft, files=entries))
        sealed = manifests.decode(data)
        (scratch / MANIFEST).write_bytes(data)
    return Bundle(folder, sealed, hashlib.sha256(data).hexdigest())


def refuse_foreign(folder: Path) -> None:
    """Raise UsageError where sealing would replace something that is no bundle."""
    if folder.exists() and not _is_bundle(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is no bundle, so it is not replaced", "choose another folder for it")


def read(folder: Path, variant: str | None = None) -> Bundle:
    """Open a bundle and check every byte; with ``variant`` only what a device of that class holds.

    Raises:
        UsageError: there is no bundle at that path.
        BundleError: a file is missing, changed, unlisted or a link.
    """
    data = _manifest_bytes(folder)
    manifest = manifests.decode(data)
    _refuse_unlisted(folder, manifest)
    for entry in manifest.files_of(variant):
        check_file(folder, entry)
    return Bundle(folder, manifest, hashlib.sha256(data).hexdigest(), variant or "")


def read_manifest(folder: Path) -> Manifest:
    """Read what a bundle says of itself, without checking its files.

    Raises:
        UsageError: there is no bundle at that path.
        BundleError: it is no manifest.
    """
    return manifests.decode(_manifest_bytes(folder))


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} is no bundle: it has no {MANIFEST}", "make one with: edgekit export")
    if path.stat().st_size > manifests.MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is longer than {manifests.MAX_MANIFEST_BYTES} bytes")
    return path.read_bytes()


def _is_bundle(folder: Path) -> bool:
    """Look into the manifest: many a web page has a file of that name too."""
    try:
        manifests.decode((folder / MANIFEST).read_bytes())
    except (BundleError, OSError):
        return False
    return True


def check_file(folder: Path, entry: FileEntry) -> None:
    """Raise BundleError unless the listed file is there, regular, and has the listed length and hash."""
    path = folder / entry.path
    if not path.is_file():
        raise BundleError(f"{entry.path} is missing from the bundle", "fetch or export the bundle again")
    size = path.stat().st_size
    if size != entry.size or hash_file(path) != entry.sha256:
        raise BundleError(
            f"{entry.path} is not the file that was sealed ({size} bytes, sealed {entry.size})",
            "fetch or export the bundle again",
        )


def _entry(folder: Path, relative: str) -> FileEntry:
    path = folder / relative
    return FileEntry(path=relative, size=path.stat().st_size, sha256=hash_file(path))


def _refuse_unlisted(folder: Path, manifest: Manifest) -> None:
    listed = {entry.path for entry in manifest.files} | {MANIFEST}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise BundleError(f"{relative} is a link; a bundle holds plain files only")
            if name in files and relative not in listed:
                raise BundleError(f"{relative} is not listed in the manifest", "remove it, or export the bundle again")
