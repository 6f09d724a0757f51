"""`edgekit demo`: the whole road on a real model, told as a story that checks what it claims."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli._terminal import Terminal, command

if TYPE_CHECKING:
    from edgekit.cli._demo.story import Story


@command(
    name="demo",
    short_help="Play the whole road on a real model, in a few minutes.",
    help="""Play the whole road on a real model: compress, export, bench, serve, sign, update over MQTT, roll back.

    Needs no server and no account: the broker is embedded and listens on loopback only. Everything lands in the
    folder OUT, with demo-report.html to look at. Exits with 1 if any claim of the story did not hold.
    """,
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder to write.",
)
def COMMAND(terminal: Terminal, *, output: Path) -> None:  # noqa: N802  # the name is the plugin's
    """Tell the story, write the report, leave with 1 if a claim did not hold."""
    from edgekit.cli._demo.story import Story
    from edgekit.errors import HealthError

    story = Story(terminal)
    try:
        _tell(story, output)
    except HealthError as error:  # what the story waited for did not happen: a claim that did not hold
        story.check("the story came to its end", error.message, holds=False)
    seconds = story.close()
    report = _write_report(story, output, seconds)
    terminal.say(f"\n{len(story.checks) - len(story.failed)} of {len(story.checks)} claims held, in {seconds:.0f} s.")
    terminal.say(f"report: {report}")
    terminal.say(f"go on with what it left: edgekit inspect {output}/efficientnet-v2.edgekit")
    terminal.say(f"                         edgekit ota status {output}/fleet")
    checks = [{"claim": c.claim, "holds": c.holds, "seen": c.seen} for c in story.checks]
    terminal.result({"seconds": round(seconds, 1), "output": str(output), "report": str(report), "checks": checks})
    for check in story.failed:
        click.echo(f"did not hold: {check.claim} ({check.seen})", err=True)
    if story.failed:
        raise SystemExit(1)


def _tell(story: Story, output: Path) -> None:
    from edgekit.cli._demo import fleet, language, models

    shop = models.Workshop(output.absolute(), _examples())
    shop.out.mkdir(parents=True, exist_ok=True)
    models.three_verbs(story, shop)
    whole, small = models.five_classes(story, shop)
    models.side_by_side(story, whole, small)
    language.talk(story, shop)
    fleet.play(story, shop, whole, small)


def _examples() -> Path:
    """Find the example workloads: beside the package in a checkout, inside it in an installed wheel."""
    from edgekit.errors import UsageError

    package = Path(__file__).parents[1]
    for folder in (package / "_examples", package.parent / "examples"):
        if (folder / "digits.py").is_file():
            return folder
    raise UsageError("the example workloads are missing", "install edgekit again, or run from a checkout")


def _write_report(story: Story, output: Path, seconds: float) -> Path:
    import platform

    from edgekit.cli._demo.report import page
    from edgekit.durable import write_file

    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    path = output.absolute() / "demo-report.html"
    write_file(path, page(story, seconds, machine).encode())
    return path
