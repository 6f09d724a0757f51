"""Every message on the wire: its topic, its type, its bounds. `docs/wire.md` is the specification.

Bytes become typed values here and nowhere else. Knows no broker and keeps no state.
"""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

import msgspec

from edgekit.errors import MessageError

MAX_MESSAGE_BYTES = 64 << 10
MAX_BLOCK_BYTES = 256 << 10
PREFIX = "edgekit/v1"

Identifier = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]
TargetPath = Annotated[
    str, msgspec.Meta(pattern=r"^models/[A-Za-z0-9._-]{1,100}/[A-Za-z0-9._-]{1,100}/[0-9]{1,9}\.json\Z")
]
BlockPath = Annotated[
    str,
    msgspec.Meta(pattern=r"^(metadata/[0-9a-z._-]{1,100}\.json|targets/[A-Za-z0-9._/-]{1,300}|blobs/[0-9a-f]{64})\Z"),
]

T = TypeVar("T")


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Desired(_Message, frozen=True, kw_only=True):
    """Retained, server to device: the release this device should run. Idempotent; says what, never how."""

    deployment: Identifier
    attempt: Count = 1
    release: TargetPath
    version: Count


class Hello(_Message, frozen=True, kw_only=True, tag="hello"):
    """Retained, device to server: who I am and what I run. The will of the connection is the same, offline."""

    device: Identifier
    profile: Identifier
    boot: Identifier
    online: bool
    release: str = ""
    version: Count = 0
    bundle: Digest = ""
    agent: Text = ""


class Installed(_Message, frozen=True, kw_only=True, tag="installed"):
    """The release was tried out, took over and stayed healthy through its probation."""

    device: Identifier
    deployment: Identifier
    attempt: Count
    version: Count
    bundle: Digest
    measured: dict[str, float] = {}


class RolledBack(_Message, frozen=True, kw_only=True, tag="rolled-back"):
    """The release was sound but misbehaved here; the old bundle serves again."""

    device: Identifier
    deployment: Identifier
    attempt: Count
    version: Count
    reason: Text
    measured: dict[str, float] = {}


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    """The release broke a rule of trust and was never loaded."""

    device: Identifier
    deployment: Identifier
    attempt: Count
    version: Count
    reason: Text


class Failed(_Message, frozen=True, kw_only=True, tag="failed"):
    """The transfer or the disk failed; the device will try again by itself."""

    device: Identifier
    deployment: Identifier
    attempt: Count
    version: Count
    reason: Text


class Health(_Message, frozen=True, kw_only=True, tag="health"):
    """How the served model did since the last report."""

    device: Identifier
    bundle: Digest
    requests: Count
    errors: Count
    p95_ms: float
    rss_mib: float = 0.0


Report = Hello | Installed | RolledBack | Refused | Failed | Health


class BlockRequest(_Message, frozen=True, kw_only=True):
    """Device to server, with response topic and correlation data: send me these bytes of the repository."""

    path: BlockPath
    offset: Count
    length: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCK_BYTES)]


class Block(_Message, frozen=True, kw_only=True):
    """The answer, in MessagePack: the bytes, the length of the whole file, or why there are none."""

    total: Count = 0
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_BLOCK_BYTES)] = b""
    error: Text = ""


def topic(fleet: str, device: str, leaf: str) -> str:
    """Return the topic of one device: ``desired``, ``hello``, ``report``, ``request`` or ``blocks``.

    Raises:
        MessageError: the fleet or the device is named in a way that could change the topic.
    """
    for name in (fleet, device):
        if name != "+" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise MessageError(f"{name!r} is no identifier", "use letters, digits, '.', '_' and '-', at most 64")
    return f"{PREFIX}/{fleet}/devices/{device}/{leaf}"


def device_of(topic_name: str) -> str:
    """Return the device a topic belongs to: the broker's ACL vouches for it, the payload does not."""
    parts = topic_name.split("/")
    if len(parts) != 6 or parts[3] != "devices":
        raise MessageError(f"{topic_name!r} is no topic of a device")
    return parts[4]


def encode(message: Desired | Report | BlockRequest) -> bytes:
    """Return the JSON of a message."""
    return msgspec.json.encode(message)


def decode(payload: bytes, kind: type[T]) -> T:
    """Parse untrusted JSON.

    Raises:
        MessageError: too long, no JSON, unknown field, or a value out of bounds.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {len(payload)} bytes is longer than {MAX_MESSAGE_BYTES}")
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageError(f"malformed message: {error}") from error


def encode_block(block: Block) -> bytes:
    """Return the MessagePack of a block."""
    return msgspec.msgpack.encode(block)


def decode_block(payload: bytes) -> Block:
    """Parse an untrusted block.

    Raises:
        MessageError: not MessagePack, unknown field, or too long.
    """
    if len(payload) > MAX_BLOCK_BYTES + 4096:
        raise MessageError(f"a block of {len(payload)} bytes is longer than {MAX_BLOCK_BYTES}")
    try:
        return msgspec.msgpack.decode(payload, type=Block)
    except msgspec.DecodeError as error:
        raise MessageError(f"malformed block: {error}") from error
