"""``edgekit ota sign``: add signatures to a root that waits for them, here or where only a key is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody

if TYPE_CHECKING:
    from tuf.api.metadata import Root  # type: ignore[attr-defined]  # re-exported without __all__


@command(name="sign")
@click.argument("place", type=click.Path(path_type=Path, exists=True))
@click.option("--key", "uris", multiple=True, help="Sign with the key at this address: file:PATH, env:NAME, hsm:ID …")
@click.option(
    "--from", "carried", multiple=True, type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Take the signatures of this copy, which was signed elsewhere.",
)  # fmt: skip
@click.option("--drop", is_flag=True, help="Give the waiting root up instead.")
@_custody.options
def COMMAND(  # noqa: N802  # the name the frame looks for
    terminal: Terminal,
    *,
    place: Path,
    uris: tuple[str, ...],
    carried: tuple[Path, ...],
    drop: bool,
    **flags: Any,  # noqa: ANN401  # as click typed it
) -> None:
    """Sign what waits in PLACE: a fleet's folder, or a copy of its file in `pending` where only a key is."""
    from edgekit.cli.ota._fleet import now
    from edgekit.ota.server import roots
    from edgekit.ota.server.keys import Custody

    opened = _custody.unlock(flags)
    if place.is_file():
        _custody.require(uris, "no key is named", "give --key file:PATH, with ?encrypted behind it if it is")
        _show(terminal, roots.read_copy(place))
        count = roots.sign_copy(Custody(Path(), opened), place, uris)
        terminal.say(f"{place} has {count} signature(s); carry it back: edgekit ota sign FLEET --from {place.name}")
        terminal.result({"signatures": count})
        return
    if drop:
        roots.drop_pending(place)
        terminal.say("given up")
        terminal.result({"dropped": True})
        return
    custody = Custody(place, opened)
    for uri in uris:
        custody.adopt(uri)
    waiting = roots.pending(place)
    if waiting:
        _show(terminal, waiting.signed)
    _custody.tell(terminal, place, roots.sign_pending(custody, now(), carried))


def _show(terminal: Terminal, root: Root) -> None:
    """Show what is about to be signed: whoever signs answers for it."""
    terminal.say(f"root {root.version}, good until {root.expires:%Y-%m-%d}, trusts:")
    rows = [(role, one.threshold, ", ".join(key[:12] for key in one.keyids)) for role, one in root.roles.items()]
    terminal.table(("role", "threshold", "keys"), rows)
