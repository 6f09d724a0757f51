"""How a repository is verified: walked as a device would, from its root of trust to the last byte of every file."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import BundleError, EdgekitError, TransferError, TrustError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from tuf.api.metadata import Root, Signed, Targets  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.ngclient.updater import Updater

    from edgekit.ota.server.draft import Draft

RELEASE = re.compile(r"models/[^/]+/[^/]+/[0-9]+\.json")
SOON_SHARE = 3
"""What has less than a third of its time left should have been signed anew."""


@dataclass(frozen=True)
class Row:
    """What stands of one role."""

    role: str
    version: int
    keys: str
    targets: int
    expires: datetime
    days_left: int


@dataclass
class Verdict:
    """What was found; ``problems`` make the exit code, ``warnings`` do not."""

    now: datetime
    rows: list[Row] = field(default_factory=list)
    problems: list[EdgekitError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    roots: int = 0
    releases: int = 0
    blobs: int = 0


@dataclass
class _Walk:
    """A device's client, the repository that it reads, where it puts a target, and the files that were compared."""

    updater: Updater
    repository: Path
    scratch: Path
    seen: set[str] = field(default_factory=set)


def verify(repository: Path, root: bytes, now: datetime, progress: Callable[[str, int, int], None]) -> Verdict:
    """Walk a repository from a root of trust; problems are collected, but for those that end the walk."""
    from edgekit.ota.server.draft import Draft
    from edgekit.ota.server.keys import Custody

    verdict = Verdict(now)
    with tempfile.TemporaryDirectory() as scratch, _collected(verdict):
        place = Path(scratch, "fleet")
        place.mkdir()
        (place / "repository").symlink_to(repository.resolve())
        draft = Draft.of(Custody(place), now)
        _read_rows(verdict, draft)
        walk = _Walk(_refreshed(Path(scratch), repository, root, now), repository, Path(scratch, "target"))
        verdict.roots = draft.root.version
        paths = sorted(path for role in draft.roles() for path in draft.role(role).targets)
        for number, path in enumerate(paths):
            progress("verify releases", number, len(paths))
            with _collected(verdict):
                _check_target(verdict, walk, path)
    return verdict


@contextmanager
def _collected(verdict: Verdict) -> Iterator[None]:
    from tuf.api.exceptions import DownloadError, RepositoryError

    try:
        yield
    except EdgekitError as error:
        verdict.problems.append(error)
    except RepositoryError as error:
        verdict.problems.append(TrustError(f"a device refuses this: {error}"))
    except DownloadError as error:
        verdict.problems.append(TransferError(f"a device misses this: {error}"))


def _refreshed(scratch: Path, repository: Path, root: bytes, now: datetime) -> Updater:
    from edgekit.ota.device import trust
    from edgekit.ota.device.fetchers import FolderFetcher

    trust.install_root(scratch / "state", root)
    cache = scratch / "state" / "metadata"
    cache.mkdir()
    updater = trust.open_updater(root, cache, FolderFetcher(repository), now)
    updater.refresh()
    return updater


def _check_target(verdict: Verdict, walk: _Walk, path: str) -> None:
    from edgekit import manifest as manifests
    from edgekit.ota.deltas import listing
    from edgekit.ota.release import from_custom, is_release

    target = walk.updater.get_targetinfo(path)
    if target is None:
        raise TrustError(f"a device does not find {path}: no role that may sign it does")
    data = Path(walk.updater.download_target(target, str(walk.scratch))).read_bytes()
    if not is_release(path):
        for delta in listing.decode(data):
            _check_once(verdict, walk, walk.repository / "deltas" / delta.sha256, f"a delta of {path}")
        return
    if not RELEASE.fullmatch(path):
        return
    verdict.releases += 1
    release = from_custom(target.unrecognized_fields.get("custom"))
    if release.path != path or release.bundle not in target.hashes.values():
        raise TrustError(f"what is signed as {path} says it is {release.path} of bundle {release.bundle[:12]}")
    if release.foreign:
        raise TrustError(f"{path} is signed for {release.profile} and names the variant {release.foreign[0]}")
    manifest = manifests.decode(data)
    for entry in (entry for variant in release.order for entry in manifest.files_of(variant)):
        _check_once(verdict, walk, walk.repository / "blobs" / entry.sha256, f"{entry.path} of {path}")


def _check_once(verdict: Verdict, walk: _Walk, blob: Path, what: str) -> None:
    if blob.name not in walk.seen:
        walk.seen.add(blob.name)
        verdict.blobs += 1
        _check_blob(blob, what)


def _check_blob(blob: Path, what: str) -> None:
    from edgekit.bundle import hash_file

    if not blob.is_file():
        raise BundleError(f"{what} is missing: {blob}", "publish the bundle again, or restore the backup")
    if hash_file(blob) != blob.name:
        raise BundleError(f"{what} is damaged: {blob}", "publish the bundle again: it is mended")


def _read_rows(verdict: Verdict, draft: Draft) -> None:
    from edgekit.ota.server import delegations, metadata

    root = draft.root
    timestamp = metadata.read(draft.folder, "timestamp").signed
    snapshot = metadata.read(draft.folder, f"{timestamp.snapshot_meta.version}.snapshot").signed
    for name, signed in (("root", root), ("timestamp", timestamp), ("snapshot", snapshot)):
        _add(verdict, name, signed, root)
    for name in draft.roles():
        delegator: Root | Targets = root if name == delegations.TOP else draft.role(delegations.parent_of(name))
        _add(verdict, name, draft.role(name), delegator)


def _add(verdict: Verdict, name: str, signed: Signed, delegator: Root | Targets) -> None:
    from edgekit.ota.server import delegations, metadata

    role = delegator.get_delegated_role(name)
    keys = [delegator.get_key(keyid) for keyid in role.keyids]
    version, expires = signed.version, signed.expires
    count = len(getattr(signed, "targets", ()))
    left = expires - verdict.now
    verdict.rows.append(Row(name, version, f"{role.threshold} of {len(keys)}", count, expires, left.days))
    twice = [value for value, times in Counter(str(key.keyval) for key in keys).items() if times > 1]
    if twice:
        verdict.problems.append(TrustError(f"{name} counts one key twice: its threshold is a lie", "rotate its keys"))
    if role.threshold > len(keys):
        verdict.problems.append(TrustError(f"{name} asks for {role.threshold} of {len(keys)} keys: nobody can sign it"))
    if count > delegations.MAX_TARGETS:
        verdict.warnings.append(f"{name} holds {count} targets, more than {delegations.MAX_TARGETS}")
    if left.total_seconds() <= 0:
        verdict.problems.append(
            TrustError(f"{name} expired on {expires:%Y-%m-%d}", f"edgekit ota refresh FLEET {name}")
        )
    elif left < metadata.lifetime(name) / SOON_SHARE and (name != "root" or left.days < 60):
        verdict.warnings.append(f"{name} expires in {left.days} days: edgekit ota refresh FLEET {name}")


def root_of(place: Path) -> tuple[Path, bytes]:
    """Return the repository that lies in a folder, or is it, and its first root.

    Raises:
        UsageError: there is none.
    """
    for repository in (place / "repository", place):
        root = repository / "metadata" / "1.root.json"
        if root.is_file():
            return repository, root.read_bytes()
    raise UsageError(
        f"{place} holds no fleet and is no repository", "name the folder of a fleet, or a copy of its repository"
    )
