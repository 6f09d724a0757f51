"""``edgekit ota audit``: who did what to a fleet, and whether the log is as it was written."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _fleet

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.server.audit import Head

COMMAND = click.Group(name="audit", help="Show who did what to a fleet; check that nobody changed the log.")


@command(name="list")
@_fleet.folder
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="So many of the last lines.")
def list_(terminal: Terminal, *, fleet: Path, limit: int) -> None:
    """List what operators did, oldest first."""
    from edgekit.cli.ota._fleet import open_store, plain

    with closing(open_store(fleet)) as store:
        entries, head = store.audited()
    rows = [
        (
            one.seq, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at)), plain(one.who, 30), plain(one.action),
            plain(one.subject, 40), plain(one.details, 60),
        )
        for one in entries[-limit:]
    ]  # fmt: skip
    terminal.table(("line", "when", "who", "did", "to", "how"), rows)
    terminal.result({"entries": [_document(one) for one in entries[-limit:]], "head": str(head)})


@command(name="verify")
@_fleet.folder
@click.option("--head", "known", help="A head that was kept elsewhere, as this command prints it: LINE:HASH.")
def verify(terminal: Terminal, *, fleet: Path, known: str | None) -> None:
    """Check every line of the log against the next, and the last against the head beside it.

    Whoever may write the database may write another log with another head. Keep the head that this prints where he may
    not write, and give it back with --head.
    """
    from edgekit.cli.ota._fleet import open_store
    from edgekit.errors import TrustError
    from edgekit.ota.server.audit import faults

    kept = _head(known) if known else None
    with closing(open_store(fleet)) as store:
        entries, head = store.audited()
        found = faults(store.name, entries, head, kept)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise TrustError(
            f"the audit log of {store.name} is not as it was written: {found[0]}{more}", "look at a backup"
        )
    terminal.say(f"{len(entries)} lines, each as it was written")
    terminal.say(f"head, to be kept elsewhere: {head}")
    terminal.result({"lines": len(entries), "head": str(head)})


def _document(entry: msgspec.Struct) -> dict[str, object]:
    document = msgspec.structs.asdict(entry)
    return {**document, "details": msgspec.json.decode(document["details"])}


def _head(text: str) -> Head:
    import re

    from edgekit.errors import UsageError
    from edgekit.ota.server.audit import Head

    match = re.fullmatch(r"([0-9]{1,18}):([0-9a-f]{64})", text)
    if not match:
        raise UsageError(f"{text!r} is no head", "give what `edgekit ota audit verify` printed: LINE:HASH")
    return Head(int(match[1]), match[2])


for _command in (list_, verify):
    COMMAND.add_command(_command)
