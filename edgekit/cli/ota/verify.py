"""``edgekit ota verify``: check a whole repository as a device would."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgekit.cli._terminal import Terminal, command


@command(name="verify")
@click.argument("place", metavar="FLEET", type=click.Path(path_type=Path))
@click.option(
    "--root", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Begin with this root of trust, as a device that has it. [default: the first one]",
)  # fmt: skip
def COMMAND(terminal: Terminal, *, place: Path, root: Path | None) -> None:  # noqa: N802  # the name the frame looks for
    """Check the repository of FLEET (or a copy of one) as a device would: every root, signature, release and byte.

    The exit code is 10 where a device would refuse something, 7 or 8 where bytes are damaged or missing.
    """
    from edgekit.cli.ota import _verifying
    from edgekit.cli.ota._fleet import now

    repository, first = _verifying.root_of(place)
    verdict = _verifying.verify(repository, root.read_bytes() if root else first, now(), terminal.progress)
    terminal.wipe()
    terminal.table(
        ("role", "version", "keys", "targets", "expires", "days left"),
        [
            (r.role, r.version, r.keys, r.targets or "-", f"{r.expires:%Y-%m-%d %H:%M}", r.days_left)
            for r in verdict.rows
        ],
    )
    for warning in verdict.warnings:
        terminal.warn(warning)
    for problem in verdict.problems:
        click.echo(f"error: {problem.message}", err=True)
    if not verdict.problems:
        terminal.say(f"{verdict.roots} root(s), {verdict.releases} release(s) and {verdict.blobs} file(s) hold")
    terminal.result(
        {
            "roles": [asdict(row) for row in verdict.rows],
            "roots": verdict.roots,
            "releases": verdict.releases,
            "files": verdict.blobs,
            "warnings": verdict.warnings,
            "problems": [
                {"kind": type(p).__name__, "message": p.message, "hint": p.hint, "exit_code": p.exit_code}
                for p in verdict.problems
            ],
        }
    )
    if verdict.problems:
        click.get_current_context().exit(max(problem.exit_code for problem in verdict.problems))
