"""``edgekit ota refresh``: sign anew what expires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet

if TYPE_CHECKING:
    from pathlib import Path


@command(name="refresh")
@_fleet.folder
@click.argument("roles", nargs=-1, metavar="[ROLE]...")
@_custody.options
def COMMAND(terminal: Terminal, *, fleet: Path, roles: tuple[str, ...], **flags: Any) -> None:  # noqa: N802, ANN401  # the frame's name; flags
    """Sign timestamp and snapshot anew, what has used up two thirds of its time, and ROLE whatever its age.

    A running `edgekit ota server` does so every day, but for keys that are kept elsewhere.
    """
    from edgekit.cli.ota._fleet import now
    from edgekit.ota.server import publisher, roots
    from edgekit.ota.server.keys import Custody

    _fleet.reach(fleet)
    opened = _custody.unlock(flags)
    warnings = publisher.refresh(fleet, now(), opened, [role for role in roles if role != "root"])
    _fleet.record(fleet, "refresh", ", ".join(roles) or "what expires")
    if "root" in roles:
        _custody.tell(terminal, fleet, roots.renew(Custody(fleet, opened), now()))
    else:
        terminal.result({"warnings": warnings})
    for warning in warnings:
        terminal.warn(warning)
    terminal.say("signed anew")
