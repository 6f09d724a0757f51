"""What the fleet's owner signs: devices of this class may run this bundle, as this version, within these limits.

A release is a TUF target: its path is ``models/<model>/<profile>/<version>.json``, its content is the bundle's
manifest, so the signed hash is the bundle's digest; this struct travels in the target's ``custom`` field. What has its
default is left out there, so that agents which do not know a newer field read every release that does not use it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from edgekit.errors import TrustError
from edgekit.manifest import Digest, Name

Version = Annotated[int, msgspec.Meta(ge=1, le=999_999_999)]
DELTAS = ".deltas.json"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the device must measure to keep the release. ``None``: not judged."""

    max_p95_ms: float | None = None
    max_rss_mib: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Most memory that the try-out's process may ever hold, the interpreter's own included."""
    max_load_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_error_rate: float = 0.02
    min_agreement: float | None = None
    """Least share of live requests on which old and new model answer alike, as docs/wire.md says for each kind."""
    probation_requests: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 20
    probation_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    shadow_requests: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    """So many answers of the old model are compared before the new one gives its first; 0: it answers at once."""
    shadow_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0


class Replaces(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a release may take the place of: its own model from a version on, and other models at any version."""

    version: Annotated[int, msgspec.Meta(ge=0, le=999_999_999)] = 0
    models: Annotated[tuple[Name, ...], msgspec.Meta(max_length=16)] = ()


ANYTHING = Replaces()

Url = Annotated[
    str,
    msgspec.Meta(
        max_length=500,
        pattern=r"^((https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])|http://(127\.0\.0\.1|localhost|\[::1\]))"
        r"(:[0-9]{1,5})?(/[A-Za-z0-9._~%-]+)*/?)?\Z",
    ),
]
"""Where a copy of the repository lies, over HTTPS, or over HTTP on this very machine; empty: nowhere."""


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One bundle, for one hardware class, as one version of one model; its blobs also lie at ``url``, if any.

    ``variants``: those of the class, the best first; a device runs the first that it can. None: the one that is named
    like the class.
    """

    model: Name
    profile: Name
    version: Version
    bundle: Digest
    limits: Limits = Limits()
    variants: Annotated[tuple[Name, ...], msgspec.Meta(max_length=16)] = ()
    replaces: Replaces = ANYTHING
    url: Url = ""

    @property
    def path(self) -> str:
        """The release's TUF target path."""
        return f"models/{self.model}/{self.profile}/{self.version}.json"

    @property
    def order(self) -> tuple[str, ...]:
        """The variants that a device may run, the best first."""
        return self.variants or (self.profile,)

    @property
    def foreign(self) -> tuple[str, ...]:
        """The variants in the order that belong to another class."""
        return tuple(name for name in self.order if not is_of_class(name, self.profile))

    @property
    def deltas_path(self) -> str:
        """The path of the target that lists the deltas to the release's files."""
        return f"{self.path.removesuffix('.json')}{DELTAS}"


def is_of_class(variant: str, profile: str) -> bool:
    """Say whether a variant was made for a hardware class: it is named like it, or like it with ``.something``."""
    return variant == profile or variant.startswith(f"{profile}.")


def is_release(path: str) -> bool:
    """Say whether a target of that path is a release, not a list of deltas to one."""
    return not path.endswith(DELTAS)


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
    except (msgspec.DecodeError, UnicodeError) as error:
        raise TrustError(f"the signed release is malformed: {error}", "sign it with: edgekit ota publish") from error
