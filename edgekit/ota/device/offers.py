"""What a repository offers a device that nobody told what to run: the newest version that is signed for its class.

Reads signed metadata alone; names of files say nothing. Knows TUF's roles, not who of them signs what.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.ota.device import trust
from edgekit.ota.release import from_custom

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import Delegations, Targets  # type: ignore[attr-defined]  # re-exported without __all__
    from tuf.ngclient.updater import Updater

    from edgekit.ota.device.fetchers import Fetcher
    from edgekit.ota.release import Release

MAX_ROLES = 1024
"""So many roles are read at most: a repository must not keep a device busy for ever."""
_PATH = re.compile(r"models/([A-Za-z0-9._-]{1,100})/([A-Za-z0-9._-]{1,100})/([0-9]{1,9})\.json")


def newest(state: Path, fetcher: Fetcher, profile: str, now: datetime, *, model: str | None = None) -> Release:
    """Bring the metadata up to date and return the highest version that it signs for a hardware class.

    ``model`` may be left out where there is one.

    Raises:
        UsageError: nothing is signed for that class, or several models are and none is named.
        TrustError, TransferError: as `trust.refresh_and_find`.
    """
    with trust.told_apart():
        updater = trust.refreshed(state, fetcher, now)
        versions: dict[str, set[int]] = {}
        for role in _roles(updater, f"models/{model}/{profile}/1.json" if model else None):
            for match in filter(None, map(_PATH.fullmatch, role.targets)):
                if match[2] == profile and model in (None, match[1]):
                    versions.setdefault(match[1], set()).add(int(match[3]))
        found = [
            one for name, numbers in sorted(versions.items()) if (one := _highest(updater, name, profile, numbers))
        ]
    if len(found) != 1:
        what = f"several models ({', '.join(one.model for one in found)})" if found else f"no release for {profile}"
        raise UsageError(f"the repository holds {what}", "name one with --model, or publish one for this class")
    return found[0]


def _highest(updater: Updater, model: str, profile: str, numbers: set[int]) -> Release | None:
    """Return the highest that TUF itself finds: a role may sign what nobody asked it for."""
    for number in sorted(numbers, reverse=True):
        path = f"models/{model}/{profile}/{number}.json"
        target = updater.get_targetinfo(path)
        if target is not None:
            release = from_custom(target.unrecognized_fields.get("custom"))
            if release.path == path:
                return release
    return None


def _roles(updater: Updater, path: str | None) -> Iterator[Targets]:
    """Yield the verified targets roles that may sign for a path, for ``None`` all of them."""
    waiting, seen = [("targets", "root")], set[str]()
    while waiting and len(seen) < MAX_ROLES:
        name, parent = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        role = updater._load_targets(name, parent)  # noqa: SLF001  # python-tuf looks paths up and lists nothing
        yield role
        if role.delegations is not None:
            waiting += [(child, name) for child in _children(role.delegations, path)]


def _children(delegations: Delegations, path: str | None) -> list[str]:
    if delegations.succinct_roles is not None:
        return list(delegations.succinct_roles.get_roles())  # bins by hash: any may hold a version
    roles = (delegations.roles or {}).values()
    return [role.name for role in roles if path is None or role.path_hash_prefixes or role.is_delegated_path(path)]
