"""``edgekit ota publish``: sign a bundle as the next version of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet, _limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.ota.deltas.listing import Delta
    from edgekit.ota.release import Release


@command(name="publish")
@_fleet.folder
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="The line of versions it belongs to. [default: the bundle's name]")
@click.option("--version", type=click.IntRange(1), help="[default: the last one plus one]")
@click.option("--target", "targets", multiple=True, help="Hardware class, repeatable. [default: all verified ones]")
@click.option(
    "--variants",
    help="Which of the bundle's a class tries, best first, as a,b. [default: the class's own, then CLASS.…]",
)
@_limits.options
@click.option(
    "--url", default="", help="https://… where a copy of FLEET/repository lies: devices read blobs there first."
)
@click.option(
    "--deltas",
    type=click.IntRange(0, 100),
    default=3,
    show_default=True,
    help="Make deltas from so many versions before; 0: none.",
)
@click.option("--key", help="Address of a key of the model's own, if it is new. [default: the one of all models]")
@_custody.options
@click.option("--allow-unverified", is_flag=True, help="Also sign variants that were neither run nor evaluated.")
def COMMAND(  # noqa: N802, PLR0913  # the name the frame looks for; one parameter an option
    terminal: Terminal,
    *,
    fleet: Path,
    bundle: Path,
    model: str | None,
    version: int | None,
    targets: tuple[str, ...],
    variants: str | None,
    url: str,
    deltas: int,
    allow_unverified: bool,
    key: str | None,
    **flags: Any,  # noqa: ANN401  # as click typed it
) -> None:
    """Sign BUNDLE as the next version of its model, one release per hardware class."""
    import msgspec

    from edgekit import bundle as bundles
    from edgekit.cli.ota._fleet import now
    from edgekit.errors import EdgekitError
    from edgekit.ota.server import publisher

    _fleet.reach(fleet)
    unlock = _custody.unlock(flags)
    releases = publisher.publish(
        fleet,
        bundles.read(bundle),
        now=now(),
        model=model,
        version=version,
        profiles=list(targets) or None,
        limits=_limits.limits(flags),
        variants=[name.strip() for name in variants.split(",")] if variants else (),
        replaces=_limits.replaces(flags),
        url=url,
        allow_unverified=allow_unverified,
        key=key,
        unlock=unlock,
    )
    made: dict[str, tuple[Delta, ...]] = {}
    if deltas:
        try:
            made = publisher.add_deltas(
                fleet, releases, now=now(), count=deltas, unlock=unlock, progress=terminal.progress
            )
        except EdgekitError as error:  # the release is signed: to fail now would have it published once more
            terminal.warn(f"published without deltas: {error}")
    first = releases[0]
    _record(fleet, releases)
    terminal.table(
        ("model", "version", "hardware class", "variants", "bundle", "deltas"),
        [
            (r.model, r.version, r.profile, ", ".join(r.order), r.bundle[:12], _told(made.get(r.path, ())))
            for r in releases
        ],
    )
    terminal.say(f"next: edgekit ota rollout start {fleet} {first.model} {first.version}")
    told = {path: [msgspec.to_builtins(one) for one in some] for path, some in made.items()}
    terminal.result({"releases": [msgspec.to_builtins(r) for r in releases], "deltas": told})


def _record(fleet: Path, releases: Sequence[Release]) -> None:
    first, classes = releases[0], {r.profile: r.bundle for r in releases}
    _fleet.record(fleet, "publish", f"{first.model} v{first.version}", classes=classes)


def _told(deltas: Sequence[Delta]) -> str:
    return ", ".join(f"{one.size:,} bytes" for one in deltas) or "none"
