"""``edgekit ota devices``: what is known of each device, and the tags that the operator gives it."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _fleet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.store import Store

COMMAND = click.Group(name="devices", help="Look at devices, tag them, let them out of the penalty box.")
_FLEET = _fleet.folder


@command(name="list")
@_FLEET
@click.option("--where", default="", help="Only devices of which this holds: class = pi and tag.region = eu.")
def list_(terminal: Terminal, *, fleet: Path, where: str) -> None:
    """List the devices with their tags and facts."""
    from edgekit.cli.ota._fleet import open_store, plain
    from edgekit.ota.server import filters

    with closing(open_store(fleet)) as store:
        devices = _known(store)
    if where:
        devices = [one for one in devices if filters.matches(filters.parse(where), one)]
    rows = [
        (d.id, d.profile or "?", "yes" if d.online else "no", f"{d.model} v{d.version}" if d.version else "-",
         _pairs(d.tags), ", ".join(d.members), plain(d.facts.get("runtime", "")))
        for d in devices
    ]  # fmt: skip
    terminal.table(("device", "class", "online", "runs", "tags", "groups", "runtime"), rows)
    terminal.result({"devices": [msgspec.to_builtins(one) for one in devices]})


@command(name="show")
@_FLEET
@click.argument("device")
def show(terminal: Terminal, *, fleet: Path, device: str) -> None:
    """Show one device: its facts, how it does, and its diary."""
    from edgekit.cli.ota._fleet import ago, open_store, plain
    from edgekit.errors import UnknownName

    with closing(open_store(fleet)) as store:
        found = {one.id: one for one in _known(store)}
        events = store.events(device)
    if device not in found:
        raise UnknownName("device", device, found)
    one = found[device]
    state = "online" if one.online else "offline"
    terminal.say(f"{one.id} ({one.profile or '?'}) is {state}, seen {ago(one.seen)} ago")
    terminal.say(f"runs {one.model} v{one.version}" if one.version else "runs nothing that was installed over the air")
    rows = [("tag", *pair) for pair in one.tags.items()] + [("fact", *pair) for pair in one.facts.items()]
    terminal.table(("", "name", "value"), [(kind, plain(name), plain(value)) for kind, name, value in rows])
    for event in events:
        terminal.say(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.at))}  {plain(event.text, 200)}")
    terminal.result({"device": msgspec.to_builtins(one), "events": [event._asdict() for event in events]})


@command(name="tag")
@_FLEET
@click.argument("device")
@click.argument("tags", nargs=-1, required=True, metavar="KEY=VALUE...")
def tag(terminal: Terminal, *, fleet: Path, device: str, tags: tuple[str, ...]) -> None:
    """Give DEVICE tags, as region=eu; of a key that it has the value changes."""
    from edgekit.ota.server.labels import parse

    new = parse(tags)
    _change(terminal, fleet, device, lambda old: {**old, **new})


@command(name="untag")
@_FLEET
@click.argument("device")
@click.argument("keys", nargs=-1, required=True)
def untag(terminal: Terminal, *, fleet: Path, device: str, keys: tuple[str, ...]) -> None:
    """Take tags from DEVICE, by their keys."""
    _change(terminal, fleet, device, lambda old: {key: value for key, value in old.items() if key not in keys})


@command(name="release")
@_FLEET
@click.argument("devices", nargs=-1, required=True)
def release(terminal: Terminal, *, fleet: Path, devices: tuple[str, ...]) -> None:
    """Let DEVICES out of the penalty box: their failures so far are forgiven."""
    from edgekit.cli.ota._fleet import open_store
    from edgekit.ota.server import rollout as rollouts

    with closing(open_store(fleet)) as store, store.transaction():
        known = store.rollouts()
        for device in devices:
            store.change_setting(f"released/{_identifier(device)}", lambda _: known[-1].id if known else "")
        for one in known:
            store.change(one.id, lambda found: rollouts.release(found, devices), time.time())
    terminal.say(f"released {', '.join(devices)}")
    terminal.result({"released": list(devices)})


def _change(terminal: Terminal, fleet: Path, device: str, how: Callable[[dict[str, str]], dict[str, str]]) -> None:
    from edgekit.cli.ota._fleet import open_store
    from edgekit.ota.server.labels import tags_of, text_of

    with closing(open_store(fleet)) as store:
        text = store.change_setting(f"tags/{_identifier(device)}", lambda old: text_of(how(tags_of(old))))
        store.note(device, f"tags: {_pairs(tags_of(text)) or 'none'}", time.time())
    terminal.say(f"{device}: {_pairs(tags_of(text)) or 'no tags'}")
    terminal.result({"device": device, "tags": tags_of(text)})


def _known(store: Store) -> list[DeviceState]:
    """Return the devices with their labels as they are now: the server may not have looked yet, or not run."""
    from edgekit.ota.server.labels import labelled

    return list(labelled(store.devices(), store.settings("tags/"), store.groups()).values())


def _identifier(name: str) -> str:
    from edgekit.errors import UsageError
    from edgekit.ota.messages import Identifier

    try:
        return msgspec.convert(name, Identifier)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{name!r} is no device's name", "use letters, digits, '.', '_' and '-', at most 64"
        ) from error


def _pairs(tags: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in tags.items())


for _command in (list_, show, tag, untag, release):
    COMMAND.add_command(_command)
