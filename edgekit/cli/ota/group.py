"""``edgekit ota group``: which devices form a group, and what it runs where no rollout has said otherwise."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _fleet

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.ota.server.store import Group, Store

COMMAND = click.Group(name="group", help="Name groups of devices, and what their new members run.")
RULES = "next: edgekit ota broker-config, and let Mosquitto read its rules again (SIGHUP)"
_FLEET = _fleet.folder
_GROUP = click.argument("group")
_DEVICES = click.argument("devices", nargs=-1, required=True)


@command(name="add")
@_FLEET
@_GROUP
@_DEVICES
def add(terminal: Terminal, *, fleet: Path, group: str, devices: tuple[str, ...]) -> None:
    """Let DEVICES hear what GROUP is to run; then write the broker's rules anew, and start agents with --group.

    A device that is provisioned after this knows its groups by itself.
    """
    _change_members(terminal, fleet, group, lambda members: members | set(devices))


@command(name="remove")
@_FLEET
@_GROUP
@_DEVICES
def remove(terminal: Terminal, *, fleet: Path, group: str, devices: tuple[str, ...]) -> None:
    """Take DEVICES out of GROUP; then write the broker's rules anew."""
    _change_members(terminal, fleet, group, lambda members: members - set(devices))


@command(name="list")
@_FLEET
def list_(terminal: Terminal, *, fleet: Path) -> None:
    """List the groups, their devices and what they run."""
    from edgekit.cli.ota._fleet import open_store

    with closing(open_store(fleet)) as store:
        groups = store.groups()
    rows = [(name, one.wish.release if one.wish else "", ", ".join(one.members)) for name, one in groups.items()]
    terminal.table(("group", "runs", "devices"), rows)
    terminal.result({"groups": {name: msgspec.to_builtins(one) for name, one in groups.items()}})


@command(name="want")
@_FLEET
@_GROUP
@click.argument("model")
@click.argument("version", required=False, type=click.IntRange(1))
def want(terminal: Terminal, *, fleet: Path, group: str, model: str, version: int | None) -> None:
    """Let the devices of GROUP run VERSION (by default the newest) of MODEL where no rollout reached them.

    It reaches them all at once, each in the release for its own class: for devices that are new. What the fleet runs is
    changed by a rollout, in waves.
    """
    from edgekit.cli.ota._fleet import open_store
    from edgekit.cli.ota.rollout import published

    number, profiles = published(fleet, model, version)
    with closing(open_store(fleet)) as store:
        release = f"models/{model}/{profiles[0]}/{number}.json"
        changed = store.change_group(_identifier(group), lambda one: _wishing(store, group, one, release))
        store.note(group, f"its devices run version {number} of {model}", time.time())
    terminal.say(f"group {group} runs version {number} of {model}; a running `edgekit ota server` tells it")
    terminal.result({"group": msgspec.to_builtins(changed)})


@command(name="clear")
@_FLEET
@_GROUP
def clear(terminal: Terminal, *, fleet: Path, group: str) -> None:
    """Want nothing of GROUP any more; what its devices run goes on running."""
    from edgekit.cli.ota._fleet import open_store

    with closing(open_store(fleet)) as store:
        changed = store.change_group(_known(store, group), lambda one: msgspec.structs.replace(one, wish=None))
    terminal.say(f"group {group} has no wish any more")
    terminal.result({"group": msgspec.to_builtins(changed)})


def change_members(store: Store, group: str, how: Callable[[set[str]], set[str]]) -> Group:
    """Let other devices be in a group; see `UsageError` of `require_identifier` for names that cannot be."""

    def changed(one: Group) -> Group:
        members = tuple(_identifier(name) for name in sorted(how(set(one.members))))
        return msgspec.structs.replace(one, members=members)

    return store.change_group(_identifier(group), changed)


def _change_members(terminal: Terminal, fleet: Path, group: str, how: Callable[[set[str]], set[str]]) -> None:
    from edgekit.cli.ota._fleet import open_store

    with closing(open_store(fleet)) as store:
        after = change_members(store, group, how)
    terminal.say(f"group {group} has {len(after.members)} devices")
    terminal.say(RULES)
    terminal.result({"group": msgspec.to_builtins(after)})


def _wishing(store: Store, group: str, before: Group, release: str) -> Group:
    """Give a group its next wish: as a new deployment, so that devices which failed at the last one try again."""
    from edgekit.ota.messages import Desired
    from edgekit.ota.server import rollout
    from edgekit.ota.server.fleet import next_revision

    mine = [state for state in store.devices().values() if group in state.groups or state.id in before.members]
    met = [state.groups.get(group, 0) for state in mine]
    revision = next_revision([*met, before.wish.revision if before.wish else 0], time.time())
    wish = Desired(
        deployment=f"g-{group[:40]}-{revision}",
        release=release,
        version=int(Path(release).stem),
        revision=revision,
        spread=rollout.spread(len(mine)),
    )
    return msgspec.structs.replace(before, wish=wish)


def _known(store: Store, group: str) -> str:
    from edgekit.errors import UnknownName

    groups = store.groups()
    if group not in groups:
        raise UnknownName("group", group, groups)
    return group


def _identifier(name: str) -> str:
    from edgekit.ota.device.update import require_identifier

    require_identifier(name)
    return name


for _command in (add, remove, list_, want, clear):
    COMMAND.add_command(_command)
