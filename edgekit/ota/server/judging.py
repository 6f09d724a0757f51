"""Whether a release does worse than what ran before: on installs, errors, latency and drift. Does no I/O, reads no
clock.

Each device is one witness and speaks once, whatever it reports, for its reports are not independent of each other. Four
tests share ``alpha`` evenly (Bonferroni); within a test the hardware classes and their sum share it by the mean of
their e-values. A test is a coin: the share of devices that failed against the fleet's own past, and the share of
devices that are slower, err more, or raise alerts against one half. `evidence` says why one may look at it at any time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from edgekit.errors import UsageError
from edgekit.ota.server.evidence import e_value, power, upper_bound

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgekit.ota.server.fleet import DeviceState

Test = Literal["failures", "errors", "latency", "drift"]
TESTS: tuple[Test, ...] = ("failures", "errors", "latency", "drift")
HALF = 0.5
CLEAR = 0.2
"""Where a release is worse, at least seven in ten devices say so: what a bet on a coin is placed on."""
FEW = 30
"""From so many past answers on a class has a baseline of its own."""
FEW_CONTROLS = 10
ALL = ""


class Judging(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How surely, and what counts as worse.

    ``alpha``: the probability that a release which is no worse is halted by any of the ``tests``. The least
    regressions that are to be found: ``failures``, a rise of the share of devices that fail; ``errors``, of the share
    of requests that fail; ``latency``, of the p95 as a part of it. Half of that is allowed for. ``floor``: the share
    of devices of which it is believed that they fail anyway, where the fleet's past does not say more. A device is
    judged after ``reports`` health reports.
    """

    alpha: float = 0.05
    failures: float = 0.05
    errors: float = 0.01
    latency: float = 0.15
    floor: float = 0.02
    reports: Annotated[int, msgspec.Meta(ge=1, le=48)] = 3
    tests: tuple[Test, ...] = TESTS

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        shares = {name: getattr(self, name) for name in ("alpha", "failures", "errors", "floor")}
        for name, share in {**shares, "latency": self.latency / 10}.items():
            if not 0 < share <= HALF:
                raise UsageError(f"{name} {share} is out of bounds", "give shares above 0 up to 50%")
        if not self.tests or len(set(self.tests)) != len(self.tests):
            raise UsageError("no test is left to judge by", f"name some of {', '.join(TESTS)}, each once")

    @property
    def bound(self) -> float:
        """What the e-value of one test has to come to."""
        return len(self.tests) / self.alpha


class Tally(NamedTuple):
    """How many of so many."""

    hits: int
    tries: int


class Reading(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one device bore witness to, once. None: it cannot say.

    ``ratio`` is its p95 over that before, ``error_rise`` that of the share of errors; both without what changed
    elsewhere in the fleet at the time. ``partner`` is the device, not reached yet, whose alerts its own are held
    against: ``drifting`` is true where it alone has some, false where that one alone has.
    """

    ratio: float | None = None
    error_rise: float | None = None
    slower: bool | None = None
    erring: bool | None = None
    drifting: bool | None = None
    partner: str = ""


class Witness(NamedTuple):
    """What is judged of one asked device: its class, whether it failed, whether it was tried, and its reading."""

    profile: str
    failed: bool
    counts: bool
    reading: Reading | None


class Verdict(NamedTuple):
    """The test that says stop, and why."""

    test: Test
    why: str


class Controls:
    """The devices that do not run the release yet: what changed on them without it."""

    def __init__(self, devices: Iterable[DeviceState], judging: Judging, taken: set[str]) -> None:
        self._by_class: dict[str, list[DeviceState]] = defaultdict(list)
        self._taken = set(taken)
        self._free: dict[str, list[DeviceState]] = {}
        for device in devices:
            if device.online and device.record is not None and device.record.reports >= judging.reports:
                self._by_class[device.profile].append(device)
        self._shifts: dict[str, tuple[float, float] | None] = {}

    def shift(self, profile: str) -> tuple[float, float] | None:
        """Return by how much the log of the p95 and the share of errors changed of late on one class.

        Where few of the class are left it is that of all classes; None: few are left at all, and the release cannot
        be told from the time of day.
        """
        if profile not in self._shifts:
            mine = self._by_class[profile]
            if len(mine) < FEW_CONTROLS:
                mine = [device for devices in self._by_class.values() for device in devices]
            self._shifts[profile] = _shift(mine) if len(mine) >= FEW_CONTROLS else None
        return self._shifts[profile]

    def partner(self, profile: str) -> DeviceState | None:
        """Return a device of a class that is nobody's partner yet, and is one from now on."""
        free = self._free.setdefault(profile, [d for d in self._by_class[profile] if d.id not in self._taken])
        if not free:
            return None
        self._taken.add(free[-1].id)
        return free.pop()


def is_ready(device: DeviceState, judging: Judging) -> bool:
    """Say whether a device that has installed the release has reported enough to be judged."""
    record = device.record
    return record is not None and record.bundle == device.bundle and record.reports >= judging.reports


def read(device: DeviceState, controls: Controls, judging: Judging) -> Reading:
    """Return what a device that `is_ready` bears witness to."""
    after, before = device.record, device.before
    partner = controls.partner(device.profile)
    drifting = None
    if partner is not None and bool(partner.alerts) != bool(device.alerts):
        drifting = bool(device.alerts)
    whom = partner.id if partner else ""
    shift = controls.shift(device.profile)
    if after is None or before is None or before.reports < judging.reports or shift is None:
        return Reading(drifting=drifting, partner=whom)
    slowed, erred = shift
    log_ratio = after.log_p95 - before.log_p95 - slowed
    believed = min(1.0, before.error_rate + max(0.0, erred) + judging.errors / 2)
    return Reading(
        ratio=round(math.exp(log_ratio), 4),
        error_rise=round(after.errors / after.requests - before.error_rate - max(0.0, erred), 5),
        slower=log_ratio > math.log1p(judging.latency / 2),
        # The median of a binomial is at most the mean rounded up: a chance of at most one half to be above.
        erring=after.errors > math.ceil(after.requests * believed),
        drifting=drifting,
        partner=whom,
    )


def judge(
    witnesses: Sequence[Witness], judging: Judging, baseline: Mapping[str, Tally], *, waived: Sequence[Test] = ()
) -> Verdict | None:
    """Return the first test that says stop, or None. ``baseline``: how many devices of each class failed before."""
    counted = _counted(witnesses)
    for test in judging.tests:
        if test in waived:
            continue
        tallies = counted[test]
        beliefs = _beliefs(test, tallies, judging, baseline)
        rise = judging.failures if test == "failures" else CLEAR
        values = {one: e_value(*tally, beliefs[one], rise) for one, tally in tallies.items()}
        evidence = _joined(values)
        if evidence >= judging.bound:
            worst = max(values, key=lambda one: (values[one], one))
            figures = _figures(test, witnesses, worst)
            odds = f"evidence {evidence:.3g}, bound {judging.bound:.3g} (alpha {judging.alpha:g})"
            tally, whose = tallies[worst], f" {worst}" if worst else ""
            return Verdict(
                test, _WHY[test].format(tally=tally, whose=whose, believed=beliefs[worst], figures=figures) + odds
            )
    return None


_WHY: dict[Test, str] = {
    "failures": "{tally.hits} of {tally.tries}{whose} devices failed, {believed:.1%} at most are believed to anyway; ",
    "errors": "{tally.hits} of {tally.tries}{whose} devices err more than before{figures}; ",
    "latency": "{tally.hits} of {tally.tries}{whose} devices are slower than before{figures}; ",
    "drift": "{tally.hits} of {tally.tries} pairs of{whose} devices have alerts on the reached one alone; ",
}


def believed(profile: str, judging: Judging, baseline: Mapping[str, Tally]) -> float:
    """Return the share of devices of a class of which it is believed that they fail anyway."""
    own = baseline.get(profile, Tally(0, 0))
    whole = Tally(sum(one.hits for one in baseline.values()), sum(one.tries for one in baseline.values()))
    known = own if own.tries >= FEW else whole
    if known.tries < FEW:
        return judging.floor
    return min(HALF, max(judging.floor, upper_bound(*known)))


def _joined(values: Mapping[str, float]) -> float:
    """Join the e-values of a test: half on all classes together, half on each by itself; a mean, so one again."""
    single = [value for one, value in values.items() if one != ALL]
    if not single:
        return 0.0
    return (values[ALL] + fmean(single)) / 2 if ALL in values else single[0]


def _beliefs(
    test: Test, tallies: Mapping[str, Tally], judging: Judging, baseline: Mapping[str, Tally]
) -> dict[str, float]:
    if test != "failures":
        return dict.fromkeys(tallies, HALF)
    beliefs = {one: believed(one, judging, baseline) for one in tallies if one != ALL}
    # A canary may hold more of the flaky class than the fleet does: all together may fail as often as that one.
    return {**beliefs, ALL: max(beliefs.values(), default=judging.floor)}


def chance_to_find(devices: int, judging: Judging, baseline: Mapping[str, Tally]) -> float:
    """Return the power: how probably so many devices of one class show the least regression in failures."""
    share = believed(ALL, judging, baseline)
    return power(devices, min(1.0, share + judging.failures), share, judging.failures, bound=judging.bound)


def _counted(witnesses: Sequence[Witness]) -> dict[Test, dict[str, Tally]]:
    """Count each test by class, and all classes together where there are several; one pass, for fleets are large."""
    found: dict[Test, dict[str, list[int]]] = {test: defaultdict(lambda: [0, 0]) for test in TESTS}
    failures, errors, latency, drift = (found[test] for test in TESTS)
    for profile, failed, counts, reading in witnesses:
        if counts:
            failures[profile][failed] += 1
        if reading is not None:
            for tally, said in ((errors, reading.erring), (latency, reading.slower), (drift, reading.drifting)):
                if said is not None:
                    tally[profile][said] += 1
    return {test: _with_sum(tallies) for test, tallies in found.items()}


def _with_sum(counts: Mapping[str, Sequence[int]]) -> dict[str, Tally]:
    tallies = {profile: Tally(yes, no + yes) for profile, (no, yes) in counts.items()}
    if len(tallies) > 1:
        tallies[ALL] = Tally(sum(t.hits for t in tallies.values()), sum(t.tries for t in tallies.values()))
    return tallies


def _figures(test: Test, witnesses: Sequence[Witness], profile: str) -> str:
    mine = [one.reading for one in witnesses if one.reading is not None and profile in (ALL, one.profile)]
    ratios = [one.ratio for one in mine if one.ratio is not None]
    rises = [one.error_rise for one in mine if one.error_rise is not None]
    if test == "latency" and ratios:
        return f" by a median of {median(ratios) - 1:+.1%} of the p95"
    return f" by a mean of {fmean(rises):+.2%} of requests" if test == "errors" and rises else ""


def _shift(devices: list[DeviceState]) -> tuple[float, float]:
    known = [(one, one.record) for one in devices if one.record is not None and one.requests]
    slowed = [math.log(one.p95_ms) - record.log_p95 for one, record in known if one.p95_ms > 0]
    erred = [one.errors / one.requests - record.error_rate for one, record in known]
    return (median(slowed) if slowed else 0.0, fmean(erred) if erred else 0.0)
