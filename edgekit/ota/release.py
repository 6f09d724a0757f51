"""What the fleet's owner signs: devices of this class may run this bundle, as this version, within these limits.

A release is a TUF target: its path is ``models/<model>/<profile>/<version>.json``, its content is the bundle's
manifest, so the signed hash is the bundle's digest; this struct travels in the target's ``custom`` field.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from edgekit.errors import TrustError
from edgekit.manifest import Digest, Name


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the device must measure to keep the release. ``None``: not judged."""

    max_p95_ms: float | None = None
    max_error_rate: float = 0.02
    min_agreement: float | None = None
    """Least share of live requests on which old and new model agree about the best class."""
    probation_requests: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 20
    probation_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bundle, for one hardware class, as one version of one model."""

    model: Name
    profile: Name
    version: Annotated[int, msgspec.Meta(ge=1, le=999_999_999)]
    bundle: Digest
    limits: Limits = msgspec.field(default_factory=Limits)

    @property
    def path(self) -> str:
        """The release's TUF target path."""
        return f"models/{self.model}/{self.profile}/{self.version}.json"


class _Custom(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    release: Annotated[str, msgspec.Meta(max_length=10_000)]


def to_custom(release: Release) -> dict[str, str]:
    """Return a target's ``custom`` field: the release as JSON text, because TUF's canonical JSON has no fractions."""
    return {"release": msgspec.json.encode(release).decode()}


def from_custom(custom: object) -> Release:
    """Read a release out of a signed target's ``custom`` field.

    Raises:
        TrustError: the signed field holds something else.
    """
    try:
        return msgspec.json.decode(msgspec.convert(custom, _Custom).release, type=Release)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise TrustError(f"the signed release is malformed: {error}", "sign it with: edgekit ota publish") from error
