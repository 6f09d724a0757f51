"""``edgekit ota status``: the devices of a fleet and its rollouts, now or again and again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli._terminal import Terminal, command
from edgekit.cli.ota import _fleet

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.rollout import Rollout
    from edgekit.ota.server.store import Store


@command(name="status")
@_fleet.folder
@click.option("--watch", is_flag=True, help="Show it again every two seconds until interrupted.")
def COMMAND(terminal: Terminal, *, fleet: Path, watch: bool) -> None:  # noqa: N802  # the name the frame looks for
    """Show what every device runs and how the rollouts stand."""
    from edgekit.cli.ota._fleet import open_store

    store = open_store(fleet)
    try:
        while watch:
            click.clear()
            _show(terminal, store)
            time.sleep(2.0)
        _show(terminal, store)
    finally:
        store.close()


def _show(terminal: Terminal, store: Store) -> None:
    devices, rollouts = list(store.devices().values()), store.rollouts()
    online = sum(d.online for d in devices)
    terminal.say(f"fleet {store.name}: {len(devices)} devices, {online} online")
    if devices:
        terminal.table(
            ("device", "class", "online", "runs", "answer", "why", "alerts", "seen"), [_device_row(d) for d in devices]
        )
    if lost := [f"{d.id} {d.dropped}" for d in devices if d.dropped]:
        terminal.say(f"reports that had no room while their device was offline: {', '.join(lost)}")
    if rollouts:
        terminal.say()
        terminal.table(
            ("rollout", "status", "wave", "asked", "installed", "failed", "why"), [rollout_row(r) for r in rollouts]
        )
    terminal.result(
        {
            "fleet": store.name,
            "devices": [msgspec.to_builtins(d) for d in devices],
            "rollouts": [msgspec.to_builtins(r) for r in rollouts],
        }
    )


def _device_row(device: DeviceState) -> tuple[str, ...]:
    from edgekit.cli.ota._fleet import ago, plain

    return (
        device.id,
        device.profile or "?",
        "yes" if device.online else "no",
        f"{device.model} v{device.version}" if device.version else "-",
        "-" if device.outcome == "none" else device.outcome,
        plain(device.reason),
        plain(", ".join(dict.fromkeys(alert.kind for alert in device.alerts))) or "-",
        f"{ago(device.seen)} ago",
    )


def rollout_row(rollout: Rollout) -> tuple[str, ...]:
    """Return the cells of one rollout, as strings."""
    from edgekit.cli.ota._fleet import plain
    from edgekit.ota.server.rollout import FAILURES

    return (
        rollout.id,
        rollout.status,
        f"{rollout.wave + 1} of {len(rollout.plan.waves)}",
        str(len(rollout.assigned)),
        str(rollout.count("installed")),
        str(rollout.count(*FAILURES)),
        plain(rollout.reason, 100),
    )
