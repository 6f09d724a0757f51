"""``edgekit ota keys``: which key signs what, where it lies, and until when."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli._terminal import Terminal, command


@command(name="keys")
@click.argument("fleet", type=click.Path(path_type=Path))
def COMMAND(terminal: Terminal, *, fleet: Path) -> None:  # noqa: N802  # the name the frame looks for
    """List the roles of FLEET, their keys and thresholds, where each private key lies, and until when each is good."""
    from edgekit.cli.ota._fleet import now
    from edgekit.ota.server import roots

    rows = roots.overview(fleet, now())
    terminal.table(
        ("role", "key", "kind", "threshold", "private key", "here", "days left"),
        [(r.role, r.keyid[:12], r.kind, r.threshold, r.uri or "?", r.is_here, r.days_left) for r in rows],
    )
    waiting = roots.pending(fleet)
    if waiting:
        terminal.say(f"root {waiting.signed.version} waits for signatures: edgekit ota sign {fleet}")
    terminal.result(
        {
            "keys": [
                {
                    "role": r.role, "keyid": r.keyid, "kind": r.kind, "threshold": r.threshold,
                    "private_key": r.uri, "here": r.is_here, "days_left": r.days_left,
                }
                for r in rows
            ],
            "pending_root": waiting.signed.version if waiting else None,
        }
    )  # fmt: skip
