"""``edgekit ota provision``: give a device, the server or the broker its identity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet, group

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgekit.ota.server.keys import Custody

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@command(name="provision", short_help="Write a device's identity: certificate, root of trust, class.")
@_fleet.folder
@click.argument("name")
@click.option(
    "--as",
    "part",
    default="device",
    show_default=True,
    type=click.Choice(["device", "server", "broker"]),
    help="What NAME is.",
)
@click.option("--profile", help="A device's hardware class; see: edgekit devices.")
@click.option("--broker", default="", help="Where a device finds its fleet: mqtts://HOST:8883.")
@click.option("--group", "groups", multiple=True, help="Put a device into this group; it is in those it was in, too.")
@click.option("--host", "hosts", multiple=True, help="Another name or address of the broker.")
@click.option("--csr", type=FILE, help="Certify this request: its key was made on the device and stays there.")
@click.option("--days", default=730, show_default=True, type=click.IntRange(1, 7300), help="For so long it is good.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder to write to.")
@_custody.options
def COMMAND(terminal: Terminal, *, fleet: Path, name: str, output: Path, **flags: Any) -> None:  # noqa: N802, ANN401  # the frame's name; flags
    """Write the identity of the device NAME of the fleet in the folder FLEET into a folder of its own.

    The device starts from it with: edgekit ota agent --identity FOLDER. A server is called edgekit-server, a broker as
    its clients reach it.
    """
    from edgekit.durable import new_folder
    from edgekit.errors import UsageError
    from edgekit.ota import identity
    from edgekit.ota.server.keys import Custody

    if output.exists():
        raise UsageError(f"{output} is there already", "name a new folder with -o")
    custody = Custody(fleet, _custody.unlock(flags))
    files = _files(custody, name, flags)
    with new_folder(output) as folder:
        for file, data in files.items():
            (folder / file).write_bytes(data)
        if identity.KEY in files:
            (folder / identity.KEY).chmod(0o600)
    terminal.say(f"wrote {output}: {', '.join(sorted(files))}")
    if identity.KEY not in files:
        terminal.say(f"the device puts its own key beside them, as {identity.KEY}")
    _fleet.record(fleet, "provision", name, part=flags["part"], days=flags["days"], csr=bool(flags["csr"]))
    if flags["groups"]:
        _join(fleet, name, flags["groups"])
        terminal.say(group.RULES)
    if flags["part"] == "device":
        terminal.say(f"on the device: edgekit ota agent --state DIR --identity {output.name}")
    terminal.result({"name": name, "as": flags["part"], "folder": output, "files": sorted(files)})


def _join(folder: Path, name: str, groups: Iterable[str]) -> None:
    from contextlib import closing

    from edgekit.cli.ota._fleet import open_store

    with closing(open_store(folder)) as store:
        for one in groups:
            group.change_members(store, one, lambda members: members | {name})


def _files(custody: Custody, name: str, flags: dict[str, Any]) -> dict[str, bytes]:
    from edgekit.cli.ota._fleet import now
    from edgekit.ota import identity
    from edgekit.ota.server import certificates, metadata
    from edgekit.ota.server.keys import tls_key

    made: dict[str, bytes] = {}
    if flags["part"] == "device":
        made = _device(custody.folder, name, flags)
    metadata.current_root(custody.folder)  # before a key is made: is there a fleet at all?
    if flags["csr"]:
        public = certificates.key_of_request(flags["csr"].read_bytes(), name)
    else:
        made[identity.KEY], public = tls_key()
    holder = certificates.Holder(name, flags["part"], flags["hosts"])
    made[identity.CERTIFICATE] = certificates.issue(custody, holder, public, now=now(), days=flags["days"])
    made[identity.AUTHORITY] = certificates.authority(custody, now())
    return made


def _device(folder: Path, name: str, flags: dict[str, Any]) -> dict[str, bytes]:
    from contextlib import closing

    from edgekit.cli.ota._fleet import open_store
    from edgekit.ota import identity
    from edgekit.ota.server import metadata

    _custody.require(flags["profile"], "a device has a hardware class", "--profile CLASS; see: edgekit devices")
    with closing(open_store(folder)) as store:
        fleet = store.name
        groups = sorted({*flags["groups"], *(of for of, one in store.groups().items() if name in one.members)})
    who = identity.Identity(
        fleet=fleet, device=name, profile=flags["profile"], broker=flags["broker"], groups=tuple(groups)
    )
    root = metadata.current_root(folder)
    # The newest root, not the first: keys that were revoked in between mean nothing to this device.
    return {
        identity.FILE: identity.encode(who),
        identity.ROOT: metadata.place(folder, f"{root.signed.version}.root").read_bytes(),
    }
