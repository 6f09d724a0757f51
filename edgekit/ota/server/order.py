"""Which variants of a bundle the devices of each class may run, the best first. Reads a manifest, signs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import UnknownName, UsageError
from edgekit.ota.release import is_of_class

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.manifest import Manifest, Variant

PROVE = "export where the engine is installed, or pass --allow-unverified"


def of_classes(
    manifest: Manifest, profiles: Sequence[str] | None, variants: Sequence[str] = (), *, allow_unverified: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return the order of each class: of those named, by default of every class that a verified variant was made for.

    ``variants`` gives the order; what it leaves out is not signed. By default it is the variant named like the class,
    then the others of the class as the manifest lists them, the unverified left out.

    Raises:
        UnknownName: the bundle has no variant of that name, or none for that class.
        UsageError: a variant is unverified or of no class that is published, or nothing is left to publish.
    """
    wanted = [manifest.variant(name) for name in variants]
    for one in wanted:
        _require_proof(one, allow_unverified=allow_unverified)
    classes = list(dict.fromkeys(profiles)) if profiles else classes_of(manifest.variants)
    orders = {one: _order(manifest, one, wanted, allow_unverified=allow_unverified) for one in classes}
    if profiles:
        for name, order in orders.items():
            if not order:
                raise _nothing_for(manifest, name, wanted)
    orders = {one: order for one, order in orders.items() if order}
    if not orders:
        names = ", ".join(v.name for v in manifest.variants)
        raise UsageError(f"no variant of {manifest.name} was verified: {names}", PROVE)
    signed = {name for order in orders.values() for name in order}
    for one in wanted:
        if one.name not in signed:
            raise UsageError(
                f"the variant {one.name} is for none of {', '.join(orders)}", "name its class, or leave it out"
            )
    return orders


def classes_of(variants: Sequence[Variant]) -> list[str]:
    """Name the classes that variants were made for: ``a.fp32`` is one of ``a`` where there is an ``a`` too."""
    names = [one.name for one in variants]
    return [name for name in names if not any(is_of_class(name, other) for other in names if other != name)]


def _order(manifest: Manifest, profile: str, wanted: Sequence[Variant], *, allow_unverified: bool) -> tuple[str, ...]:
    if wanted:
        return tuple(dict.fromkeys(one.name for one in wanted if is_of_class(one.name, profile)))
    mine = sorted(
        (one for one in manifest.variants if is_of_class(one.name, profile)), key=lambda one: one.name != profile
    )
    return tuple(one.name for one in mine if allow_unverified or one.parity.status != "unverified")


def _nothing_for(manifest: Manifest, profile: str, wanted: Sequence[Variant]) -> UsageError:
    if wanted:
        return UsageError(
            f"none of the variants {', '.join(v.name for v in wanted)} is for {profile}", "name one that is"
        )
    mine = [one for one in manifest.variants if is_of_class(one.name, profile)]
    if not mine:
        return UnknownName("variant", profile, [v.name for v in manifest.variants])
    return UsageError(f"the variant {mine[0].name} is unverified: {mine[0].parity.reason or 'no reason given'}", PROVE)


def _require_proof(variant: Variant, *, allow_unverified: bool) -> None:
    if variant.parity.status == "unverified" and not allow_unverified:
        raise UsageError(
            f"the variant {variant.name} is unverified: {variant.parity.reason or 'no reason given'}", PROVE
        )
