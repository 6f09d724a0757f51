"""``edgekit ota revoke``: trust a key, or a device, no longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet

if TYPE_CHECKING:
    from pathlib import Path


@command(name="revoke")
@_fleet.folder
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--key", help="Address of the key in its place. [default: make one]")
@click.option("--device", "is_device", is_flag=True, help="NAME is a device: the broker lets it in no longer.")
@_custody.options
def COMMAND(  # noqa: N802  # the name the frame looks for
    terminal: Terminal,
    *,
    fleet: Path,
    names: tuple[str, ...],
    key: str | None,
    is_device: bool,
    **flags: Any,  # noqa: ANN401  # as click typed it
) -> None:
    """Trust the keys of NAME (a role, the beginning of a key id, authority) no longer: they were stolen or lost.

    A key that its role can do without gets no successor. With snapshot or timestamp both get new keys, so that devices
    forget what a thief signed in their name.
    """
    from edgekit.cli.ota._fleet import now
    from edgekit.ota.server import certificates, roots
    from edgekit.ota.server.keys import Custody

    _fleet.reach(fleet)
    custody = Custody(fleet, _custody.unlock(flags))
    if is_device:
        lists = [certificates.revoke(custody, name, now()) for name in names]
        _fleet.record(fleet, "revoke.device", ", ".join(names))
        terminal.say(f"wrote {lists[-1]}; a running Mosquitto reads it when it gets SIGHUP")
        terminal.result({"revoked": names, "list": lists[-1]})
        return
    if names == ("authority",):
        certificates.replace_authority(custody, now())
        _fleet.record(fleet, "revoke.authority", "authority")
        terminal.say("another authority: provision broker, server and every device anew, then broker-config")
        terminal.result({"authority": custody.ring.authority})
        return
    rotation = roots.rotate(custody, names, now(), uri=key, is_compromised=True)
    _fleet.record(fleet, "revoke.key", ", ".join(names))
    _custody.tell(terminal, fleet, rotation)
