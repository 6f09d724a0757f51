"""How warm the device is and how fast its cores run, as Linux tells. What it does not tell is left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

THROTTLED_NOW = 0xF
"""Bits of the Raspberry Pi's firmware: under-voltage, capped clock, throttled, soft limit of temperature; now."""


@dataclass(frozen=True)
class Readings:
    """Degrees Celsius by sensor, hertz by core now and at most, and whether the firmware throttles."""

    celsius: dict[str, float]
    hertz: dict[str, float]
    most_hertz: dict[str, float]
    throttled: bool | None = None


def read(root: Path = Path("/")) -> Readings:
    """Read the sensors whose files lie under ``root`` (``/sys`` of Linux)."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    celsius = {_name(zone): value / 1000 for zone in zones if (value := _number(zone / "temp")) is not None}
    cores = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    now = {core.parent.name: value * 1000 for core in cores if (value := _number(core / "scaling_cur_freq"))}
    most = {core.parent.name: value * 1000 for core in cores if (value := _number(core / "cpuinfo_max_freq"))}
    return Readings(celsius, now, most, _throttled(root))


def _name(zone: Path) -> str:
    """Return ``cpu-thermal0``: a kind of sensor may be there more than once."""
    number = zone.name.removeprefix("thermal_zone")
    try:
        return f"{(zone / 'type').read_text(encoding='utf-8', errors='replace').strip()}-{number}"
    except OSError:
        return f"zone-{number}"


def _throttled(root: Path) -> bool | None:
    for path in (root / "sys/devices/platform/soc").glob("soc:firmware/get_throttled"):
        try:
            return bool(int(path.read_text(encoding="utf-8").strip(), 16) & THROTTLED_NOW)
        except (OSError, ValueError):
            return None
    return None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None
