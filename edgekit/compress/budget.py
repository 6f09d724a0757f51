"""What a compressed model may cost: the budgets, how they are spelled, and by how much a candidate misses them.

Computes no model and reads no clock.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["drop", "size", "latency", "saturation"]

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SLACK = 1e-9
"""A drop of 0.5 points that floats write as 0.5000000000004 keeps a budget of 0.5."""


def seconds(text: str, option: str) -> float:
    """Read a time with its unit: ``20ms``, ``90s``, ``30m``.

    Raises:
        UsageError: no positive number, or a unit that nobody knows.
    """
    return _number(text, option, SECONDS, "20ms, 90s, 30m or 2h")


def size(text: str, option: str) -> int:
    """Read a size with its unit: ``2MB`` is 2,000,000 bytes, ``1.5MiB`` 1,572,864.

    Raises:
        UsageError: no positive number, or a unit that nobody knows.
    """
    return math.floor(_number(text, option, BYTES, "500kB, 2MB or 1.5MiB"))


def _number(text: str, option: str, units: Mapping[str, float], examples: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None:
        raise UsageError(f"{option} {text!r} is no positive number with a unit", f"write it as {examples}")
    number, unit = float(found[1]), found[2]
    if unit not in units:
        problem = f"has the unit {unit!r}, which nobody knows" if unit else "has no unit"
        raise UsageError(f"{option} {text!r} {problem}", f"write it as {examples}; units: {', '.join(units)}")
    value = number * units[unit]
    if not 0 < value < math.inf:
        raise UsageError(f"{option} {text!r} is not above zero and finite", f"write it as {examples}")
    return value


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that may be lost (in the metric's unit), stored (bytes) and waited for (seconds a sample)."""

    max_drop: float
    size: int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < math.inf:
            raise UsageError(
                f"--max-drop {self.max_drop} is no loss", "give a number from 0 on, in points for a share of hits"
            )


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a candidate reached: the loss and the metric behind it, its bytes, its latency where that was asked for.

    ``fidelity`` is the SQNR of its outputs in decibels, which tells candidates of equal loss apart. ``saturated`` is
    the share of the sums in the worst layer that the target would cut off: then its loss is another one there.
    """

    drop: float
    value: float
    bytes: int
    latency: float | None = None
    fidelity: float = 0.0
    saturated: float = 0.0

    def misses(self, budget: Budget) -> dict[Kind, float]:
        """Return by how much each budget is missed, as a share of it; empty where all are kept.

        Of a budget of nothing there are no shares: a loss counts in its own unit then.
        """
        found: dict[Kind, float] = {}
        if self.drop > budget.max_drop + SLACK:
            whole = budget.max_drop if budget.max_drop > SLACK else 1.0
            found["drop"] = (self.drop - budget.max_drop) / whole
        if budget.size is not None and self.bytes > budget.size:
            found["size"] = self.bytes / budget.size - 1
        if budget.latency is not None and (self.latency is None or self.latency > budget.latency):
            found["latency"] = math.inf if self.latency is None else self.latency / budget.latency - 1
        if self.saturated:
            found["saturation"] = self.saturated
        return found

    def rank(self, budget: Budget) -> tuple[float, float, float]:
        """Return what candidates are ordered by, the best first: budgets missed, loss, fidelity."""
        return sum(self.misses(budget).values()), self.drop, -self.fidelity

    def promise(self, budget: Budget) -> tuple[float, ...]:
        """Return by what candidates are ordered to build on: a lost point can be won back, a byte too many rarely."""
        hard = sum(share for kind, share in self.misses(budget).items() if kind != "drop")
        return (hard, *self.rank(budget))
