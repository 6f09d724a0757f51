"""``edgekit ota broker-config``: the configuration of a Mosquitto for a fleet, by certificates and access rules."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _fleet, _identity

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@command(name="broker-config", short_help="Write a Mosquitto's configuration for a fleet.")
@_fleet.folder
@click.option("--ca", required=True, type=FILE, help="The authority of the devices' certificates (PEM).")
@click.option("--cert", required=True, type=FILE, help="The broker's certificate (PEM).")
@click.option("--key", required=True, type=FILE, help="Its key (PEM).")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8883, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option(
    "--server-name",
    default="edgekit-server",
    show_default=True,
    help="Common name of the certificate with which edgekit ota server comes; no device may be called so.",
)
@click.option("--worker", "workers", multiple=True, help="Also let in a worker: certificate for SERVER-NAME-WORKER.")
@_identity.option("ca", "cert", "key")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write to. [default: FLEET/broker]")
def COMMAND(  # noqa: N802  # the name the frame looks for
    terminal: Terminal, *, fleet: Path, server_name: str, workers: tuple[str, ...], output: Path | None, **where: object
) -> None:
    """Write mosquitto.conf and its access rules for the fleet in the folder FLEET.

    Clients come with a certificate of the authority; its common name is the device's name. Each device reads and writes
    its own topics only, and reads what its groups run (edgekit ota group): run this again when those change.
    """
    from contextlib import closing

    from edgekit.cli.ota._fleet import open_store
    from edgekit.durable import write_file
    from edgekit.errors import MessageError, UsageError
    from edgekit.ota.server import certificates, mosquitto

    with closing(open_store(fleet)) as store:
        name, groups = store.name, {one: group.members for one, group in store.groups().items()}
    folder = (output or fleet / "broker").absolute()
    files = {one: Path(str(where[one])).absolute() for one in ("ca", "cert", "key")}
    revoked = fleet.absolute() / certificates.REVOKED
    place = mosquitto.Place(
        str(where["address"]),
        int(str(where["port"])),
        **{one: files[name] for one, name in (("ca", "ca"), ("certificate", "cert"), ("key", "key"))},
        revoked=revoked if revoked.is_file() and _is_own(fleet, files["ca"]) else None,
    )
    try:
        rules = mosquitto.acl(name, [server_name, *(f"{server_name}-{one}" for one in workers)], groups)
    except MessageError as error:
        raise UsageError(error.message, error.hint) from error
    told = mosquitto.config(place, folder / "acl")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "acl", rules.encode())
    write_file(folder / "mosquitto.conf", told.encode())
    url = f"mqtts://{place.address}:{place.port}"
    terminal.say(f"wrote {folder / 'mosquitto.conf'}: mosquitto -c {folder / 'mosquitto.conf'}")
    own = _is_own(fleet, files["ca"])
    identity = "--identity SERVER" if own else f"--broker-ca {files['ca']} --broker-cert CERT --broker-key KEY"
    source = f": edgekit ota provision {fleet} {server_name} --as server -o SERVER" if own else ""
    terminal.say(
        f"then: edgekit ota server {fleet} --broker {url} {identity}, with a certificate for {server_name}{source}"
    )
    terminal.result({"config": folder / "mosquitto.conf", "acl": folder / "acl", "url": url, "server": server_name})


def _is_own(fleet: Path, authority: Path) -> bool:
    """Say whether an authority is the fleet's own: another's certificates are on another's list."""
    from edgekit.ota.server import certificates

    own = fleet / certificates.AUTHORITY
    return own.is_file() and own.read_bytes() == authority.read_bytes()
