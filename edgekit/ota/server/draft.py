"""The next state of a repository: changes are collected, all signed before one is written, the timestamp written last.

So a kill leaves the old or the new repository, and a key that is away changes nothing. Follows TUF 1.0 with consistent
snapshots. Knows which key signs what; sees no private one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from edgekit.errors import TrustError
from edgekit.ota.server import delegations, metadata
from edgekit.ota.server.keys import KEYRING, KeyAway

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from securesystemslib.signer import Key  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets  # type: ignore[attr-defined]  # re-exported without __all__

    from edgekit.ota.server.keys import Custody

NEVER = datetime.max.replace(tzinfo=UTC)
"""The time of a draft that is only read."""
Sealed = list[tuple[str, bytes]]
"""Names and bytes of signed metadata, in the order in which they are to be written."""


class Draft:
    """What a fleet's repository holds, and what it will hold."""

    def __init__(self, custody: Custody, now: datetime, root: Root) -> None:
        """Begin an empty repository; see `of` for one that exists."""
        self.folder: Path = custody.folder
        self.custody = custody
        self.now = now
        self.root = root
        self._meta: dict[str, MetaFile] = {}
        self._versions = (0, 0)
        self._roles: dict[str, Targets] = {}
        self._changed: set[str] = set()

    @classmethod
    def of(cls, custody: Custody, now: datetime) -> Draft:
        """Begin with what is published: files of a higher number are leftovers of a killed call.

        Raises:
            UsageError: there is no fleet.
            TrustError: the repository is damaged.
        """
        timestamp = metadata.current_timestamp(custody.folder).signed
        draft = cls(custody, now, trusted_root(custody))
        link = timestamp.snapshot_meta
        snapshot: Snapshot = metadata.read(custody.folder, f"{link.version}.snapshot", link).signed
        draft._meta = dict(snapshot.meta)
        draft._versions = (snapshot.version, timestamp.version)
        return draft

    def has(self, role: str) -> bool:
        """Say whether there is a targets role of that name."""
        return role in self._roles or f"{role}.json" in self._meta

    def role(self, name: str) -> Targets:
        """Return what a targets role signs, to be read only; see `change`."""
        if name not in self._roles:
            link = self._meta[f"{name}.json"]
            self._roles[name] = metadata.read(self.folder, f"{link.version}.{name}", link).signed
        return self._roles[name]

    def change(self, name: str) -> Targets:
        """Return what a targets role signs, to be changed; it is made where there is none."""
        from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # re-exported without __all__

        if not self.has(name):
            self._roles[name] = Targets(version=1, expires=self.now)
        elif name not in self._changed:
            self.role(name).version += 1
        self._changed.add(name)
        return self._roles[name]

    def roles(self) -> list[str]:
        """List the targets roles that a device can come upon, from the top down."""
        found = [delegations.TOP]
        for name in found:
            children = delegations.children(self.role(name))  # of which some may lead back, in a repository of others
            found += [child for child in children if self.has(child) and child not in found]
        return found

    def key_of(self, name: str) -> Key:
        """Return the (first) key that signs a targets role."""
        if name == delegations.TOP:
            return self.root.get_key(self.root.roles[name].keyids[0])
        parent = self.role(delegations.parent_of(name))
        return parent.get_key(parent.get_delegated_role(name).keyids[0])

    def until(self) -> dict[str, datetime]:
        """Return when snapshot and timestamp expire."""
        names = (("snapshot", f"{self._versions[0]}.snapshot"), ("timestamp", "timestamp"))
        return {role: metadata.read(self.folder, name).signed.expires for role, name in names}

    def commit(self) -> None:
        """Sign and write.

        Raises:
            KeyAway: a key that is needed cannot be reached; nothing is changed.
        """
        self.write(self.seal())

    def seal(self, *roots: Root) -> Sealed:
        """Sign what has changed, snapshot and timestamp; for devices that go by any of ``roots``, not only the present.

        Raises:
            KeyAway: a key that is needed cannot be reached.
        """
        from tuf.api.metadata import MetaFile, Snapshot, Timestamp  # type: ignore[attr-defined]  # re-exported without __all__

        roots = roots or (self.root,)
        number, stamp = (version + 1 for version in self._versions)
        sealed: Sealed = []
        meta = dict(self._meta)
        for name in sorted(self._changed):
            signed = self._roles[name]
            signed.expires = metadata.expiry(name, self.now)
            data = self._sealed(name, signed, roots)
            sealed.append((f"{signed.version}.{name}", data))
            meta[f"{name}.json"] = MetaFile.from_data(signed.version, data, ["sha256"])
        snapshot = Snapshot(version=number, expires=metadata.expiry("snapshot", self.now), meta=meta)
        data = self._sealed("snapshot", snapshot, roots)
        sealed.append((f"{number}.snapshot", data))
        link = MetaFile.from_data(number, data, ["sha256"])
        timestamp = Timestamp(version=stamp, expires=metadata.expiry("timestamp", self.now), snapshot_meta=link)
        return [*sealed, ("timestamp", self._sealed("timestamp", timestamp, roots))]

    def write(self, sealed: Sealed) -> None:
        """Write what `seal` returned."""
        for name, data in sealed:
            metadata.write(self.folder, name, data)

    def _sealed(self, name: str, signed: Any, roots: Sequence[Root]) -> bytes:  # noqa: ANN401  # one of TUF's four kinds
        from tuf.api.metadata import Metadata

        made: Metadata[Any] = Metadata(signed)
        if name in metadata.ROLES:
            for root in roots:
                sign(made, name, root, self.custody)
        else:
            sign(made, name, self.role(delegations.parent_of(name)), self.custody)
        return metadata.encode(made)


def trusted_root(custody: Custody) -> Root:
    """Return the newest root. All its keys are in the keyring, which lies outside the repository.

    The next root is made of it: whoever can write into the repository could else have his own key signed in.

    Raises:
        UsageError: there is no fleet.
        TrustError: it is damaged, or names a key that the fleet does not have.
    """
    root = metadata.current_root(custody.folder).signed
    named = {keyid for role in root.roles.values() for keyid in role.keyids}
    if strange := sorted(named - set(custody.ring.keys)):
        raise TrustError(
            f"root {root.version} names a key that is not in {KEYRING}: {strange[0][:12]}",
            "restore the repository, or the keyring, from the backup",
        )
    return root


def sign(made: Metadata[Any], name: str, delegator: Root | Targets, custody: Custody) -> None:
    """Add signatures until ``delegator`` is content with metadata of the role ``name``.

    Raises:
        KeyAway: too few of its keys can be reached; the signatures that could be made are there.
        TrustError: it is never content.
    """
    away: list[KeyAway] = []
    role = delegator.get_delegated_role(name)
    for keyid in role.keyids:
        if delegator.get_verification_result(name, made.signed_bytes, made.signatures):
            return
        try:
            sign_with(made, custody.signer(delegator.get_key(keyid)))
        except KeyAway as error:
            away.append(error)
    result = delegator.get_verification_result(name, made.signed_bytes, made.signatures)
    if result:
        return
    if wrong := [keyid for keyid in result.unsigned if keyid in made.signatures]:
        raise KeyAway(f"key {wrong[0][:12]} signs what does not verify", "see its device: is it the key that it says?")
    if not away:
        raise TrustError(f"{name} can never have {role.threshold} signatures: {len(role.keyids)} keys", "rotate them")
    told = f"{name} has {len(result.signed)} of {role.threshold} signatures" if role.threshold > 1 else f"no {name}"
    raise KeyAway(f"{told}: {away[0].message}", away[0].hint)


def sign_with(made: Metadata[Any], signer: Any) -> None:  # noqa: ANN401  # securesystemslib's Signer
    """Add one signature.

    Raises:
        KeyAway: what should sign does not.
    """
    from tuf.api.exceptions import UnsignedMetadataError

    try:
        made.sign(signer, append=True)
    except UnsignedMetadataError as error:
        if isinstance(error.__cause__, KeyAway):
            raise error.__cause__ from error
        raise KeyAway(
            f"key {signer.public_key.keyid[:12]} does not sign: {error.__cause__}", "see its device"
        ) from error
