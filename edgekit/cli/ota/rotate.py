"""``edgekit ota rotate``: give a role another key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet

if TYPE_CHECKING:
    from pathlib import Path


@command(name="rotate")
@_fleet.folder
@click.argument("roles", nargs=-1, required=True, metavar="ROLE...")
@click.option("--key", help="Address of the new key: file:PATH, env:NAME, hsm:ID, awskms:ID … [default: make one]")
@_custody.options
def COMMAND(terminal: Terminal, *, fleet: Path, roles: tuple[str, ...], key: str | None, **flags: Any) -> None:  # noqa: N802, ANN401  # the frame's name; flags
    """Give ROLE (root, targets, snapshot, timestamp, models, model-NAME, or the beginning of a key id) another key."""
    from edgekit.cli.ota._fleet import now
    from edgekit.ota.server import roots
    from edgekit.ota.server.keys import Custody

    _fleet.reach(fleet)
    custody = Custody(fleet, _custody.unlock(flags))
    rotation = roots.rotate(custody, roles, now(), uri=key)
    _fleet.record(fleet, "rotate", ", ".join(roles))
    _custody.tell(terminal, fleet, rotation)
