"""What the operator says of devices: tags and groups. Parses and bounds them; does no I/O."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from edgekit.errors import ResourceError, UsageError
from edgekit.ota.messages import Identifier
from edgekit.ota.server.fleet import DeviceState, label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    class Grouping(Protocol):
        """What has members."""

        @property
        def members(self) -> tuple[str, ...]:
            """The devices that are in it."""
            ...

    G = TypeVar("G", bound=Grouping)

MAX_TAGS = 32
Value = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Tags = Annotated[dict[Identifier, Value], msgspec.Meta(max_length=MAX_TAGS)]


def tags_of(text: str) -> dict[str, str]:
    """Read the tags of one device as they are kept.

    Raises:
        ResourceError: they are damaged.
    """
    try:
        return msgspec.json.decode(text, type=Tags) if text else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResourceError(f"the database holds damaged tags: {error}", "restore a backup") from error


def text_of(tags: Mapping[str, str]) -> str:
    """Return tags as they are kept; empty for none.

    Raises:
        UsageError: too many, or a name or a value is none.
    """
    try:
        checked = msgspec.convert(dict(tags), Tags)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"these are no tags: {error}", f"at most {MAX_TAGS} of KEY=VALUE; keys of letters, digits, '.', '_' and '-'"
        ) from error
    return msgspec.json.encode(dict(sorted(checked.items()))).decode() if checked else ""


def parse(words: Sequence[str]) -> dict[str, str]:
    """Read tags as a person writes them, ``region=eu``.

    Raises:
        UsageError: a word is no tag.
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value or not re.fullmatch(r"[^\x00-\x1f\x7f]+", value):
            raise UsageError(f"{word!r} is no tag", "write it as region=eu")
        found[key] = value
    text_of(found)
    return found


def labelled(
    fleet: Mapping[str, DeviceState], tags: Mapping[str, str], groups: Mapping[str, G]
) -> dict[str, DeviceState]:
    """Return the devices with the tags and groups that the operator gave them; ``tags`` as they are kept, by device."""
    members: dict[str, list[str]] = defaultdict(list)
    for name, group in sorted(groups.items()):
        for device in group.members:
            members[device].append(name)
    return {
        name: label(state, tags_of(tags.get(name, "")), tuple(members.get(name, ()))) for name, state in fleet.items()
    }
