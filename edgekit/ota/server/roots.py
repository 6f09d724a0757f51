"""Who is trusted from now on: the next root, new keys for a role, and a root that waits for its signatures.

A root that too few have signed waits in ``pending/`` of the fleet's folder, where no device sees it. When a role gets
another key, the metadata it signs is first published under the old key and the new one together, and then the root: so
at every instant a device finds what it can verify. Follows TUF 1.0, section 6.1; sees no private key.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgekit.durable import write_file
from edgekit.errors import UnknownName, UsageError
from edgekit.ota.server import catalogue, delegations, metadata
from edgekit.ota.server.delegations import TOP
from edgekit.ota.server.draft import Draft, sign, sign_with, trusted_root
from edgekit.ota.server.keys import Custody, KeyAway

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]  # re-exported without __all__

MIN_KEYID = 6
ONLINE = ("snapshot", "timestamp")
"""Revoked together: only where both keys are new does a device forget versions that a thief ran up (TUF, 5.3.11)."""


@dataclass(frozen=True)
class Change:
    """What became of a change of keys: ``missing`` signatures the new root waits for in ``pending``; 0: it is in force.

    ``made`` and ``dropped`` are the addresses of keys; a file behind the latter is no longer needed.
    """

    version: int
    missing: int = 0
    pending: Path | None = None
    made: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def rotate(
    custody: Custody, names: Sequence[str], now: datetime, *, uri: str | None = None, is_compromised: bool = False
) -> Change:
    """Give roles other keys. ``names``: roles, or the first digits of key ids.

    ``uri``: the address of the new key, by default one is made beside the old one. ``is_compromised``: a key that its
    role can do without gets no successor, and snapshot and timestamp change together.

    Raises:
        UnknownName: no role or key of that name.
        UsageError: another root still waits for signatures.
        KeyAway: a key that has to sign, other than a root's, cannot be reached; nothing is changed.
    """
    with metadata.sole_writer(custody.folder):
        _require_none_pending(custody.folder)
        before = trusted_root(custody)
        draft = Draft.of(custody, now)
        chosen = [found for name in names for found in _resolve(draft, name)]
        if is_compromised and any(role in ONLINE for role, _ in chosen):
            chosen += [found for role in ONLINE for found in _resolve(draft, role)]
        chosen = list(dict.fromkeys(chosen))
        if uri and len(chosen) > 1:
            raise UsageError(f"{uri} cannot replace {len(chosen)} keys", "name one key, or leave --key out")
        roles = [(role, keyid) for role, keyid in chosen if role in metadata.ROLES]
        models = [(role, keyid) for role, keyid in chosen if role not in metadata.ROLES]
        if models:
            change = _hand_over(draft, models, uri)
        if roles:
            after = _next(before, now)
            for role, keyid in roles:
                _replace(custody, after, (role, keyid), uri, may_drop=is_compromised and role not in names)
            change = _propose(custody, before, after, now)
        return change


def renew(custody: Custody, now: datetime) -> Change:
    """Sign the root anew, with the keys it has, before it expires."""
    with metadata.sole_writer(custody.folder):
        _require_none_pending(custody.folder)
        before = trusted_root(custody)
        return _propose(custody, before, _next(before, now), now)


def sign_pending(custody: Custody, now: datetime, carried: Sequence[Path] = ()) -> Change:
    """Add the signatures of the keys at hand and of copies signed elsewhere; put the root in force if they are enough.

    Raises:
        UsageError: nothing waits, or a copy is of something else.
        TrustError: a copy is damaged.
    """
    with metadata.sole_writer(custody.folder):
        made = pending(custody.folder)
        if made is None:
            raise UsageError(f"nothing in {custody.folder} waits for signatures", "see: edgekit ota keys FLEET")
        for path in carried:
            copy = metadata.parse(path.read_bytes(), path)
            if copy.signed_bytes != made.signed_bytes:
                raise UsageError(
                    f"{path} is not a copy of what waits here", f"copy {_place(custody.folder, made)} anew"
                )
            made.signatures.update(copy.signatures)
        before = trusted_root(custody)
        return _finish(custody, before, made, now)


def read_copy(path: Path) -> Root:
    """Return the root that a copy of a pending file holds.

    Raises:
        UsageError: it is no root.
        TrustError: it is damaged.
    """
    made = metadata.parse(path.read_bytes(), path)
    if made.signed.type != "root":
        raise UsageError(f"{path} is {made.signed.type} metadata, no root", "take a file of the folder `pending`")
    root: Root = made.signed
    return root


def sign_copy(custody: Custody, path: Path, uris: Iterable[str]) -> int:
    """Sign a copy of a pending root, where there may be no fleet but only a key; return how many signatures it has.

    Raises:
        UsageError: it is no root.
        KeyAway: a key cannot be reached.
    """
    read_copy(path)
    made = metadata.parse(path.read_bytes(), path)
    for uri in uris:
        sign_with(made, custody.signer(custody.adopt(uri)))
    write_file(path, metadata.encode(made))
    return len(made.signatures)


def drop_pending(folder: Path) -> None:
    """Give a root up that waits for signatures.

    Raises:
        UsageError: none waits.
    """
    with metadata.sole_writer(folder):
        made = pending(folder)
        if made is None:
            raise UsageError(f"nothing in {folder} waits for signatures")
        _place(folder, made).unlink()


@dataclass(frozen=True)
class KeyRow:
    """One key of a role: its id, kind and address, whether it is here, and the role's threshold and time."""

    role: str
    keyid: str
    kind: str
    threshold: int
    uri: str
    is_here: str
    days_left: int


def overview(folder: Path, now: datetime) -> list[KeyRow]:
    """List who signs what; bins are left out, they are signed as their model.

    Raises:
        UsageError: there is no fleet.
    """
    custody = Custody(folder)
    draft = Draft.of(custody, now)
    until = {"root": draft.root.expires, TOP: draft.role(TOP).expires, **draft.until()}
    pairs = [(role, keyid) for role in metadata.ROLES for keyid in draft.root.roles[role].keyids]
    rows = [(role, draft.root.roles[role], draft.root.get_key(keyid)) for role, keyid in pairs]
    for role, found in delegations.children(draft.role(TOP)).items():
        rows.append((role, found, draft.key_of(role)))
        until[role] = draft.role(role).expires
    return [
        KeyRow(
            role, key.keyid, key.scheme, found.threshold, custody.ring.keys.get(key.keyid, ""),
            custody.sees(key.keyid),
            (until[role] - now).days,
        )
        for role, found, key in rows
    ]  # fmt: skip


def pending(folder: Path) -> Metadata[Root] | None:
    """Return the root that waits for signatures; leftovers of a call that was killed are none."""
    wanted = metadata.current_root(folder).signed.version + 1
    path = folder / "pending" / f"{wanted}.root.json"
    return metadata.parse(path.read_bytes(), path) if path.is_file() else None


def missing(made: Metadata[Root], before: Root) -> int:
    """Return how many signatures a root lacks, of its own keys and of those of the root before."""
    result = made.signed.get_root_verification_result(before, made.signed_bytes, made.signatures)
    return max(result.first.missing, result.second.missing)


def _place(folder: Path, made: Metadata[Root]) -> Path:
    return folder / "pending" / f"{made.signed.version}.root.json"


def _require_none_pending(folder: Path) -> None:
    if made := pending(folder):
        raise UsageError(
            f"root {made.signed.version} waits for signatures: {_place(folder, made)}",
            f"sign it: edgekit ota sign {folder}, or give it up: edgekit ota sign {folder} --drop",
        )


def _resolve(draft: Draft, name: str) -> list[tuple[str, str]]:
    """Return the pairs of role and key that a name stands for."""
    pairs = [(role, keyid) for role in metadata.ROLES for keyid in draft.root.roles[role].keyids]
    pairs += [(role, draft.key_of(role).keyid) for role in delegations.children(draft.role(TOP))]
    own = {keyid for role, keyid in pairs if role in metadata.ROLES}
    found = [pair for pair in pairs if pair[0] == name]
    if name == "models" and draft.custody.ring.models:
        found = [("models", draft.custody.ring.models)]
    elif not found and len(name) >= MIN_KEYID:
        found = [(role, keyid) for role, keyid in pairs if keyid.startswith(name)]
        # The targets key signs models too, by default; they come with it.
        found = [pair for pair in found if pair[0] in metadata.ROLES or pair[1] not in own]
        if found and found[0][1] == draft.custody.ring.models:
            found = [("models", found[0][1])]
    if not found:
        raise UnknownName("role or key", name, {*(role for role, _ in pairs), *(keyid[:12] for _, keyid in pairs)})
    return found


def _next(before: Root, now: datetime) -> Root:
    after = deepcopy(before)
    after.version += 1
    after.expires = metadata.expiry("root", now)
    return after


def _replace(custody: Custody, after: Root, old: tuple[str, str], uri: str | None, *, may_drop: bool) -> None:
    role, keyid = old
    keyids = after.roles[role].keyids
    number = keyids.index(keyid) + 1
    name = f"{role}-{number}-v{after.version}" if len(keyids) > 1 else f"{role}-v{after.version}"
    after.revoke_key(keyid, role)
    if may_drop and uri is None and len(keyids) >= after.roles[role].threshold:
        return
    key = custody.adopt(uri) if uri else custody.make_beside(keyid, name)
    after.add_key(key, role)


def _propose(custody: Custody, before: Root, after: Root, now: datetime) -> Change:
    from tuf.api.metadata import Metadata

    custody.save()
    made: Metadata[Root] = Metadata(after)
    return _finish(custody, before, made, now)


def _finish(custody: Custody, before: Root, made: Metadata[Root], now: datetime) -> Change:
    """Sign with what is at hand; put the root in force, or have it wait."""
    for delegator in (before, made.signed):
        try:
            sign(made, "root", delegator, custody)
        except KeyAway:
            continue
    path = _place(custody.folder, made)
    new = [custody.ring.keys.get(keyid, "") for keyid in made.signed.keys if keyid not in before.keys]
    lacking = missing(made, before)
    if lacking or path.exists():  # signatures that came from far are kept, whatever happens next
        write_file(path, metadata.encode(made))
    if lacking:
        return Change(made.signed.version, lacking, path, new)
    draft = Draft.of(custody, now)
    _install(draft, before, made)
    path.unlink(missing_ok=True)
    return Change(made.signed.version, made=new, dropped=_forget(draft, made.signed))


def _forget(draft: Draft, root: Root) -> list[str]:
    """Strike the keys that nothing is signed with any more; return their addresses."""
    kept = {*root.keys, draft.custody.ring.models, *(draft.key_of(role).keyid for role in draft.roles()[1:])}
    dropped = draft.custody.forget(kept)
    draft.custody.save()
    return dropped


def _install(draft: Draft, before: Root, made: Metadata[Root]) -> None:
    after = made.signed
    root = [(f"{after.version}.root", metadata.encode(made))]
    if all(before.roles[role].keyids == after.roles[role].keyids for role in (TOP, *ONLINE)):
        draft.write(root)
        return
    if before.roles[TOP].keyids != after.roles[TOP].keyids:
        draft.change(TOP)
        lost = set(before.roles[TOP].keyids) - set(after.roles[TOP].keyids)
        for role in delegations.children(draft.role(TOP)):
            if draft.key_of(role).keyid in lost:
                catalogue.hand_over(draft, role, after.get_key(after.roles[TOP].keyids[0]))
    try:
        draft.write([*draft.seal(before, after), *root])
    except KeyAway:  # an old key is lost: between root and timestamp a device that asks is turned away
        sealed = draft.seal(after)
        draft.write([*root, *sealed])


def _hand_over(draft: Draft, models: Sequence[tuple[str, str]], uri: str | None) -> Change:
    """Have models signed by another key; the top-level targets key says so, and no root is needed."""
    custody = draft.custody
    for role, keyid in models:
        name = f"{role}-v{draft.role(TOP).version + 1}"
        key = custody.adopt(uri) if uri else custody.make_beside(keyid, name)
        if role == "models":
            custody.ring.models = key.keyid
        for child in delegations.children(draft.role(TOP)):
            if child == role or (role == "models" and draft.key_of(child).keyid == keyid):
                catalogue.hand_over(draft, child, key)
    custody.save()
    draft.commit()
    return Change(draft.root.version, made=[custody.ring.keys[key.keyid]], dropped=_forget(draft, draft.root))
