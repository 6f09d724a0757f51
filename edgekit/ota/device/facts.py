"""What a device says of itself beside its class: versions, architecture, time zone. Decides nothing, keeps nothing."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import edgekit

ZONES = "zoneinfo/"


def gather(local: Path = Path("/etc/localtime")) -> dict[str, str]:
    """Return the facts of this device, each at most 200 characters; what cannot be told is left out."""
    found = {
        "runtime": edgekit.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
        "platform": sys.platform,
        "utc_offset": _offset(time.localtime().tm_gmtoff),
        "timezone": _zone(local),
    }
    return {key: value[:200] for key, value in found.items() if value}


def _offset(seconds: int) -> str:
    minutes = abs(seconds) // 60
    return f"{'-' if seconds < 0 else '+'}{minutes // 60:02}:{minutes % 60:02}"


def _zone(local: Path) -> str:
    """Return the name of the zone that the system's link leads to, as ``Europe/Berlin``; empty where it is no link."""
    try:
        target = str(local.readlink())
    except OSError:
        return ""
    return target.partition(ZONES)[2]
