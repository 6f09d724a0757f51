"""Which role signs which release: one role a model, spread over hashed bins where a role would grow too long.

Names and splits only; does no I/O and knows no private key. `docs/wire.md` is the specification.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

from edgekit.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from securesystemslib.signer import Key  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.api.metadata import DelegatedRole, TargetFile, Targets  # type: ignore[attr-defined]  # as above

TOP = "targets"
MODEL, BIN = "model-", "bins-"
MAX_TARGETS = 1000
"""So many targets a role holds at most: a device reads a whole role to look one of them up."""
MAX_DIGITS = 2


def role_of(model: str) -> str:
    """Return the role that signs a model: its name, an upper-case letter as ``_`` and the small one, ``_`` as ``__``.

    No two models share one, also where a disk knows no upper case.
    """
    return MODEL + _escaped(model)


def model_of(role: str) -> str:
    """Return the model of a role that `role_of` named."""
    letters, out = iter(role.removeprefix(MODEL)), ""
    for letter in letters:
        out += letter if letter != "_" else next(letters, "").upper() or "_"
    return out


def parent_of(role: str) -> str:
    """Return the role that says whose keys sign this one."""
    return MODEL + role.removeprefix(BIN).rpartition("-")[0] if role.startswith(BIN) else TOP


def model_in(path: str) -> str:
    """Return the model of a target's path."""
    return path.split("/")[1]


def delegate(parent: Targets, role: str, key: Key) -> None:
    """Have a model signed by this key from now on, whoever did before; its role says so of its bins."""
    from tuf.api.metadata import DelegatedRole  # type: ignore[attr-defined]  # re-exported without __all__

    paths = [f"models/{model_of(role)}/*/*"]
    _enter(parent, key, [DelegatedRole(role, [key.keyid], 1, terminating=True, paths=paths)])


def spread(parent: Targets, role: str, digits: int, key: Key) -> None:
    """Have the releases of a model signed in ``16 ** digits`` bins, by the hash of their paths."""
    from tuf.api.metadata import DelegatedRole  # type: ignore[attr-defined]  # re-exported without __all__

    prefixes = [f"{number:0{digits}x}" for number in range(16**digits)]
    bins = [
        DelegatedRole(_bin(role, one), [key.keyid], 1, terminating=True, path_hash_prefixes=[one]) for one in prefixes
    ]
    parent.delegations = None
    _enter(parent, key, bins)


def digits_of(role: Targets) -> int:
    """Return by how many hexadecimal digits of the hash a model's role is spread; 0: it is not."""
    bins = list(children(role).values())
    return len((bins[0].path_hash_prefixes or [""])[0]) if bins else 0


def children(role: Targets) -> dict[str, DelegatedRole]:
    """Return what a role delegates, by name."""
    return dict(role.delegations.roles or {}) if role.delegations else {}


def split(
    role: str, targets: Mapping[str, TargetFile], digits: int = 0
) -> tuple[int, dict[str, dict[str, TargetFile]]]:
    """Return by how many digits a model's targets are spread, and what each role holds; never fewer than ``digits``.

    Raises:
        ResourceError: there are more than the bins hold.
    """
    while _longest(targets, digits) > MAX_TARGETS:
        digits += 1
    if digits > MAX_DIGITS:
        raise ResourceError(
            f"{model_of(role)} has {len(targets)} releases, more than {16**MAX_DIGITS} bins of {MAX_TARGETS} hold",
            "publish it under another name from now on: --model",
        )
    if digits == 0:
        return 0, {role: dict(targets)}
    parts: dict[str, dict[str, TargetFile]] = {
        role: {}, **{_bin(role, f"{number:0{digits}x}"): {} for number in range(16**digits)}
    }  # fmt: skip
    for path, target in targets.items():
        parts[_bin(role, _hash(path)[:digits])][path] = target
    return digits, parts


def _enter(parent: Targets, key: Key, roles: Iterable[DelegatedRole]) -> None:
    from tuf.api.metadata import Delegations  # type: ignore[attr-defined]  # re-exported without __all__

    known = parent.delegations.keys if parent.delegations else {}
    entered = {**children(parent), **{role.name: role for role in roles}}
    used = {keyid for role in entered.values() for keyid in role.keyids}
    found = {**known, key.keyid: key}
    parent.delegations = Delegations({keyid: found[keyid] for keyid in sorted(used)}, entered)


def _escaped(model: str) -> str:
    return "".join(f"_{letter.lower()}" if letter == "_" or letter.isupper() else letter for letter in model)


def _bin(role: str, prefix: str) -> str:
    return f"{BIN}{role.removeprefix(MODEL)}-{prefix}"


def _hash(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()


def _longest(paths: Iterable[str], digits: int) -> int:
    if digits > MAX_DIGITS:
        return 0
    return max(Counter(_hash(path)[:digits] for path in paths).values(), default=0)
