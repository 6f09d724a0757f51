"""``edgekit ota rollout``: start one, look at it, pause, resume or abort it; the running server picks it up."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _fleet, _planning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.rollout import Rollout

COMMAND = click.Group(name="rollout", help="Bring a release to the fleet in waves that halt themselves.")
_FLEET = _fleet.folder
_NAME = click.argument("rollout")


@command(name="start")
@_FLEET
@click.argument("model")
@click.argument("version", required=False, type=click.IntRange(1))
@_planning.options
def start(terminal: Terminal, *, fleet: Path, model: str, version: int | None, **flags: Any) -> None:  # noqa: ANN401  # click hands the flags on
    """Bring VERSION (by default the newest) of MODEL to the fleet.

    With --roll-back name VERSION: a halt then takes the devices that run it to that newer version, which holds the old
    bundle. What would have happened says `edgekit ota simulate`.
    """
    from edgekit.cli.ota._fleet import open_store
    from edgekit.ota.server.turns import targets

    number, profiles = published(fleet, model, version)
    if flags["roll_back"]:
        _require_other_bundle(fleet, model, number, flags["roll_back"])
    with closing(open_store(fleet)) as store:
        devices = store.devices()
        plan = _planning.plan(flags, (model, number, profiles), devices)
        name, needs_two = _fleet.operator(), store.settings("approval").get("") == "two"
        rollout = store.start(plan, time.time(), lambda new: _from(new, name, needs_two=needs_two))
    if rollout.status == "proposed":
        terminal.say(f"proposed {rollout.id} for {', '.join(profiles)}; it waits for approval by somebody else")
        terminal.say(f"next: edgekit ota rollout approve {fleet} {rollout.id} --by NAME")
    else:
        terminal.say(f"started {rollout.id} for {', '.join(profiles)}; a running `edgekit ota server` picks it up")
        terminal.say(f"next: edgekit ota status {fleet} --watch")
    if rollout.boxed:
        terminal.say(f"{len(rollout.boxed)} devices sit out, they failed again and again: {', '.join(rollout.boxed)}")
    _tell_power(terminal, rollout, targets(plan, devices))
    terminal.result({"rollout": msgspec.to_builtins(rollout)})


def _from(new: Rollout, name: str, *, needs_two: bool) -> Rollout:
    from edgekit.ota.server.rollout import propose

    return propose(new, name) if needs_two else msgspec.structs.replace(new, started_by=name)


def _tell_power(terminal: Terminal, rollout: Rollout, targets: Sequence[DeviceState]) -> None:
    """Say before it begins what the first wave can find: a small canary proves little, whatever alpha is."""
    from edgekit.ota.server.judging import chance_to_find
    from edgekit.ota.server.strata import quotas, stratum_of

    how = rollout.plan.judging
    if how is None or not targets:
        return
    sizes: dict[tuple[str, ...], int] = {}
    for device in targets:
        one = stratum_of(device, rollout.plan)
        sizes[one] = sizes.get(one, 0) + 1
    canary = sum(quotas(rollout.plan.waves[0], sizes).values())
    chance = chance_to_find(canary, how, rollout.baseline)
    terminal.say(
        f"a canary of {canary} devices finds a rise of failures by {how.failures:.1%} of devices "
        f"with a probability of {chance:.0%}; later waves find more"
    )


def _require_other_bundle(fleet: Path, model: str, version: int, back: int) -> None:
    from edgekit.errors import UsageError
    from edgekit.ota.server import publisher

    published(fleet, model, back)
    bundles = {r.version: r.bundle for r in publisher.releases(fleet) if r.model == model}
    if bundles[version] == bundles[back]:
        raise UsageError(
            f"version {back} of {model} is the very bundle of version {version}",
            "publish the old bundle anew: edgekit ota publish FLEET OLD-BUNDLE",
        )


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


@command(name="retry-failed")
@_FLEET
@_NAME
def retry_failed(terminal: Terminal, *, fleet: Path, rollout: str) -> None:
    """Ask the devices that failed once more, as a new attempt; a rollout that is done runs again."""
    from edgekit.ota.server import rollout as rollouts

    _change(terminal, fleet, rollout, rollouts.retry)


@command(name="promote")
@_FLEET
@_NAME
@click.argument("wave", required=False, type=click.IntRange(1))
def promote(terminal: Terminal, *, fleet: Path, rollout: str, wave: int | None) -> None:
    """Open WAVE (by default the next) by hand, without waiting for the one before; halting goes on."""
    from edgekit.ota.server import rollout as rollouts

    _change(terminal, fleet, rollout, lambda one: rollouts.promote(one, wave - 1 if wave else None))


@command(name="approve")
@_FLEET
@_NAME
def approve(terminal: Terminal, *, fleet: Path, rollout: str) -> None:
    """Let a proposed rollout begin; somebody else has to than who proposed it."""
    from edgekit.cli.ota._fleet import open_store
    from edgekit.ota.server import rollout as rollouts

    with closing(open_store(fleet)) as store, store.transaction():
        changed = store.change(rollout, lambda one: rollouts.approve(one, _fleet.operator()), time.time())
        store.supersede(changed.plan, changed.id, time.time())
        store.note(changed.id, f"approved by {changed.approved_by}", time.time())
    terminal.say(f"{changed.id} is {changed.status}, approved by {changed.approved_by}")
    terminal.result({"rollout": msgspec.to_builtins(changed)})


@command(name="require-approval")
@_FLEET
@click.argument("people", type=click.Choice(["one", "two"]))
def require_approval(terminal: Terminal, *, fleet: Path, people: str) -> None:
    """Let rollouts of this fleet begin by the word of one person, or of two.

    It keeps an honest operator from a slip. Whoever can write the fleet's folder can undo it.
    """
    from edgekit.cli.ota._fleet import open_store

    with closing(open_store(fleet)) as store:
        store.change_setting("approval", lambda _: people if people == "two" else "")
        store.note("fleet", f"rollouts begin by the word of {people}", time.time())
    terminal.say(f"rollouts begin by the word of {people}")
    terminal.result({"approval": people})


@command(name="roll-back")
@_FLEET
@_NAME
@click.argument("version", type=click.IntRange(1))
def roll_back(terminal: Terminal, *, fleet: Path, rollout: str, version: int) -> None:
    """Take the devices that run what ROLLOUT brought to VERSION, the old bundle published anew, all at once.

    The rollout ends, where it has not yet.
    """
    from edgekit.cli.ota._fleet import open_store
    from edgekit.ota.server import rollout as rollouts

    with closing(open_store(fleet)) as store:
        plan = rollouts.back(store.rollout(rollout), version)
        published(fleet, plan.model, version)
        _require_other_bundle(fleet, plan.model, store.rollout(rollout).plan.version, version)
        started = store.start(plan, time.time())
    terminal.say(f"started {started.id}: whoever runs {plan.where.replace(' =', '')} goes to {version}")
    terminal.result({"rollout": msgspec.to_builtins(started)})


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


_COMMANDS = (start, list_, show, pause, resume, abort, retry_failed, promote, approve, require_approval, roll_back)
for _command in _COMMANDS:
    COMMAND.add_command(_command)
