"""``edgekit ota``: sign releases, run the fleet's server, keep a device up to date, roll out in waves."""

from __future__ import annotations

from edgekit.cli import Commands

COMMAND = Commands(
    "edgekit.cli.ota",
    name="ota",
    help="Sign releases, bring them to a fleet over MQTT in waves, and see how it went.",
)
