"""``edgekit ota init``: make the keys and the empty signed repository of a fleet."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from edgekit.cli._terminal import Terminal, command


@command(name="init")
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--name", default="fleet", show_default=True, help="The fleet's name in MQTT topics.")
def COMMAND(terminal: Terminal, *, fleet: Path, name: str) -> None:  # noqa: N802  # the name the frame looks for
    """Make the keys and the empty signed repository of a fleet in the folder FLEET."""
    from edgekit.cli.ota._fleet import now
    from edgekit.errors import MessageError, UsageError
    from edgekit.ota import messages
    from edgekit.ota.server import publisher
    from edgekit.ota.server.service import DATABASE
    from edgekit.ota.server.store import Store

    try:
        messages.topic(name, "+", "hello")
    except MessageError as error:
        raise UsageError(error.message, error.hint) from error
    fleet.mkdir(parents=True, exist_ok=True)
    # The name first: killed in between, a fleet without a repository is made anew, one without its name would lose it.
    with closing(Store(fleet / DATABASE, name)) as store:
        publisher.init(fleet, now())
        name = store.name
    root = fleet / "repository" / "metadata" / "1.root.json"
    terminal.say(f"made the fleet {name!r} in {fleet}; its private keys lie in {fleet / 'keys'}: keep them safe")
    terminal.say(f"give every device its root of trust: {root}")
    terminal.say(f"next: edgekit ota publish {fleet} BUNDLE")
    terminal.result({"fleet": name, "folder": fleet, "root": root})
