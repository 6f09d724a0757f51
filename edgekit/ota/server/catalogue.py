"""All that is signed of a model, whatever roles it lies in. Changes drafts only; signs and writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.ota.server import delegations
from edgekit.ota.server.delegations import TOP

if TYPE_CHECKING:
    from securesystemslib.signer import Key  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # re-exported without __all__

    from edgekit.ota.server.draft import Draft


def gather(draft: Draft, model: str) -> Targets:
    """Return a copy of all targets of a model, as if one role held them."""
    from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # re-exported without __all__

    name = delegations.role_of(model)
    parts = [draft.role(TOP)]
    if draft.has(name):
        parts += [draft.role(one) for one in (name, *delegations.children(draft.role(name))) if draft.has(one)]
    found = {path: target for part in parts for path, target in part.targets.items()}
    mine = {path: target for path, target in found.items() if delegations.model_in(path) == model}
    return Targets(version=1, expires=draft.now, targets=mine)


def settle(draft: Draft, model: str, book: Targets, uri: str | None = None) -> None:
    """Put the targets of a model where they belong: into a role of its own, spread over bins where it grows too long.

    ``uri``: the key of a model that is new, by default the one that signs them all.

    Raises:
        UsageError: the model is there, and another key signs it.
    """
    name = delegations.role_of(model)
    key = _key(draft, name, uri)
    before = delegations.digits_of(draft.role(name)) if draft.has(name) else 0
    digits, parts = delegations.split(name, book.targets, before)
    if digits > before:
        delegations.spread(draft.change(name), name, digits, key)
    for role, targets in parts.items():
        if not draft.has(role) or draft.role(role).targets != targets:
            draft.change(role).targets = targets


def migrate(draft: Draft) -> None:
    """Give the releases of a repository that was made before there were delegations roles of their own."""
    flat = {delegations.model_in(path) for path in draft.role(TOP).targets}
    for model in sorted(flat):
        settle(draft, model, gather(draft, model))
    if flat:
        draft.change(TOP).targets = {}


def hand_over(draft: Draft, role: str, key: Key) -> None:
    """Have a model signed by another key from now on."""
    delegations.delegate(draft.change(TOP), role, key)
    mine = draft.change(role)
    if digits := delegations.digits_of(mine):
        delegations.spread(mine, role, digits, key)
        for name in delegations.children(mine):
            draft.change(name)


def _key(draft: Draft, role: str, uri: str | None) -> Key:
    if role in delegations.children(draft.role(TOP)):
        key = draft.key_of(role)
        if uri is not None and draft.custody.adopt(uri).keyid != key.keyid:
            raise UsageError(
                f"{delegations.model_of(role)} is signed by key {key.keyid[:12]}, not by {uri}",
                f"hand it over: edgekit ota rotate FLEET {role} --key {uri}",
            )
        return key
    key = draft.custody.adopt(uri) if uri is not None else _usual(draft)
    delegations.delegate(draft.change(TOP), role, key)
    return key


def _usual(draft: Draft) -> Key:
    ring = draft.custody.ring
    if ring.models:
        return draft.custody.adopt(ring.keys[ring.models])
    return draft.root.get_key(draft.root.roles[TOP].keyids[0])
