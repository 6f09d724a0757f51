"""Which releases may be installed: TUF's verdict on the metadata, then our rules on the release.

The root of trust is installed once, at provisioning, and always passed to TUF. The rule itself does no I/O and
reads no clock. Knows nothing of slots or models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit import manifest as manifests
from edgekit.durable import sync_folder, write_file
from edgekit.errors import BundleError, TransferError, TrustError, UnknownName, UsageError
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
    from edgekit.ota.device.fetchers import Fetcher

MAX_METADATA_BYTES = 8 << 20
ROOT = "root.json"


@dataclass(frozen=True)
class Found:
    """A release that TUF vouches for, with the manifest it names."""

    release: Release
    manifest: Manifest
    data: bytes


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
        TrustError: a signature, version, expiry, length or hash is wrong, or no such release is signed.
        TransferError: a file did not come.
        UsageError: the device was never given a root.
    """
    from tuf.api.exceptions import DownloadError, DownloadLengthMismatchError, RepositoryError

    try:
        updater = _updater(state, fetcher, now)
        updater.refresh()
        target = updater.get_targetinfo(path)
        if target is None:
            raise TrustError(f"nobody signed a release {path}", "publish it first: edgekit ota publish")
        return _found(target, _manifest_bytes(state, updater, target))
    except RepositoryError as error:
        raise TrustError(f"the repository's metadata is not to be trusted: {error}") from error
    except DownloadLengthMismatchError as error:
        raise TrustError(f"the repository sends more bytes than it signed: {error}") from error
    except DownloadError as error:
        raise TransferError(f"the repository's metadata did not come: {error}", "try again") from error


def check_release(release: Release, path: str, *, profile: str, installed: Release | None) -> bool:
    """Judge a signed release; return whether it has to be installed, ``False`` where it is the one that runs.

    Raises:
        TrustError: it stands under another path, is for another hardware class or another model than the
            installed one, or would take the device back to an older version.
    """
    if release.path != path:
        raise TrustError(f"the release signed as {path} says it is {release.path}")
    if release.profile != profile:
        raise TrustError(f"{path} is for {release.profile}, this device is a {profile}")
    if installed is None:
        return True
    if release.model != installed.model:
        raise TrustError(f"{path} is another model than the installed {installed.model}", "provision the device anew")
    if release.version < installed.version:
        raise TrustError(
            f"{path} would take the device back from version {installed.version} to {release.version}",
            "publish the old bundle again as a new version",
        )
    if release.version == installed.version and release.bundle != installed.bundle:
        raise TrustError(f"version {release.version} was signed twice, with different bundles", "publish a new version")
    return release.version > installed.version


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


def _updater(state: Path, fetcher: Fetcher, now: datetime) -> Updater:
    with extra("device"):
        from tuf.ngclient.updater import Updater
    try:
        root = (state / ROOT).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"{state} has no root of trust", "give it one: edgekit ota agent --root 1.root.json"
        ) from error
    cache = state / "metadata"
    cache.mkdir(exist_ok=True)
    updater = Updater(str(cache), "metadata/", str(state), "targets/", _tuf_fetcher(fetcher), bootstrap=root)
    updater._trusted_set.reference_time = now  # noqa: SLF001  # TUF 5.1 fixes the time; python-tuf has no argument
    return updater


def _tuf_fetcher(fetcher: Fetcher) -> FetcherInterface:
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient.fetcher import FetcherInterface

    class Bridge(FetcherInterface):
        """Lets python-tuf read through our fetcher; a missing file is HTTP's 404 to it."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            try:
                yield from fetcher.stream(url, 0, MAX_METADATA_BYTES)
            except MissingFile as error:
                raise DownloadHTTPError(error.message, 404) from error

    return Bridge()


def _manifest_bytes(state: Path, updater: Updater, target: TargetFile) -> bytes:
    if target.length > manifests.MAX_MANIFEST_BYTES:
        raise TrustError(f"{target.path} signs a manifest of {target.length} bytes")
    file = state / "manifest.part"
    try:
        updater.download_target(target, str(file))
        sync_folder(state / "metadata")
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


def _found(target: TargetFile, data: bytes) -> Found:
    release = from_custom(target.unrecognized_fields.get("custom"))
    if hashlib.sha256(data).hexdigest() != release.bundle:
        raise TrustError(f"{target.path} signs bundle {release.bundle[:12]}… and a manifest that is another")
    try:
        manifest = manifests.decode(data)
        manifest.variant(release.profile)
    except (BundleError, UnknownName) as error:
        raise TrustError(f"{target.path} was signed but is unusable: {error}", "export and publish again") from error
    return Found(release, manifest, data)
