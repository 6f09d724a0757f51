"""The signed list of deltas of one release: which old file, which new one, which delta, how long.

It is a TUF target of its own, so that the release stays small and an old device need not know of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgekit.errors import TrustError
from edgekit.manifest import Digest

MAX_BYTES = 1 << 20


class Delta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``deltas/<sha256>``, of ``size`` bytes, makes the file ``new`` of the file ``base``."""

    base: Digest
    new: Digest
    sha256: Digest
    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]


class Listing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All deltas to the files of one release."""

    format: Literal[1] = 1
    deltas: Annotated[tuple[Delta, ...], msgspec.Meta(max_length=3000)]


def encode(deltas: tuple[Delta, ...]) -> bytes:
    """Return the target's bytes."""
    return msgspec.json.encode(Listing(deltas=deltas))


def decode(data: bytes) -> tuple[Delta, ...]:
    """Parse a list that came from anywhere.

    Raises:
        TrustError: it is none, or of another format.
    """
    try:
        return msgspec.json.decode(data, type=Listing).deltas
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"the signed list of deltas is malformed: {error}", "publish the bundle again") from error
