"""What a device is given before it leaves: who it is, its certificate, and its root of trust, in one folder.

The operator's side writes it, the device reads it; knows no network and opens no key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit.errors import UsageError
from edgekit.ota.messages import MAX_GROUPS, Identifier

if TYPE_CHECKING:
    from pathlib import Path

FILE = "identity.json"
CERTIFICATE, KEY, AUTHORITY, ROOT = "certificate.pem", "key.pem", "authority.pem", "root.json"


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who a device is and its ``groups``. ``broker``: where its fleet is reached; empty: it is told otherwise."""

    fleet: Identifier
    device: Identifier
    profile: Identifier
    broker: Annotated[str, msgspec.Meta(max_length=300)] = ""
    groups: Annotated[tuple[Identifier, ...], msgspec.Meta(max_length=MAX_GROUPS)] = ()


def encode(identity: Identity) -> bytes:
    """Return the JSON of an identity.

    Raises:
        UsageError: a name that could change a topic.
    """
    data = msgspec.json.format(msgspec.json.encode(identity)) + b"\n"
    _decode(data, "this identity")
    return data


def read(folder: Path) -> Identity:
    """Read who a device is.

    Raises:
        UsageError: the folder says it not, or not well.
    """
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder} is no device's identity: {FILE} is missing", "make one with: edgekit ota provision")
    return _decode(path.read_bytes(), str(path))


def _decode(data: bytes, what: str) -> Identity:
    try:
        return msgspec.json.decode(data, type=Identity)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} is malformed: {error}", "letters, digits, '.', '_' and '-', at most 64") from error
