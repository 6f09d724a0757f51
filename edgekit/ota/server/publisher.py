"""Publishes bundles as signed releases, and keeps the metadata fresh. Sees no private key: `keys` does.

A fleet's folder holds the repository, the keyring and, unless they are kept elsewhere, the keys. Every file is
replaced atomically and ``timestamp.json`` is written last, so that a kill leaves the old or the new repository. Knows
no network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit import manifest as manifests
from edgekit.bundle import MANIFEST, hash_file
from edgekit.durable import new_file, write_file
from edgekit.errors import BundleError, TrustError, UnknownName, UsageError
from edgekit.ota.deltas import listing
from edgekit.ota.release import ANYTHING, Limits, Release, Replaces, from_custom, is_release, to_custom
from edgekit.ota.server import bucket, catalogue, deltas, metadata, order
from edgekit.ota.server.delegations import TOP
from edgekit.ota.server.draft import NEVER, Draft, sign
from edgekit.ota.server.keys import CLOSED, Custody, KeyAway
from edgekit.ota.server.metadata import ROLES
from edgekit.plugins import extra
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from securesystemslib.signer import Key  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]  # re-exported without __all__

    from edgekit.bundle import Bundle
    from edgekit.manifest import FileEntry, Manifest
    from edgekit.ota.deltas.listing import Delta
    from edgekit.ota.server.keys import Unlock
    from edgekit.progress import Progress

WARN = timedelta(days=60)
"""What has less than a third of its time left is signed anew; where its key is away that is told from then on."""


@dataclass(frozen=True)
class Keeping:
    """How a new fleet's keys are kept: ``offline`` is a folder that is taken away once they have signed.

    ``root_threshold`` of ``root_keys`` sign a root; ``encrypt``: behind a passphrase, ``None``: those offline only.
    """

    offline: Path | None = None
    root_keys: int = 1
    root_threshold: int = 1
    encrypt: bool | None = None

    def place(self, folder: Path, role: str) -> tuple[Path, bool]:
        """Return the folder of a role's keys, and whether they are encrypted."""
        away = self.offline is not None and role in ("root", "targets", "authority")
        encrypted = away if self.encrypt is None else self.encrypt
        return (self.offline if away and self.offline else folder / "keys"), encrypted


def init(folder: Path, now: datetime, keeping: Keeping | None = None, unlock: Unlock = CLOSED) -> None:
    """Make a fleet's Ed25519 keys (mode 0600) and an empty signed repository in ``folder``.

    Keys that an interrupted call left behind are used again.

    Raises:
        UsageError: there is a repository already, or more signatures are asked for than there are keys.
        MissingExtra: what signs is not installed.
    """
    with extra("fleet"):
        import cryptography
        import tuf
    del cryptography, tuf
    keeping = keeping or Keeping()
    if not 1 <= keeping.root_threshold <= keeping.root_keys:
        raise UsageError(
            f"{keeping.root_threshold} of {keeping.root_keys} root keys cannot sign", "ask for 1 up to all of them"
        )
    metadata.place(folder, "timestamp").parent.mkdir(parents=True, exist_ok=True)
    with metadata.sole_writer(folder):
        if metadata.place(folder, "timestamp").exists():
            raise UsageError(f"{folder} holds a fleet already", "choose another folder")
        custody = Custody(folder, unlock)
        made = _first_keys(custody, keeping)
        custody.save()
        _write_first(custody, made, keeping.root_threshold, now)


def root(folder: Path) -> bytes:
    """Return the root metadata that a device is given when it is provisioned: its root of trust.

    Raises:
        UsageError: there is no fleet in that folder.
    """
    path = metadata.place(folder, "1.root")
    if not path.is_file():
        raise metadata.no_fleet(folder)
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
    variants: Sequence[str] = (),
    replaces: Replaces = ANYTHING,
    url: str = "",
    allow_unverified: bool = False,
    key: str | None = None,
    unlock: Unlock = CLOSED,
) -> list[Release]:
    """Sign the bundle as the next version of a model, one release per hardware class; return the releases.

    ``model``: the line of versions it belongs to, by default the bundle's name. ``version``: by default the last
    one plus one. ``profiles``: by default every class with a variant that is proved to compute what the model does.
    ``variants``: the order in which the devices of each class try those of their class (``class`` and ``class.…``), by
    default the one named like it, then the others as the bundle lists them.
    ``url``: where a copy of ``folder/repository`` lies, https, from which devices read the blobs with preference.
    ``key``: the address of a key of the model's own, where it is new.

    Raises:
        KeyAway: a key that has to sign cannot be reached.
        UsageError: no fleet there, a version not above the last, an unverified variant, nothing to publish, or a limit
            that a bundle of this kind can never be measured by.
        UnknownName: the bundle has no variant of that name.
        BundleError: a file of the bundle changed since it was opened.
    """
    _require_measurable(bundle.manifest, limits or Limits())
    with metadata.sole_writer(folder):
        draft = Draft.of(Custody(folder, unlock), now)
        catalogue.migrate(draft)
        name = model or bundle.manifest.name
        targets = catalogue.gather(draft, name)
        number = _next_version(targets, name, version)
        orders = order.of_classes(bundle.manifest, profiles, variants, allow_unverified=allow_unverified)
        like = Release(
            model=name,
            profile="x",
            version=number,
            bundle=bundle.digest,
            limits=limits or Limits(),
            replaces=replaces,
            url=url,
        )
        releases = [_release(like, profile, chosen) for profile, chosen in orders.items()]
        for entry in _needed(bundle, [name for release in releases for name in release.order]):
            _publish_blob(folder, bundle, entry)
            _upload(folder, f"blobs/{entry.sha256}")
        for release in releases:
            _add_target(folder, targets, release, bundle)
        catalogue.settle(draft, name, targets, key)
        draft.custody.save()
        draft.commit()
    return releases


def add_deltas(  # noqa: PLR0913  # each is a decision of the operator and named at the call
    folder: Path,
    made_for: Sequence[Release],
    *,
    now: datetime,
    count: int = 3,
    unlock: Unlock = CLOSED,
    progress: Progress = silent,
) -> dict[str, tuple[Delta, ...]]:
    """Make and sign deltas to published releases from the last ``count`` before each; return them by release path.

    They are made before anything is locked: until they are signed, and where none pays, devices fetch whole files.

    Raises:
        UsageError: no fleet there.
        KeyAway: a key that has to sign cannot be reached.
        MissingExtra: numpy or zstandard is not installed.
    """
    signed = releases(folder)
    made: deltas.Made = {}
    found: dict[str, tuple[Delta, ...]] = {}
    for release in made_for:
        older = [r for r in signed if (r.model, r.profile) == (release.model, release.profile)]
        older = sorted((r for r in older if r.version < release.version), key=lambda r: -r.version)[:count]
        if some := deltas.make(folder / "repository", release, older, made, progress=progress):
            found[release.path] = tuple(some)
            for delta in some:
                _upload(folder, f"deltas/{delta.sha256}")
    if found:
        with metadata.sole_writer(folder):
            draft = Draft.of(Custody(folder, unlock), now)
            for model in {release.model for release in made_for}:
                targets = catalogue.gather(draft, model)
                for release in made_for:
                    if release.model == model and release.path in found:
                        _add_listing(folder, targets, release.deltas_path, listing.encode(found[release.path]))
                catalogue.settle(draft, model, targets)
            draft.commit()
    return found


def refresh(folder: Path, now: datetime, unlock: Unlock = CLOSED, also: Sequence[str] = ()) -> list[str]:
    """Sign timestamp and snapshot anew before they expire, and the rest once two thirds of their time are over.

    ``also``: targets roles that are signed anew whatever their age. Return what could not be signed anew although it
    expires soon, for a person to read: its key is elsewhere.

    Raises:
        UnknownName: there is no such role.
        KeyAway: the key of the timestamp or the snapshot cannot be reached.
    """
    with metadata.sole_writer(folder):
        draft = Draft.of(Custody(folder, unlock), now)
        told = [_aging("root", draft.root.expires, now)]
        if unknown := set(also) - {"snapshot", "timestamp", *draft.roles()}:
            raise UnknownName("role", unknown.pop(), {"root", "snapshot", "timestamp", *draft.roles()})
        for name in draft.roles():
            expires = draft.role(name).expires
            if expires - now > metadata.lifetime(name) / 3 and name not in also:
                continue
            try:
                draft.custody.signer(draft.key_of(name))
            except KeyAway as error:
                if name in also:
                    raise
                told.append(_aging(name, expires, now, error.message))
            else:
                draft.change(name)
        draft.commit()
    return [one for one in told if one]


def releases(folder: Path) -> list[Release]:
    """List what is signed at present, oldest version first."""
    draft = Draft.of(Custody(folder), NEVER)
    found = [release for name in draft.roles() for release in _released(draft.role(name))]
    return sorted(found, key=lambda release: (release.model, release.version, release.profile))


def _first_keys(custody: Custody, keeping: Keeping) -> dict[str, list[Key]]:
    made: dict[str, list[Key]] = {}
    for role in ROLES:
        place, encrypted = keeping.place(custody.folder, role)
        count = keeping.root_keys if role == "root" else 1
        names = [f"{role}-{number + 1}" for number in range(count)] if count > 1 else [role]
        made[role] = [custody.make(name, place, encrypted=encrypted) for name in names]
    if keeping.offline is not None:
        place, encrypted = keeping.place(custody.folder, "models")
        custody.ring.models = custody.make("models", place, encrypted=encrypted).keyid
    if keeping.offline is not None or keeping.encrypt:
        place, encrypted = keeping.place(custody.folder, "authority")
        custody.make_authority(place, encrypted=encrypted)
    return made


def _write_first(custody: Custody, made: dict[str, list[Key]], threshold: int, now: datetime) -> None:
    from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]  # re-exported without __all__

    trusted = Root(version=1, expires=metadata.expiry("root", now), consistent_snapshot=True)
    for role, keys in made.items():
        for key in keys:
            trusted.add_key(key, role)
    trusted.roles["root"].threshold = threshold
    signed: Metadata[Root] = Metadata(trusted)
    sign(signed, "root", trusted, custody)
    draft = Draft(custody, now, trusted)
    draft.change(TOP)
    sealed = draft.seal()
    draft.write([("1.root", metadata.encode(signed)), *sealed])


def _aging(role: str, expires: datetime, now: datetime, why: str = "") -> str:
    if expires - now > WARN:
        return ""
    return f"{role} expires in {(expires - now).days} days: edgekit ota refresh FLEET {role}{why and f' ({why})'}"


def _released(targets: Targets) -> list[Release]:
    found = [target for path, target in targets.targets.items() if is_release(path)]
    return [from_custom(target.unrecognized_fields.get("custom")) for target in found]


def _next_version(targets: Targets, model: str, wanted: int | None) -> int:
    last = max((release.version for release in _released(targets) if release.model == model), default=0)
    if wanted is None:
        return last + 1
    if wanted <= last:
        raise UsageError(
            f"version {wanted} of {model} is not above the last one, {last}",
            f"devices refuse to go back: publish it as version {last + 1} or higher",
        )
    return wanted


def _release(draft: Release, profile: str, chosen: tuple[str, ...]) -> Release:
    release = msgspec.structs.replace(draft, profile=profile, variants=() if chosen == (profile,) else chosen)
    try:
        same = from_custom(to_custom(release)) == release  # a limit of NaN would become none at all
    except TrustError as error:
        raise UsageError(
            f"this cannot be published: {error}", "correct the name, the version, the limits or the URL"
        ) from error
    if not same:
        raise UsageError(f"these limits cannot be published: {release.limits}", "give finite numbers")
    return release


def _require_measurable(manifest: Manifest, limits: Limits) -> None:
    golden = manifest.golden
    if limits.max_p95_ms is not None and not (golden.prompts or (golden.inputs and golden.outputs)):
        raise UsageError(
            f"max_p95_ms cannot be measured in the try-out: {manifest.name} has no golden inputs",
            "export it with data, or publish without that limit",
        )
    named = {"min_agreement": limits.min_agreement is not None, "shadow_requests": limits.shadow_requests > 0}
    if manifest.task == "text-generation" and any(named.values()):
        name = next(one for one, is_signed in named.items() if is_signed)
        raise UsageError(
            f"{name} cannot be measured: {manifest.name} answers in text, which is not compared",
            "publish without that limit; its golden prompts are compared on every device",
        )


def _needed(bundle: Bundle, variants: Sequence[str]) -> list[FileEntry]:
    entries = {e.sha256: e for variant in variants for e in bundle.manifest.files_of(variant)}
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


def _upload(folder: Path, name: str) -> None:
    """Put a file into the fleet's bucket if it has one, before anything signed names it."""
    if store := bucket.of(folder):
        store.write(name, folder / "repository" / name)


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


def _add_listing(folder: Path, targets: Targets, path: str, data: bytes) -> None:
    from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]  # re-exported without __all__

    place = Path(path)
    write_file(
        folder / "repository" / "targets" / place.parent / f"{hashlib.sha256(data).hexdigest()}.{place.name}", data
    )
    targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
