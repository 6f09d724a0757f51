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
MAX_ALERTS = 16
MAX_GROUPS = 16
MAX_FACTS = 32
MAX_SPREAD = 86_400.0
PREFIX = "edgekit/v1"

Identifier = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Fact = Annotated[str, msgspec.Meta(max_length=200)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]
TargetPath = Annotated[
    str, msgspec.Meta(pattern=r"^models/[A-Za-z0-9._-]{1,100}/[A-Za-z0-9._-]{1,100}/[0-9]{1,9}\.json\Z")
]
BlockPath = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^(metadata/[0-9a-z._-]{1,240}\.json|targets/[A-Za-z0-9._/-]{1,300}|(blobs|deltas)/[0-9a-f]{64})\Z"
    ),
]

T = TypeVar("T")


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Desired(_Message, frozen=True, kw_only=True):
    """Retained, server to device or group: the release to run. Idempotent; says what, never how.

    ``revision`` only rises on one topic (Unix milliseconds of the server, or one more than before): an older one that
    comes again is ignored. Devices begin to download within ``spread`` seconds, each at its own time.
    """

    deployment: Identifier
    attempt: Count = 1
    release: TargetPath
    version: Count
    revision: Count = 0
    spread: Annotated[float, msgspec.Meta(ge=0, le=MAX_SPREAD)] = 0.0


class Hello(_Message, frozen=True, kw_only=True, tag="hello"):
    """Retained, device to server: who I am and what I run. The will of the connection is the same, offline.

    ``revision`` is the highest that was met on the device's own topic, ``groups`` are those it obeys, each with its.
    ``facts`` are what it says of itself beside its class, as the version of its runtime; an old device says none.
    """

    device: Identifier
    profile: Identifier
    boot: Identifier
    online: bool
    release: str = ""
    version: Count = 0
    bundle: Digest = ""
    agent: Text = ""
    revision: Count = 0
    groups: Annotated[dict[Identifier, Count], msgspec.Meta(max_length=MAX_GROUPS)] = {}
    facts: Annotated[dict[Identifier, Fact], msgspec.Meta(max_length=MAX_FACTS)] = {}


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


class Waiting(_Message, frozen=True, kw_only=True, tag="waiting"):
    """The device's own policy says not now; it goes on by itself, at ``until`` (Unix seconds; 0: nobody knows)."""

    device: Identifier
    deployment: Identifier
    attempt: Count
    version: Count
    reason: Text
    until: Count = 0


class Health(_Message, frozen=True, kw_only=True, tag="health"):
    """How the served model did since the last report; ``dropped`` reports were lost for want of room so far.

    ``number`` rises by one with each report of a ``boot``, so that the server counts each once; 0: an old device.
    """

    device: Identifier
    bundle: Digest
    requests: Count
    errors: Count
    p95_ms: float
    rss_mib: float = 0.0
    dropped: Count = 0
    boot: Annotated[str, msgspec.Meta(max_length=64)] = ""
    number: Count = 0


class Alert(_Message, frozen=True, kw_only=True):
    """What is not as it was: ``value`` is above ``limit``, since a time of the device's clock (Unix seconds)."""

    kind: Identifier
    what: Annotated[str, msgspec.Meta(max_length=200)]
    value: float
    limit: float
    since: float


class Drift(_Message, frozen=True, kw_only=True, tag="drift"):
    """All that is not as it was with the served model's requests and the device; empty: nothing any more.

    Said with each health from the first alert of a boot on, so that a lost one does no harm.
    """

    device: Identifier
    bundle: Digest
    alerts: Annotated[tuple[Alert, ...], msgspec.Meta(max_length=MAX_ALERTS)]


class Chosen(_Message, frozen=True, kw_only=True, tag="chosen"):
    """Which of a release's variants runs, and for each better one in the signed order why it does not."""

    device: Identifier
    bundle: Digest
    variant: Annotated[str, msgspec.Meta(max_length=100)]
    left: Annotated[dict[str, Annotated[str, msgspec.Meta(max_length=500)]], msgspec.Meta(max_length=16)] = {}


Report = Hello | Installed | RolledBack | Refused | Failed | Waiting | Health | Drift | Chosen


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
    _require_identifiers(fleet, device)
    return f"{PREFIX}/{fleet}/devices/{device}/{leaf}"


def group_topic(fleet: str, group: str) -> str:
    """Return the topic on which a group of devices is told what to run.

    Raises:
        MessageError: the fleet or the group is named in a way that could change the topic.
    """
    _require_identifiers(fleet, group)
    return f"{PREFIX}/{fleet}/groups/{group}/desired"


def _require_identifiers(*names: str) -> None:
    for name in names:
        if name != "+" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise MessageError(f"{name!r} is no identifier", "use letters, digits, '.', '_' and '-', at most 64")


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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"malformed block: {error}") from error
