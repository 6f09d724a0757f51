"""Blobs and deltas in an S3-compatible store, where a fleet's folder names one. Knows their names, not what is in them.

Metadata and signed targets stay files of the folder: they are small, and their order of writing is what keeps a
repository whole. A blob is called by its hash, so it never changes, and devices check it.
"""

from __future__ import annotations

import functools
import re
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from edgekit.durable import write_file
from edgekit.errors import ResourceError, TransferError, UsageError
from edgekit.ota.blocks import NOT_FOUND
from edgekit.ota.messages import Block
from edgekit.plugins import extra

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.messages import BlockRequest

FILE = "blobs.json"
RETRIES = 3
"""So often a request is made anew, within a few seconds: a step of the service waits for it."""
_NAME = re.compile(r"(blobs|deltas)/[0-9a-f]{64}")


class Noted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a fleet's folder remembers. Keys and endpoint come from the environment, as clients of S3 take them."""

    url: str


class Bucket:
    """A prefix in a bucket."""

    def __init__(self, url: str) -> None:
        """Open it; nothing is asked yet.

        Raises:
            UsageError: no address of S3.
            MissingExtra: obstore is not installed.
        """
        with extra("s3"):
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9._/-]*)?", url):
            raise UsageError(f"{url!r} is no address of a bucket", "write s3://BUCKET or s3://BUCKET/PREFIX")
        self.url = url
        self._errors = BaseError
        try:
            self._store = S3Store.from_url(
                url,
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=5)},
            )
        except BaseError as error:
            raise UsageError(f"{url} cannot be used: {_first_line(error)}", "see AWS_ENDPOINT_URL and AWS_…") from error

    def write(self, name: str, file: Path) -> None:
        """Put a file there, unless one of its name and size is there.

        Raises:
            TransferError: the store cannot be reached, or refuses it.
        """
        import obstore

        if self._size(name) == file.stat().st_size:
            return
        try:
            obstore.put(self._store, name, file)
        except self._errors as error:
            raise self._failed(f"cannot take {name}", error) from error

    def read(self, request: BlockRequest) -> Block:
        """Answer one request for a blob or a delta; see `blocks.read`."""
        import obstore

        if not _NAME.fullmatch(request.path):
            return Block(error=NOT_FOUND)
        size = _known(self, request.path)
        if size is None:
            return Block(error=NOT_FOUND)
        length = min(request.length, size - request.offset)
        if length <= 0:
            return Block(total=size, data=b"")
        try:
            data = obstore.get_range(self._store, request.path, start=request.offset, length=length)
        except self._errors as error:
            raise self._failed(f"cannot give {request.path}", error) from error
        return Block(total=size, data=bytes(data))

    def _size(self, name: str) -> int | None:
        import obstore

        try:
            return int(obstore.head(self._store, name)["size"])
        except FileNotFoundError:  # obstore's own is one, too
            return None
        except self._errors as error:
            raise self._failed(f"cannot tell of {name}", error) from error

    def _failed(self, what: str, error: Exception) -> TransferError:
        return TransferError(f"{self.url} {what}: {_first_line(error)}", "see AWS_ENDPOINT_URL, keys and the network")


@functools.lru_cache(maxsize=4096)
def _known_size(bucket: Bucket, name: str) -> int:
    size = bucket._size(name)  # noqa: SLF001  # of this module
    if size is None:
        raise FileNotFoundError(name)  # what is not there is asked for again: only sizes are kept
    return size


def _known(bucket: Bucket, name: str) -> int | None:
    try:
        return _known_size(bucket, name)
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=8)
def _opened(url: str) -> Bucket:
    return Bucket(url)


def of(folder: Path) -> Bucket | None:
    """Return the bucket that a fleet's folder names; None where its files are the store.

    Raises:
        ResourceError: the folder's note is damaged.
    """
    try:
        noted = msgspec.json.decode((folder / FILE).read_bytes(), type=Noted)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResourceError(f"{folder / FILE} is damaged: {error}", "restore a backup") from error
    return _opened(noted.url)


def note(folder: Path, url: str) -> None:
    """Have a fleet's blobs in a bucket from now on."""
    Bucket(url)
    write_file(folder / FILE, msgspec.json.encode(Noted(url)))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
