"""``edgekit ota init``: make the keys and the empty signed repository of a fleet."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _custody, _fleet


@command(name="init")
@_fleet.folder
@click.option(
    "--blobs", help="Keep what devices fetch in s3://BUCKET/PREFIX, too; keys and endpoint by AWS_… variables."
)
@click.option("--name", default="fleet", show_default=True, help="The fleet's name in MQTT topics.")
@click.option(
    "--offline-keys",
    "offline",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the keys of root, targets and devices in this folder, which is then taken away. [default: FLEET/keys]",
)
@click.option("--root-keys", default=1, show_default=True, type=click.IntRange(1, 16), help="Make so many root keys …")
@click.option(
    "--root-threshold", default=1, show_default=True, type=click.IntRange(1, 16), help="… of which so many sign."
)
@click.option(
    "--encrypt/--no-encrypt", default=None, help="Put keys behind a passphrase. [default: those of --offline-keys]"
)
@_custody.options
def COMMAND(terminal: Terminal, *, fleet: Path, name: str, blobs: str | None, **flags: Any) -> None:  # noqa: N802, ANN401  # the frame's name; flags
    """Make the keys and the empty signed repository of a fleet in the folder FLEET."""
    from edgekit.cli.ota._fleet import now
    from edgekit.errors import MessageError, UsageError
    from edgekit.ota import messages
    from edgekit.ota.server import bucket, publisher, whereabouts
    from edgekit.ota.server.store import Store

    try:
        messages.topic(name, "+", "hello")
    except MessageError as error:
        raise UsageError(error.message, error.hint) from error
    unlock = _custody.unlock(flags)
    keeping = publisher.Keeping(**flags)
    fleet.mkdir(parents=True, exist_ok=True)
    if url := _fleet.told(_fleet.DATABASE):
        whereabouts.note(fleet, url, name)
    place, _ = whereabouts.find(fleet, url)
    if blobs:
        bucket.note(fleet, blobs)
    # The name first: killed in between, a fleet without a repository is made anew, one without its name would lose it.
    with closing(Store(place, name, who=_fleet.operator())) as store:
        publisher.init(fleet, now(), keeping, unlock)
        store.audit("init", store.name)
        name = store.name
    root = fleet / "repository" / "metadata" / "1.root.json"
    terminal.say(f"made the fleet {name!r} in {fleet}")
    for place, encrypted in dict.fromkeys(keeping.place(fleet, role) for role in ("timestamp", "root")):
        how = "encrypted" if encrypted else "NOT encrypted (mode 0600)"
        terminal.say(f"private keys lie in {place}, {how}: keep them safe")
    if keeping.offline:
        terminal.say(f"take {keeping.offline} away now; it is needed for new models, new devices and new keys")
    terminal.say(f"give every device its root of trust: {root}")
    terminal.say(f"next: edgekit ota publish {fleet} BUNDLE")
    terminal.result({"fleet": name, "folder": fleet, "root": root})
