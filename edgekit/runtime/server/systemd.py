"""Tells systemd that the server is ready and lives (sd_notify(3)), and writes its unit. Knows no route."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WATCHDOG_SECONDS = 30


def notify(state: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send a state, as ``READY=1``, to who started this process; return whether anybody listens."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        return True
    return False


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return how often systemd wants to hear that the process lives: half of its patience; None where it does not."""
    microseconds, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or not int(microseconds) or process != str(os.getpid()):
        return None
    return int(microseconds) / 2e6


def unit(command: Sequence[str], description: str) -> str:
    """Return the unit of a service that runs ``command``, is restarted when it dies or hangs, and may write nothing."""
    return f"""[Unit]
Description={description.replace("%", "%%")}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={shlex.join(command).replace("%", "%%").replace("$", "$$")}
WatchdogSec={WATCHDOG_SECONDS}
Restart=always
RestartSec=2
TimeoutStopSec=45
DynamicUser=yes
CacheDirectory=edgekit
Environment=XDG_CACHE_HOME=%C
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""
