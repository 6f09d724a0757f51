"""``edgekit ota rollout``: start one, look at it, pause, resume or abort it; the running server picks it up."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli._terminal import Terminal, command

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.ota.server.rollout import Rollout

COMMAND = click.Group(name="rollout", help="Bring a release to the fleet in waves that halt themselves.")
_FLEET = click.argument("fleet", type=click.Path(path_type=Path))
_NAME = click.argument("rollout")


@command(name="start")
@_FLEET
@click.argument("model")
@click.argument("version", required=False, type=click.IntRange(1))
@click.option("--waves", default="20%,100%", show_default=True, help="Cumulative shares of each hardware class.")
@click.option("--max-failures", default="0", show_default=True, help="Halt above this count, or share as 10%.")
@click.option("--dwell", default=0.0, show_default=True, help="Watch each wave so many seconds before the next.")
@click.option("--spread", type=float, help="Let downloads begin over so many seconds. [default: 10 devices a second]")
def start(  # noqa: PLR0913  # one parameter an option
    terminal: Terminal,
    *,
    fleet: Path,
    model: str,
    version: int | None,
    waves: str,
    max_failures: str,
    dwell: float,
    spread: float | None,
) -> None:
    """Bring VERSION (by default the newest) of MODEL to the fleet."""
    from edgekit.cli.ota._fleet import limit, open_store, share
    from edgekit.ota.server import rollout as rollouts

    number, profiles = published(fleet, model, version)
    with closing(open_store(fleet)) as store:
        reached = sum(device.profile in profiles for device in store.devices().values())
        plan = rollouts.Plan(
            model=model,
            version=number,
            profiles=profiles,
            waves=tuple(share(part) for part in waves.split(",")),
            max_failures=limit(max_failures),
            dwell=dwell,
            spread=rollouts.spread(reached) if spread is None else spread,
        )
        rollout = store.start(plan, time.time())
    terminal.say(f"started {rollout.id} for {', '.join(profiles)}; a running `edgekit ota server` picks it up")
    terminal.say(f"next: edgekit ota status {fleet} --watch")
    terminal.result({"rollout": msgspec.to_builtins(rollout)})


@command(name="list")
@_FLEET
def list_(terminal: Terminal, *, fleet: Path) -> None:
    """List all rollouts in the order they were started."""
    from edgekit.cli.ota._fleet import open_store
    from edgekit.cli.ota.status import rollout_row

    store = open_store(fleet)
    rollouts = store.rollouts()
    store.close()
    if not rollouts:
        terminal.say("no rollouts yet; start one with: edgekit ota rollout start")
    else:
        columns = ("rollout", "status", "wave", "asked", "installed", "failed", "why")
        terminal.table(columns, [rollout_row(r) for r in rollouts])
    terminal.result({"rollouts": [msgspec.to_builtins(r) for r in rollouts]})


@command(name="show")
@_FLEET
@_NAME
def show(terminal: Terminal, *, fleet: Path, rollout: str) -> None:
    """Show one rollout: whom it reached, how they answered, and its diary."""
    from edgekit.cli.ota._fleet import open_store, plain
    from edgekit.ota.server.plan import told

    store = open_store(fleet)
    found, events = store.rollout(rollout), store.events(rollout)
    store.close()
    why = f": {found.reason}" if found.reason else ""
    terminal.say(f"{found.id} is {found.status}{why}; waves {told(found.plan)}, wave {found.wave + 1} now")
    rows = [(d, a.profile, a.wave + 1, a.attempt, a.outcome) for d, a in found.assigned.items()]
    terminal.table(("device", "class", "wave", "attempt", "answer"), rows)
    for event in events:
        terminal.say(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.at))}  {plain(event.text, 200)}")
    terminal.result({"rollout": msgspec.to_builtins(found), "events": [e._asdict() for e in events]})


@command(name="pause")
@_FLEET
@_NAME
def pause(terminal: Terminal, *, fleet: Path, rollout: str) -> None:
    """Stop choosing devices; those already asked go on."""
    from edgekit.ota.server import rollout as rollouts

    _change(terminal, fleet, rollout, rollouts.pause)


@command(name="resume")
@_FLEET
@_NAME
def resume(terminal: Terminal, *, fleet: Path, rollout: str) -> None:
    """Go on; after a halt the devices that failed are asked once more."""
    from edgekit.ota.server import rollout as rollouts

    _change(terminal, fleet, rollout, rollouts.resume)


@command(name="abort")
@_FLEET
@_NAME
def abort(terminal: Terminal, *, fleet: Path, rollout: str) -> None:
    """End it for good; devices that have not installed the release are no longer asked to."""
    from edgekit.ota.server import rollout as rollouts

    _change(terminal, fleet, rollout, rollouts.abort)


def _change(terminal: Terminal, fleet: Path, name: str, how: Callable[[Rollout], Rollout]) -> None:
    from edgekit.cli.ota._fleet import open_store

    store = open_store(fleet)
    changed = store.change(name, how, time.time())
    store.close()
    terminal.say(f"{changed.id} is {changed.status}")
    terminal.result({"rollout": msgspec.to_builtins(changed)})


def published(fleet: Path, model: str, version: int | None) -> tuple[int, tuple[str, ...]]:
    """Return a signed version of a model, by default the newest, and its hardware classes.

    Raises:
        UnknownName: nobody signed that model, or that version of it.
    """
    from edgekit.errors import UnknownName
    from edgekit.ota.server import publisher

    signed = publisher.releases(fleet)
    mine = [r for r in signed if r.model == model]
    if not mine:
        raise UnknownName("model", model, {r.model for r in signed})
    number = version or max(r.version for r in mine)
    profiles = tuple(r.profile for r in mine if r.version == number)
    if not profiles:
        raise UnknownName(f"version of {model}", str(number), {str(r.version) for r in mine})
    return number, profiles


for _command in (start, list_, show, pause, resume, abort):
    COMMAND.add_command(_command)
