"""Which releases may be installed: TUF's verdict on the metadata, then our rules on the release.

The root of trust is installed once, at provisioning, and always passed to TUF. The rule itself does no I/O and
reads no clock. Knows nothing of slots or models.
"""

from __future__ import annotations

import hashlib
import io
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekit import manifest as manifests
from edgekit.durable import sync_tree, write_file
from edgekit.errors import BundleError, TransferError, TrustError, UnknownName, UsageError
from edgekit.ota.deltas import listing
from edgekit.ota.device.fetchers import MissingFile
from edgekit.ota.release import Release, from_custom
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.ngclient.fetcher import FetcherInterface
    from tuf.ngclient.updater import Updater

    from edgekit.manifest import Manifest
    from edgekit.ota.deltas.listing import Delta
    from edgekit.ota.device.fetchers import Fetcher

log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 8 << 20
ROOT = "root.json"
_LOOK = "take a sound copy of the repository; edgekit ota verify FLEET checks it"
_REFRESH = "take a new copy of the repository; its server signs daily, or: edgekit ota refresh FLEET"


class Unproven(TrustError):
    """What came is not what was signed: raise the alarm, but hold it against no release, and ask again.

    A broker, a mirror or a bad cable does as much without any key: taken for final it would cost a fleet its release.
    """


class Expired(Unproven):
    """Metadata is past its time: the repository is frozen, or this device's clock is ahead."""


@dataclass(frozen=True)
class Found:
    """A release that TUF vouches for, with the manifest it names."""

    release: Release
    manifest: Manifest
    data: bytes
    deltas: tuple[Delta, ...] = ()
    """Signed ways from other files to the release's."""


def install_root(state: Path, root: bytes) -> None:
    """Give a device its root of trust; giving it the same one again changes nothing.

    Raises:
        TrustError: the device trusts another root already.
        UsageError: these bytes are no root metadata signed by its own keys.
    """
    path = state / ROOT
    if path.is_file():
        if path.read_bytes() != root:
            raise TrustError(
                f"{state} trusts another root already", "provision the device anew in an empty folder, by hand"
            )
        return
    _require_root(root)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(path, root)


def refresh_and_find(state: Path, fetcher: Fetcher, path: str, now: datetime) -> Found:
    """Bring the metadata up to date and return the release it signs under ``path``.

    Raises:
        Expired: metadata is past its time.
        Unproven: a signature, version, length or hash is wrong, or no such release is signed in what came.
        TrustError: what is signed is malformed.
        TransferError: a file did not come.
        UsageError: the device was never given a root.
    """
    with told_apart():
        updater = refreshed(state, fetcher, now)
        target = updater.get_targetinfo(path)
        sync_tree(state / "metadata")  # python-tuf does not; a device that forgets it can be taken back
        if target is None:
            # Whoever holds newer metadata back shows one that is sound and lacks it.
            raise Unproven(f"nobody signed a release {path}", "publish it first: edgekit ota publish")
        found = _found(target, _target_bytes(state, updater, target, manifests.MAX_MANIFEST_BYTES))
        return replace(found, deltas=_deltas(state, updater, found.release))


@contextmanager
def told_apart() -> Iterator[None]:
    """Turn python-tuf's errors into ours.

    Raises:
        Expired: the metadata is too old, by the time that was given.
        Unproven: it is an attack, or was damaged on its way.
        TransferError: it may be tried again.
    """
    with extra("device"):
        from tuf.api.exceptions import DownloadError, DownloadLengthMismatchError, ExpiredMetadataError, RepositoryError
    try:
        yield
    except ExpiredMetadataError as error:
        raise Expired(f"the repository's metadata has expired: {error}", _REFRESH) from error
    except RepositoryError as error:
        raise Unproven(f"the repository's metadata is not to be trusted: {error}", _LOOK) from error
    except DownloadLengthMismatchError as error:
        raise Unproven(f"the repository sends more bytes than it signed: {error}", _LOOK) from error
    except DownloadError as error:
        raise TransferError(f"the repository's metadata did not come: {error}", "try again") from error


def check_release(release: Release, path: str, *, profile: str, installed: Release | None, confirmed: int = 0) -> bool:
    """Judge a signed release; return whether it has to be installed, ``False`` where it is the one that runs.

    ``confirmed``: the version of its model that served here for good the last time, 0 for none.

    Raises:
        TrustError: it stands under another path, is for another hardware class or another model than the
            installed one (and does not say that it replaces that), may not replace the installed version, or would
            take the device back to an older one.
    """
    if release.path != path:
        raise TrustError(f"the release signed as {path} says it is {release.path}")
    if release.profile != profile:
        raise TrustError(f"{path} is for {release.profile}, this device is a {profile}")
    if installed is None or (release.model != installed.model and installed.model in release.replaces.models):
        if release.version < confirmed:
            raise _way_back(path, confirmed, release.version)
        return True
    if release.model != installed.model:
        raise TrustError(
            f"{path} is another model than the installed {installed.model}",
            "provision the device anew, or sign that it replaces that model",
        )
    if release.version < installed.version:
        raise _way_back(path, installed.version, release.version)
    if release.version == installed.version and release.bundle != installed.bundle:
        raise TrustError(f"version {release.version} was signed twice, with different bundles", "publish a new version")
    if release.version == installed.version:
        return False
    if installed.version < release.replaces.version:
        raise TrustError(
            f"{path} replaces version {release.replaces.version} and later, version {installed.version} is installed",
            "bring the device to one of those first",
        )
    return True


def _way_back(path: str, there: int, offered: int) -> TrustError:
    return TrustError(
        f"{path} would take the device back from version {there} to {offered}",
        "publish the old bundle again as a new version",
    )


def _require_root(data: bytes) -> None:
    with extra("device"):
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]  # re-exported without __all__
    try:
        root: Metadata[Root] = Metadata.from_bytes(data)
        if not isinstance(root.signed, Root):
            raise UsageError(f"this is {root.signed.type} metadata, no root", "take the fleet's 1.root.json")
        root.verify_delegate(Root.type, root)
    except RepositoryError as error:
        raise UsageError(f"this is no root metadata: {error}", "take the fleet's 1.root.json") from error


def refreshed(state: Path, fetcher: Fetcher, now: datetime) -> Updater:
    """Return TUF's client of this device, with its metadata brought up to date; call it within `told_apart`.

    Raises:
        UsageError: the device was never given a root.
    """
    try:
        root = (state / ROOT).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"{state} has no root of trust", "give it one: edgekit ota agent --root 1.root.json"
        ) from error
    cache = state / "metadata"
    cache.mkdir(exist_ok=True)
    for left in cache.glob("tmp*"):  # by a kill, while python-tuf wrote aside
        left.unlink()
    updater = open_updater(root, cache, fetcher, now)
    updater.refresh()
    return updater


def open_updater(
    root: bytes, cache: Path, fetcher: Fetcher, now: datetime, *, places: tuple[str, str] = ("metadata/", "targets/")
) -> Updater:
    """Return TUF's client workflow, begun from a root of trust, at a time that is given.

    ``cache`` is where metadata that was verified lies; ``places`` stand before the paths of metadata and of targets
    that ``fetcher`` is asked for.

    Raises:
        RepositoryError: of python-tuf; the root is none.
    """
    with extra("device"):
        from tuf.ngclient.updater import Updater
    metadata, targets = places
    updater = Updater(str(cache), metadata, None, targets, _tuf_fetcher(fetcher), bootstrap=root)
    updater._trusted_set.reference_time = now  # noqa: SLF001  # TUF 5.1 fixes the time; python-tuf has no argument
    return updater


def _tuf_fetcher(fetcher: Fetcher) -> FetcherInterface:
    from tuf.api.exceptions import DownloadHTTPError, DownloadLengthMismatchError
    from tuf.ngclient.fetcher import FetcherInterface

    class Bridge(FetcherInterface):
        """Lets python-tuf read through our fetcher; a missing file is HTTP's 404 to it."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                yield from fetcher.stream(url, 0, MAX_METADATA_BYTES)
            except MissingFile as error:
                raise DownloadHTTPError(error.message, 404) from error

        @contextmanager
        def download_file(self, url: str, max_length: int) -> Iterator[io.BytesIO]:
            """Keep it in memory, for it is bounded: python-tuf's own goes through the system's folder of scratch."""
            data = io.BytesIO()
            for piece in self._fetch(url):
                data.write(piece)
                if data.tell() > max_length:
                    raise DownloadLengthMismatchError(f"{url} has more than the {max_length} bytes that it may have")
            data.seek(0)
            yield data

    return Bridge()


def _deltas(state: Path, updater: Updater, release: Release) -> tuple[Delta, ...]:
    """Read the signed list of deltas; none is none, and a bad one too: whole files do as well."""
    from tuf.api.exceptions import DownloadError, RepositoryError

    target = updater.get_targetinfo(release.deltas_path)
    if target is None:
        return ()
    try:
        return listing.decode(_target_bytes(state, updater, target, listing.MAX_BYTES))
    except (RepositoryError, DownloadError, TrustError) as error:
        log.warning("whole files are fetched, the list of deltas is no good: %s", error)
        return ()


def _target_bytes(state: Path, updater: Updater, target: TargetFile, most: int) -> bytes:
    if target.length > most:
        raise TrustError(f"{target.path} signs {target.length} bytes, more than {most}")
    file = state / "target.part"
    try:
        updater.download_target(target, str(file))
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


def _found(target: TargetFile, data: bytes) -> Found:
    release = from_custom(target.unrecognized_fields.get("custom"))
    if hashlib.sha256(data).hexdigest() != release.bundle:
        raise TrustError(f"{target.path} signs bundle {release.bundle[:12]}… and a manifest that is another")
    if release.foreign:
        raise TrustError(f"{target.path} is signed for {release.profile} and names the variant {release.foreign[0]}")
    try:
        manifest = manifests.decode(data)
        for name in release.order:
            manifest.variant(name)
    except (BundleError, UnknownName) as error:
        raise TrustError(f"{target.path} was signed but is unusable: {error}", "export and publish again") from error
    return Found(release, manifest, data)
