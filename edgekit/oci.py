"""A bundle as an OCI image layout and back, so that any container registry can hold it. Knows no registry.

Image layout 1.0.0 and image manifest 1.1 of the Open Container Initiative: the bundle's own manifest is the config
blob, each file a layer whose title is its path. Equal files are one blob. The same bundle gives the same bytes.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edgekit import bundle as bundles
from edgekit import manifest as manifests
from edgekit.durable import new_folder
from edgekit.errors import BundleError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.bundle import Bundle

Document = TypeVar("Document")

LAYOUT, INDEX, BLOBS = "oci-layout", "index.json", "blobs/sha256"
VERSION = "1.0.0"
ARTIFACT = "application/vnd.edgekit.bundle.v1"
CONFIG = "application/vnd.edgekit.bundle.manifest.v1+json"
FILE = "application/octet-stream"
IMAGE = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
TITLE, TAG = "org.opencontainers.image.title", "org.opencontainers.image.ref.name"
MAX_BYTES = 8 << 20
"""How long an index or an image manifest may be; it is checked before either is parsed."""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}
    artifact_type: str = ""


class _Image(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    config: _Descriptor
    layers: tuple[_Descriptor, ...]
    schema_version: int = 0
    media_type: str = ""
    artifact_type: str = ""
    annotations: dict[str, str] = {}


class _Index(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    manifests: tuple[_Descriptor, ...]
    schema_version: int = 0
    media_type: str = ""


def write(bundle: Bundle, folder: Path) -> str:
    """Write an opened bundle as the image layout ``folder`` in one step; return the digest of its image manifest.

    Raises:
        UsageError: ``folder`` holds something else than an image layout, which would be replaced.
    """
    if folder.exists() and not (folder / LAYOUT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is no OCI layout, so it is not replaced", "choose another folder for it")
    manifest = bundle.manifest
    told = (bundle.folder / bundles.MANIFEST).read_bytes()
    layers = tuple(_Descriptor(FILE, f"sha256:{e.sha256}", e.size, {TITLE: e.path}) for e in manifest.files)
    named = {TITLE: manifest.name, "org.opencontainers.image.version": manifest.version}
    image = _encoded(_Image(_described(CONFIG, told), layers, 2, IMAGE, ARTIFACT, named))
    tag = re.sub(r"[^A-Za-z0-9._-]", "-", manifest.version)
    entry = msgspec.structs.replace(_described(IMAGE, image), annotations={TAG: tag}, artifact_type=ARTIFACT)
    with new_folder(folder) as scratch:
        blobs = scratch / BLOBS
        blobs.mkdir(parents=True)
        for file in manifest.files:
            shutil.copyfile(bundle.path(file.path), blobs / file.sha256)
        for data in (told, image):
            (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
        (scratch / LAYOUT).write_bytes(_encoded({"imageLayoutVersion": VERSION}))
        (scratch / INDEX).write_bytes(_encoded(_Index((entry,), 2, IMAGE_INDEX)))
    return entry.digest


def read(layout: Path, folder: Path, tag: str = "") -> Bundle:
    """Write the bundle that an image layout holds into ``folder`` in one step, every byte checked.

    ``tag`` chooses where the layout holds several.

    Raises:
        UsageError: no layout there, no such tag, several and none chosen, or ``folder`` holds something else.
        BundleError: a blob is missing or not what its digest says, or it is no bundle of edgekit.
    """
    if not (layout / LAYOUT).is_file():
        raise UsageError(f"{layout} is no OCI layout: it has no {LAYOUT}", "give the folder that oras or skopeo wrote")
    bundles.refuse_foreign(folder)
    entry = _chosen(layout, _decoded((layout / INDEX), _Index), tag)
    image = _decoded(_blob(layout, entry), _Image)
    if image.config.media_type != CONFIG:
        raise BundleError(f"{entry.digest} is no bundle of edgekit: its config is {image.config.media_type!r}")
    if image.config.size > manifests.MAX_MANIFEST_BYTES:
        raise BundleError(f"the manifest in {layout} is longer than {manifests.MAX_MANIFEST_BYTES} bytes")
    sealed = manifests.decode(_blob(layout, image.config).read_bytes())
    sources = {}
    for file in sealed.files:
        sources[file.path] = _blob(layout, _Descriptor(FILE, f"sha256:{file.sha256}", file.size))
    made = bundles.seal(folder, sealed, sources)
    if f"sha256:{made.digest}" != image.config.digest:
        raise BundleError(f"{layout} holds a manifest that is not in edgekit's canonical form", "export it again")
    return made


def _chosen(layout: Path, index: _Index, tag: str) -> _Descriptor:
    tags = [entry.annotations.get(TAG, "") for entry in index.manifests]
    found = [entry for entry, its in zip(index.manifests, tags, strict=True) if not tag or its == tag]
    if len(found) != 1:
        what = f"no image tagged {tag!r}" if tag and not found else f"{len(index.manifests)} images"
        raise UsageError(f"{layout} holds {what}", f"choose one of: {', '.join(filter(None, tags)) or 'none'}")
    return found[0]


def _blob(layout: Path, wanted: _Descriptor) -> Path:
    kind, _, digest = wanted.digest.partition(":")
    if kind != "sha256" or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BundleError(f"{wanted.digest!r} is no SHA-256 digest")
    path = layout / BLOBS / digest
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"the blob {digest[:12]}… is missing from {layout}", "copy the image again")
    if path.stat().st_size != wanted.size or bundles.hash_file(path) != digest:
        raise BundleError(f"the blob {digest[:12]}… is not what its digest says", "copy the image again")
    return path


def _described(kind: str, data: bytes) -> _Descriptor:
    return _Descriptor(kind, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def _encoded(document: object) -> bytes:
    return msgspec.json.encode(document, order="sorted")


def _decoded(path: Path, kind: type[Document]) -> Document:
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise BundleError(f"{path.name} is missing, or longer than {MAX_BYTES} bytes")
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path.name} is no document of an OCI layout: {error}") from error
