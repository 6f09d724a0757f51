"""What a simulation is told: a fleet, what is wrong with the release, and the plan. Parses TOML, plays nothing."""

from __future__ import annotations

import tomllib
from typing import Annotated

import msgspec

from edgekit.errors import UsageError
from edgekit.ota.server import filters
from edgekit.ota.server.judging import Judging
from edgekit.ota.server.pacing import Window, zone_named
from edgekit.ota.server.plan import Plan, amount, amounts

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
MAX_DEVICES = 1_000_000


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Wishes(_Table, frozen=True, kw_only=True):
    """The plan as a person writes it: see `plan.Plan`. Shares may read ``20%``."""

    waves: tuple[str | int | float, ...] = ("20%", "100%")
    max_failures: str | int | float | None = None
    dwell: float = 0.0
    where: str = ""
    strata: tuple[str, ...] = ("tag.region", "fact.runtime")
    judging: Judging | None = None
    rate: float = 0.0
    growth: float = 1.0
    growth_after: int = 100
    in_flight: int = 0
    patience: float = 0.0
    window: Window | None = None
    roll_back: bool = False


class Fleet(_Table, frozen=True, kw_only=True):
    """Who is there. Classes, regions and runtimes by their weights; ``zones``: the time zone of a region.

    ``offline``: the share that is switched off at a time, each for ``away`` seconds in the mean. ``flaky``: the share
    of updates that fail for no fault of the release; ``past`` such answers are known. A device's p95 varies by
    ``noise`` from one time to another, the whole fleet's by ``swing`` over the day. ``error_rate`` of ``requests`` a
    report fail, ``alerting`` devices raise alerts anyway. A health report comes each ``health`` seconds, an update
    takes ``install`` seconds in the mean.
    """

    devices: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEVICES)] = 10_000
    classes: dict[str, float] = msgspec.field(
        default_factory=lambda: {"raspberry-pi-5": 0.5, "jetson-orin": 0.3, "android-arm64": 0.2}
    )
    regions: dict[str, float] = msgspec.field(default_factory=lambda: {"eu": 0.5, "us": 0.3, "ap": 0.2})
    runtimes: dict[str, float] = msgspec.field(default_factory=lambda: {"0.1.0": 0.8, "0.2.0": 0.2})
    zones: dict[str, str] = msgspec.field(
        default_factory=lambda: {"eu": "Europe/Berlin", "us": "America/New_York", "ap": "Asia/Tokyo"}
    )
    offline: Share = 0.2
    away: Annotated[float, msgspec.Meta(gt=0)] = 14_400.0
    flaky: Share = 0.0
    past: Annotated[int, msgspec.Meta(ge=0)] = 0
    noise: Share = 0.1
    swing: Share = 0.1
    requests: Annotated[int, msgspec.Meta(ge=1)] = 200
    error_rate: Share = 0.002
    alerting: Share = 0.01
    health: Annotated[float, msgspec.Meta(ge=60)] = 900.0
    install: Annotated[float, msgspec.Meta(gt=0)] = 600.0


class Fault(_Table, frozen=True, kw_only=True):
    """What is wrong with the release, on the devices that the filter ``where`` names.

    ``failures``: the share that rolls back. ``latency``: the rise of the p95 as a part of it; ``errors``: of the
    share of requests that fail; ``drift``: the share that raises alerts.
    """

    where: str = ""
    failures: Share = 0.0
    latency: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    errors: Share = 0.0
    drift: Share = 0.0


class Scenario(_Table, frozen=True, kw_only=True):
    """A plan, a fleet, the faults of the release, and how many hours are played at most."""

    plan: Wishes = Wishes()
    fleet: Fleet = Fleet()
    faults: tuple[Fault, ...] = ()
    hours: Annotated[float, msgspec.Meta(gt=0, le=8760)] = 96.0
    start: float = 1_800_000_000.0


def parse(text: str, name: str = "the plan") -> Scenario:
    """Read a scenario.

    Raises:
        UsageError: it is malformed; the message names the place.
    """
    try:
        scenario = msgspec.convert(tomllib.loads(text), Scenario)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{name} is no scenario: {error}", "see docs/guides/rollouts.md") from error
    fleet = scenario.fleet
    for weights in (fleet.classes, fleet.regions, fleet.runtimes):
        if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise UsageError(f"{name}: {weights} are no weights", "write them as {pi = 0.7, jetson = 0.3}")
    for zone in fleet.zones.values():
        if zone_named(zone) is None:
            raise UsageError(f"{name}: there is no time zone {zone!r}", "write it as Europe/Berlin")
    for fault in scenario.faults:
        if fault.where:
            filters.parse(fault.where)
    plan_of(scenario)
    return scenario


def plan_of(scenario: Scenario) -> Plan:
    """Return the plan of a scenario: of version 2 of a model, over version 1.

    Raises:
        UsageError: it makes no sense.
    """
    told = msgspec.structs.asdict(scenario.plan)
    roll_back, most = told.pop("roll_back"), told.pop("max_failures")
    if most is None:
        most = 1.0 if scenario.plan.judging else 0
    waves = amounts(told.pop("waves"))
    return Plan(
        model="model",
        version=2,
        profiles=tuple(scenario.fleet.classes),
        waves=waves,
        max_failures=amount(most),
        back=3 if roll_back else 0,
        **told,
    )
