"""The signed files of a fleet: where they lie, who may write, and which are current. Knows no private key."""

from __future__ import annotations

import fcntl
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edgekit.durable import write_file
from edgekit.errors import ResourceError, TrustError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import Metadata, MetaFile, Root, Timestamp  # type: ignore[attr-defined]  # re-exported without __all__

ROLES = ("root", "targets", "snapshot", "timestamp")
LOCK_SECONDS = 2.0
"""So long one waits for another; the service signs a timestamp in a fraction of it."""
LIFETIME = {
    "root": timedelta(days=730),
    "targets": timedelta(days=365),
    "snapshot": timedelta(days=30),
    "timestamp": timedelta(days=7),
}


def place(folder: Path, name: str) -> Path:
    """Return where the metadata of a name, as ``3.snapshot``, lies in a fleet's folder."""
    return folder / "repository" / "metadata" / f"{name}.json"


def no_fleet(folder: Path) -> UsageError:
    """Return the error of a folder without a fleet."""
    return UsageError(f"{folder} holds no fleet", f"make one with: edgekit ota init {folder}")


def lifetime(role: str) -> timedelta:
    """Return for how long metadata of a role is signed; every role but the first four is as targets."""
    return LIFETIME.get(role, LIFETIME["targets"])


def expiry(role: str, now: datetime) -> datetime:
    """Return until when metadata of a role is good that is signed now."""
    return (now + lifetime(role)).replace(microsecond=0)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep others from writing.

    Raises:
        UsageError: there is no fleet in that folder.
        ResourceError: somebody else writes for long.
    """
    if not place(folder, "timestamp").parent.is_dir():
        raise no_fleet(folder)  # before the lock is made: a mistyped name must not leave a folder
    with (folder / ".publisher.lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _locked(lock.fileno()):
            if time.monotonic() > deadline:
                raise ResourceError(f"somebody else publishes into {folder}", "wait until it is done")
            time.sleep(0.02)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read(folder: Path, name: str, link: MetaFile | None = None) -> Metadata[Any]:
    """Read signed metadata; who may have signed it is not looked at. ``link``: what vouches for its bytes.

    Raises:
        UsageError: there is none.
        TrustError: it is damaged.
    """
    path = place(folder, name)
    try:
        return parse(path.read_bytes(), path, link)
    except FileNotFoundError as error:
        if name == "timestamp" or not place(folder, "timestamp").is_file():
            raise no_fleet(folder) from error
        raise TrustError(f"{path} is missing", "restore the repository from its backup") from error


def parse(data: bytes, path: Path, link: MetaFile | None = None) -> Metadata[Any]:
    """Make metadata of the bytes of a file; ``link``: what vouches for them.

    Raises:
        TrustError: they are none.
    """
    with extra("fleet"):
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata
    try:
        if link is not None:
            link.verify_length_and_hashes(data)
        return Metadata.from_bytes(data)
    except RepositoryError as error:
        raise TrustError(f"{path} is damaged: {error}", "restore the repository from its backup") from error


def encode(made: Metadata[Any]) -> bytes:
    """Return the bytes of signed metadata, as short as they can be."""
    from tuf.api.serialization.json import JSONSerializer

    return made.to_bytes(JSONSerializer(compact=True))


def write(folder: Path, name: str, data: bytes) -> None:
    """Replace the metadata of a name by these bytes, in one step."""
    write_file(place(folder, name), data)


def current_root(folder: Path) -> Metadata[Root]:
    """Return the newest root: devices go from 1 up to the last number without a gap, and so does this.

    Raises:
        UsageError: there is no fleet in that folder.
        TrustError: it is damaged, or one was not signed by the one before.
    """
    if not place(folder, "1.root").is_file():
        raise no_fleet(folder)
    newest: Metadata[Root] = read(folder, "1.root")
    before = None
    while True:
        signed = newest.signed
        if not signed.get_root_verification_result(before, newest.signed_bytes, newest.signatures):
            raise TrustError(f"root {signed.version} is not signed as it must be", "restore the repository's backup")
        if not place(folder, f"{signed.version + 1}.root").is_file():
            return newest
        before, newest = signed, read(folder, f"{signed.version + 1}.root")


def current_timestamp(folder: Path) -> Metadata[Timestamp]:
    """Return the timestamp, signed by keys of the newest root, or of the one before where a change was killed.

    What is published is signed anew with each publish: were it believed unseen, whoever can write into the repository
    could have the fleet's keys sign for him.

    Raises:
        UsageError: there is no fleet in that folder.
        TrustError: it is damaged, or somebody else signed it.
    """
    timestamp = read(folder, "timestamp")
    root = current_root(folder).signed
    before = [read(folder, f"{root.version - 1}.root").signed] if root.version > 1 else []
    for one in (root, *before):
        if one.get_verification_result("timestamp", timestamp.signed_bytes, timestamp.signatures):
            return timestamp
    raise TrustError(
        f"{place(folder, 'timestamp')} is not signed by the fleet's key", "restore the repository from its backup"
    )
