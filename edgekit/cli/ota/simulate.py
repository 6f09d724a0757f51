"""``edgekit ota simulate``: what would have happened, had a plan met a fleet and a release like these."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli._terminal import Terminal, command

if TYPE_CHECKING:
    from edgekit.ota.server import simulation
    from edgekit.ota.server.scenario import Scenario


@command(name="simulate")
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--seed", default=0, show_default=True, help="The same seed tells the same story.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Play so many, from --seed on.")
@click.option(
    "--devices", type=click.IntRange(1, 1_000_000), help="How many devices. [default: as PLAN says, or 10000]"
)
def COMMAND(terminal: Terminal, *, plan: Path, seed: int, seeds: int, devices: int | None) -> None:  # noqa: N802  # the name the frame looks for
    """Play PLAN (TOML) over a made-up fleet by the code that decides for a real one, with a clock moved by hand.

    Says whom it reached, when it halted and why, and how many devices were hurt until then.
    """
    from edgekit.errors import UsageError
    from edgekit.ota.server import scenario, simulation

    try:
        known = scenario.parse(plan.read_text("utf-8"), str(plan))
    except UnicodeDecodeError as error:
        raise UsageError(f"{plan} is no text: {error}", "write it in UTF-8") from error
    if devices is not None:
        known = msgspec.structs.replace(known, fleet=msgspec.structs.replace(known.fleet, devices=devices))
    stories = []
    for number in range(seed, seed + seeds):
        terminal.progress("playing", number - seed, seeds)
        stories.append(simulation.play(known, number))
    terminal.wipe()
    if seeds == 1:
        _tell(terminal, known, stories[0])
    else:
        rows = [
            (seed + i, s.status, s.halted_by or "-", s.wave, f"{s.hours:.1f}", s.reached, s.hurt)
            for i, s in enumerate(stories)
        ]
        terminal.table(("seed", "status", "by", "wave", "hours", "reached", "hurt"), rows)
        halted = sum(s.status in ("halted", "aborted") for s in stories)
        terminal.say(f"{halted} of {seeds} halted; {sum(s.hurt for s in stories) / seeds:.1f} devices hurt in the mean")
    terminal.result({"stories": [msgspec.to_builtins(s) for s in stories], "seed": seed})


def _tell(terminal: Terminal, known: Scenario, story: simulation.Story) -> None:
    from edgekit.ota.server.plan import told
    from edgekit.ota.server.scenario import plan_of

    why = f": {story.reason}" if story.reason else ""
    terminal.say(f"{story.status} after {story.hours:.1f} h{why}")
    terminal.say(
        f"reached {story.reached} of {story.devices} devices, installed on {story.installed}, "
        f"failed on {story.failed}, hurt {story.hurt}, taken back {story.back}"
    )
    opened = ", ".join(f"{i + 1} after {hours:.1f} h" for i, hours in enumerate(story.opened))
    terminal.say(f"waves {told(plan_of(known))}; opened: {opened}")
    rows = [(*part.stratum, part.devices, part.reached, part.installed, part.failed, part.hurt) for part in story.parts]
    terminal.table(("class", *known.plan.strata, "devices", "reached", "installed", "failed", "hurt"), rows)
