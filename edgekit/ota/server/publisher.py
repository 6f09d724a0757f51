"""Signs releases: makes the fleet's keys, publishes bundles as TUF targets, keeps the metadata fresh.

The only file that sees a private key. Every file is replaced atomically and ``timestamp.json`` is written last,
so that a kill leaves the old or the new repository. Follows TUF 1.0 with consistent snapshots. Knows no network.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import manifest as manifests
from edgekit.bundle import MANIFEST, hash_file
from edgekit.durable import new_file, write_file
from edgekit.errors import BundleError, ResourceError, TrustError, UsageError
from edgekit.ota.release import Limits, Release, from_custom, to_custom
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]  # re-exported without __all__

    from edgekit.bundle import Bundle
    from edgekit.manifest import FileEntry

ROLES = ("root", "targets", "snapshot", "timestamp")
LOCK_SECONDS = 2.0
"""So long one waits for another; the service signs a timestamp in a fraction of it."""
LIFETIME = {
    "root": timedelta(days=730),
    "targets": timedelta(days=365),
    "snapshot": timedelta(days=30),
    "timestamp": timedelta(days=7),
}


def init(folder: Path, now: datetime) -> None:
    """Make four Ed25519 keys (mode 0600) and an empty signed repository in ``folder``.

    Keys that an interrupted call left behind are used again.

    Raises:
        UsageError: there is a repository already.
        MissingExtra: what signs is not installed.
    """
    with extra("fleet"):
        import cryptography
        import tuf
    del cryptography, tuf
    _metadata(folder, "timestamp").parent.mkdir(parents=True, exist_ok=True)
    with _sole_writer(folder):
        if _metadata(folder, "timestamp").exists():
            raise UsageError(f"{folder} holds a fleet already", "choose another folder")
        signers = {role: _new_signer(folder, role) for role in ROLES}
        _write_first_metadata(folder, signers, now)


def root(folder: Path) -> bytes:
    """Return the root metadata that a device is given when it is provisioned: its root of trust.

    Raises:
        UsageError: there is no fleet in that folder.
    """
    path = _metadata(folder, "1.root")
    if not path.is_file():
        raise _no_fleet(folder)
    return path.read_bytes()


def publish(  # noqa: PLR0913  # each is a decision of the operator and named at the call
    folder: Path,
    bundle: Bundle,
    *,
    now: datetime,
    model: str | None = None,
    version: int | None = None,
    profiles: Sequence[str] | None = None,
    limits: Limits | None = None,
    allow_unverified: bool = False,
) -> list[Release]:
    """Sign the bundle as the next version of a model, one release per hardware class; return the releases.

    ``model``: the line of versions it belongs to, by default the bundle's name. ``version``: by default the last
    one plus one. ``profiles``: by default every variant whose file was proved to compute what the model computes.

    Raises:
        UsageError: no fleet there, a version not above the last, an unverified variant, or nothing to publish.
        UnknownName: the bundle has no variant of that name.
        BundleError: a file of the bundle changed since it was opened.
    """
    with _sole_writer(folder):
        targets = _current_targets(folder)
        name = model or bundle.manifest.name
        number = _next_version(targets.signed, name, version)
        chosen = _chosen(bundle, profiles, allow_unverified=allow_unverified)
        releases = [_release(name, profile, number, bundle, limits=limits) for profile in chosen]
        for entry in _needed(bundle, chosen):
            _publish_blob(folder, bundle, entry)
        for release in releases:
            _add_target(folder, targets.signed, release, bundle)
        _sign_next(folder, targets, now)
    return releases


def refresh(folder: Path, now: datetime) -> None:
    """Sign timestamp and snapshot anew before they expire; targets too once two thirds of their time are over."""
    with _sole_writer(folder):
        targets = _current_targets(folder)
        if targets.signed.expires - now < LIFETIME["targets"] / 3:
            _sign_next(folder, targets, now)
        else:
            _sign_snapshot(folder, targets.signed.version, now)


def releases(folder: Path) -> list[Release]:
    """List what is signed at present, oldest version first."""
    signed = _current_targets(folder).signed.targets.values()
    found = [from_custom(target.unrecognized_fields.get("custom")) for target in signed]
    return sorted(found, key=lambda release: (release.model, release.version, release.profile))


def _no_fleet(folder: Path) -> UsageError:
    return UsageError(f"{folder} holds no fleet", f"make one with: edgekit ota init {folder}")


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    if not _metadata(folder, "timestamp").parent.is_dir():
        raise _no_fleet(folder)  # before the lock is made: a mistyped name must not leave a folder
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


def _metadata(folder: Path, name: str) -> Path:
    return folder / "repository" / "metadata" / f"{name}.json"


def _key(folder: Path, role: str) -> Path:
    return folder / "keys" / f"{role}.pem"


def _new_signer(folder: Path, role: str) -> CryptoSigner:
    with extra("fleet"):
        from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # re-exported without __all__
    path = _key(folder, role)
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, CryptoSigner.generate_ed25519().private_bytes, mode=0o600)
    return _signer(folder, role)


def _signer(folder: Path, role: str) -> CryptoSigner:
    with extra("fleet"):
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # re-exported without __all__
    path = _key(folder, role)
    try:
        key: Any = load_pem_private_key(path.read_bytes(), None)
        return CryptoSigner(key)
    except FileNotFoundError as error:
        raise TrustError(f"the {role} key is missing: {path}", "restore it from the backup") from error
    except (ValueError, TypeError) as error:
        raise TrustError(f"{path} holds no usable private key: {error}", "restore it from the backup") from error


def _write_first_metadata(folder: Path, signers: dict[str, CryptoSigner], now: datetime) -> None:
    from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]  # re-exported without __all__

    trusted = Root(version=1, expires=_expiry("root", now), consistent_snapshot=True)
    for role, signer in signers.items():
        trusted.add_key(signer.public_key, role)
    signed_root: Metadata[Root] = Metadata(trusted)
    _write_signed(folder, signed_root, "1.root")
    targets: Metadata[Targets] = Metadata(Targets(version=1, expires=_expiry("targets", now)))
    _sign_all(folder, targets, now)


def _expiry(role: str, now: datetime) -> datetime:
    return (now + LIFETIME[role]).replace(microsecond=0)


def _write_signed(folder: Path, metadata: Metadata[Any], name: str) -> bytes:
    from tuf.api.serialization.json import JSONSerializer

    metadata.sign(_signer(folder, metadata.signed.type))
    data = metadata.to_bytes(JSONSerializer(compact=True))
    write_file(_metadata(folder, name), data)
    return data


def _read_signed(folder: Path, name: str) -> Metadata[Any]:
    with extra("fleet"):
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata
    path = _metadata(folder, name)
    try:
        return Metadata.from_bytes(path.read_bytes())
    except FileNotFoundError as error:
        raise _no_fleet(folder) from error
    except RepositoryError as error:
        raise TrustError(f"{path} is damaged: {error}", "restore the repository from its backup") from error


def _current_targets(folder: Path) -> Metadata[Targets]:
    """Follow timestamp and snapshot: files of a higher number are leftovers of a killed publish."""
    timestamp: Timestamp = _read_signed(folder, "timestamp").signed
    snapshot: Snapshot = _read_signed(folder, f"{timestamp.snapshot_meta.version}.snapshot").signed
    return _read_signed(folder, f"{snapshot.meta['targets.json'].version}.targets")


def _sign_next(folder: Path, targets: Metadata[Targets], now: datetime) -> None:
    targets.signed.version += 1
    _sign_all(folder, targets, now)


def _sign_all(folder: Path, targets: Metadata[Targets], now: datetime) -> None:
    targets.signed.expires = _expiry("targets", now)
    _write_signed(folder, targets, f"{targets.signed.version}.targets")
    _sign_snapshot(folder, targets.signed.version, now)


def _sign_snapshot(folder: Path, targets_version: int, now: datetime) -> None:
    from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp  # type: ignore[attr-defined]  # re-exported without __all__

    last = _read_signed(folder, "timestamp").signed if _metadata(folder, "timestamp").exists() else None
    number = last.snapshot_meta.version + 1 if last else 1
    data = _metadata(folder, f"{targets_version}.targets").read_bytes()
    meta = {"targets.json": MetaFile.from_data(targets_version, data, ["sha256"])}
    snapshot: Metadata[Snapshot] = Metadata(Snapshot(version=number, expires=_expiry("snapshot", now), meta=meta))
    data = _write_signed(folder, snapshot, f"{number}.snapshot")
    timestamp: Metadata[Timestamp] = Metadata(
        Timestamp(
            version=last.version + 1 if last else 1,
            expires=_expiry("timestamp", now),
            snapshot_meta=MetaFile.from_data(number, data, ["sha256"]),
        )
    )
    _write_signed(folder, timestamp, "timestamp")


def _next_version(targets: Targets, model: str, wanted: int | None) -> int:
    signed = [from_custom(target.unrecognized_fields.get("custom")) for target in targets.targets.values()]
    last = max((release.version for release in signed if release.model == model), default=0)
    if wanted is None:
        return last + 1
    if wanted <= last:
        raise UsageError(
            f"version {wanted} of {model} is not above the last one, {last}",
            f"devices refuse to go back: publish it as version {last + 1} or higher",
        )
    return wanted


def _chosen(bundle: Bundle, profiles: Sequence[str] | None, *, allow_unverified: bool) -> list[str]:
    variants = bundle.manifest.variants
    if profiles is None:
        wanted = [v for v in variants if allow_unverified or v.parity.status != "unverified"]
        if not wanted:
            raise UsageError(
                f"no variant of {bundle.manifest.name} was verified: {', '.join(v.name for v in variants)}",
                "export where the engine is installed, or pass --allow-unverified",
            )
        return [v.name for v in wanted]
    for name in profiles:
        parity = bundle.manifest.variant(name).parity
        if parity.status == "unverified" and not allow_unverified:
            raise UsageError(
                f"the variant {name} is unverified: {parity.reason or 'no reason given'}",
                "export where the engine is installed, or pass --allow-unverified",
            )
    return list(dict.fromkeys(profiles))


def _release(model: str, profile: str, version: int, bundle: Bundle, *, limits: Limits | None) -> Release:
    release = Release(model=model, profile=profile, version=version, bundle=bundle.digest, limits=limits or Limits())
    try:
        same = from_custom(to_custom(release)) == release  # a limit of NaN would become none at all
    except TrustError as error:
        raise UsageError(f"this cannot be published: {error}", "correct the name, the version or the limits") from error
    if not same:
        raise UsageError(f"these limits cannot be published: {release.limits}", "give finite numbers")
    return release


def _needed(bundle: Bundle, profiles: Sequence[str]) -> list[FileEntry]:
    entries = {e.sha256: e for profile in profiles for e in bundle.manifest.files_of(profile)}
    return list(entries.values())


def _publish_blob(folder: Path, bundle: Bundle, entry: FileEntry) -> None:
    target = folder / "repository" / "blobs" / entry.sha256
    if target.is_file() and hash_file(target) == entry.sha256:
        return
    for leftover in target.parent.glob(f".{target.name}.*"):  # of a killed publish; blobs may be large
        leftover.unlink()
    hasher = hashlib.sha256()
    with new_file(target) as out, bundle.path(entry.path).open("rb") as source:
        while piece := source.read(1 << 20):
            hasher.update(piece)
            out.write(piece)
        if hasher.hexdigest() != entry.sha256:
            raise BundleError(f"{entry.path} changed since the bundle was opened", "export the bundle again")


def _add_target(folder: Path, targets: Targets, release: Release, bundle: Bundle) -> None:
    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # re-exported without __all__

    data = bundle.path(MANIFEST).read_bytes()
    if hashlib.sha256(data).hexdigest() != release.bundle or len(data) > manifests.MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} changed since the bundle was opened", "export the bundle again")
    target = TargetFile.from_data(release.path, data, ["sha256"])
    target.unrecognized_fields["custom"] = to_custom(release)
    path = Path(release.path)
    write_file(folder / "repository" / "targets" / path.parent / f"{release.bundle}.{path.name}", data)
    targets.targets[release.path] = target
