"""Waves over strata, rates, slots and windows: nobody is asked too soon, and nobody is forgotten."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.ota.messages import Failed, Installed, RolledBack, Waiting
from edgekit.ota.server.fleet import DeviceState, expect, fold
from edgekit.ota.server.pacing import Window, allowance, is_its_time, zone_named, zone_of
from edgekit.ota.server.plan import Plan, told
from edgekit.ota.server.rollout import Rollout, advance, resume, retry
from edgekit.ota.server.strata import quotas
from edgekit.ota.server.turns import is_busy

START = datetime(2026, 3, 28, 12, 0, tzinfo=UTC).timestamp()


def device(name, profile="pi", *, online=True, version=1, **fields):
    return DeviceState(id=name, profile=profile, online=online, model="cat", version=version, **fields)


def rollout_of(**plan):
    defaults = {"model": "cat", "version": 2, "profiles": ("pi", "jetson"), "waves": (1.0,), "max_failures": 1.0}
    return Rollout(id="cat-v2", plan=Plan(**{**defaults, **plan}))


class World:
    """A fleet that is asked step by step."""

    def __init__(self, states, rollout, now=START):
        self.states = {state.id: state for state in states}
        self.rollout = rollout
        self.now = now
        self.asked = []

    def step(self, seconds=0.0):
        self.now += seconds
        step = advance(self.rollout, self.states, self.now)
        again = advance(step.rollout, self.states, self.now)
        assert (again.assign, again.rollout) == ([], step.rollout)
        self.rollout = step.rollout
        for name in step.assign:
            mine = self.rollout.assigned[name]
            self.asked.append((name, mine.attempt, self.now))
            self.states[name] = expect(self.states[name], "cat-v2", mine.attempt, self.rollout.plan.release("pi"))
        return step.assign

    def answer(self, name, kind=Installed, **fields):
        state = self.states[name]
        rest = {"bundle": "b" * 64} if kind is Installed else {"reason": "it was bad"}
        report = kind(device=name, deployment=state.deployment, attempt=state.attempt, version=2, **rest, **fields)
        self.states[name] = fold(state, report, self.now)

    def switch(self, name, *, online):
        self.states[name] = msgspec.structs.replace(self.states[name], online=online)


REGIONS = ("eu", "us", "ap")


def test_every_class_region_and_runtime_that_has_devices_is_in_the_canary_and_online_ones_come_first():
    fleet = [
        device(f"{c}-{r}-{v}-{i}", c, online=i % 2 == 1, tags={"region": r}, facts={"runtime": v})
        for c, few in (("pi", 40), ("jetson", 2))
        for r in REGIONS
        for v in ("0.1.0", "0.2.0")
        for i in range(few)
    ]
    rollout = rollout_of(waves=(0.05, 1.0), strata=("tag.region", "fact.runtime"))
    canary = World(fleet, rollout).step()
    reached = {tuple(name.split("-")[:3]) for name in canary}
    assert reached == {(c, r, v) for c in ("pi", "jetson") for r in REGIONS for v in ("0.1.0", "0.2.0")}
    assert len(canary) == 6 * 2 + 6 * 1
    assert all(int(name.rpartition("-")[2]) % 2 == 1 for name in canary)
    assert sorted(World(fleet, rollout).step()) == sorted(canary)
    assert sorted(World(fleet, msgspec.structs.replace(rollout, id="other")).step()) != sorted(canary)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3).map(lambda t: (t,)), st.integers(0, 50)), st.data())
def test_a_wave_of_a_count_reaches_that_many_and_at_least_one_of_each_stratum(sizes, data):
    total = sum(sizes.values())
    amount = data.draw(st.integers(1, max(1, total)))
    found = quotas(amount, sizes)
    living = [one for one, size in sizes.items() if size]
    assert all(found[one] <= sizes[one] for one in sizes)
    assert all(found[one] >= 1 for one in living)
    assert sum(found.values()) >= min(amount, total)
    assert sum(found.values()) <= amount + len(living)


def test_waves_of_counts_come_before_those_of_shares():
    world = World([device(f"pi-{i:03}") for i in range(100)], rollout_of(waves=(3, 10, 0.5, 1.0)))
    sizes = []
    while world.rollout.status == "running":
        for name in world.step(1):
            world.answer(name)
        sizes.append(len(world.rollout.assigned))
    assert sorted(set(sizes)) == [3, 10, 50, 100]
    assert told(world.rollout.plan) == "3,10,50%,100%"
    for bad in ((0.5, 3, 1.0), (3, 2, 1.0), (0, 1.0), (3, 10)):
        with pytest.raises(UsageError, match="are no plan"):
            rollout_of(waves=bad)


def test_the_rate_grows_with_what_was_installed():
    plan = rollout_of(rate=4.0, growth=2.0, growth_after=10).plan
    assert [allowance(plan, n) for n in (0, 9, 10, 25)] == [(60.0, 4), (60.0, 4), (60.0, 8), (60.0, 16)]
    assert allowance(rollout_of(rate=0.5).plan, 0) == (120.0, 1)
    world = World([device(f"pi-{i:03}") for i in range(100)], rollout_of(rate=4.0, growth=2.0, growth_after=10))
    minutes = []
    while world.rollout.status == "running":
        chosen = world.step(60)
        minutes.append(len(chosen))
        for name in chosen:
            world.answer(name)
    assert minutes == [4, 4, 4, 8, 16, 32, 32, 0]


def test_a_device_that_is_offline_fails_its_transfer_waits_or_is_too_slow_takes_no_slot():
    plan = rollout_of(in_flight=4, patience=600.0)
    world = World([device(f"pi-{i}") for i in range(9)], plan)
    first = world.step()
    assert len(first) == 4
    assert world.step(1) == []
    world.switch(first[0], online=False)
    world.answer(first[1], Failed)
    world.answer(first[2], Waiting)
    assert len(world.step(1)) == 3
    assert world.step(597) == []
    assert len(world.step(2)) == 1, "the fourth has been at it for more than ten minutes"


KINDS = st.sampled_from([Installed, RolledBack, Failed, Waiting, None, None, "on", "off"])


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.floats(0.3, 20),
    st.floats(1, 3),
    st.integers(1, 6),
    st.sampled_from([(1.0,), (0.2, 1.0), (3, 0.5, 1.0)]),
)
def test_whatever_devices_do_the_rate_and_the_slots_hold_at_every_step(data, rate, growth, slots, waves):
    rollout = rollout_of(rate=rate, growth=growth, growth_after=5, in_flight=slots, patience=300.0, waves=waves)
    world = World([device(f"pi-{i:02}") for i in range(25)], rollout)
    random = data.draw(st.randoms(use_true_random=False))
    attempts = {}
    for _ in range(80):
        chosen = world.step(random.choice([0.0, 1.0, 20.0, 61.0]))
        assert all(world.states[name].online for name in chosen)
        busy = sum(is_busy(world.rollout, a, world.states[d], world.now) for d, a in world.rollout.assigned.items())
        assert not chosen or busy <= slots
        period, limit = allowance(rollout.plan, world.rollout.count("installed"))
        assert sum(at > world.now - period for _, _, at in world.asked) <= max(limit, 1)
        for name in chosen:
            attempt = world.rollout.assigned[name].attempt
            assert attempt == attempts.get(name, 0) + 1, "asked once an attempt"
            attempts[name] = attempt
        for name in [d for d, a in world.rollout.assigned.items() if a.outcome == "pending"]:
            kind = data.draw(KINDS) if random.random() < 0.3 else None
            if kind in ("on", "off"):
                world.switch(name, online=kind == "on")
            elif kind is not None and world.states[name].deployment:
                world.answer(name, kind)
        if random.random() < 0.1 and world.rollout.status in ("running", "paused", "done"):
            world.rollout = retry(world.rollout)


def test_those_that_failed_are_asked_again_at_the_plans_pace():
    world = World([device(f"pi-{i}") for i in range(6)], rollout_of(rate=2.0, max_failures=5))
    while len(world.rollout.assigned) < 6:
        for name in world.step(60):
            world.answer(name, RolledBack)
    assert world.step() == []
    assert world.rollout.status == "halted"
    world.rollout = resume(world.rollout)
    assert [len(world.step(60)) for _ in range(4)] == [2, 2, 2, 0]
    assert {a.attempt for a in world.rollout.assigned.values()} == {2}


NIGHT = Window(begin="22:00", end="05:00")


@pytest.mark.parametrize(
    ("when", "zone", "is_open"),
    [
        ("2026-07-01T20:00:00+00:00", "Europe/Berlin", True),
        ("2026-07-01T19:59:59+00:00", "Europe/Berlin", False),
        ("2026-01-01T20:00:00+00:00", "Europe/Berlin", False),
        ("2026-01-01T21:00:00+00:00", "Europe/Berlin", True),
        ("2026-07-01T02:59:00+00:00", "Europe/Berlin", True),
        ("2026-07-01T03:00:00+00:00", "Europe/Berlin", False),
        ("2026-07-01T13:00:00+00:00", "Asia/Tokyo", True),
        ("2026-07-01T16:30:00+00:00", "+05:30", True),
        ("2026-07-01T16:29:00+00:00", "+05:30", False),
        ("2026-07-01T01:00:00+00:00", "-03:00", True),
    ],
)
def test_a_window_is_open_by_the_clock_on_the_devices_wall(when, zone, is_open):
    assert NIGHT.is_open(zone_named(zone), datetime.fromisoformat(when).timestamp()) == is_open


def test_in_the_night_in_which_the_clock_jumps_the_window_is_an_hour_shorter_or_longer():
    berlin = ZoneInfo("Europe/Berlin")
    small = Window(begin="01:00", end="04:00")

    def open_minutes(day):
        midnight = datetime(*day, tzinfo=berlin).timestamp()
        return sum(small.is_open(berlin, midnight + 60 * i) for i in range(6 * 60))

    assert open_minutes((2026, 3, 28)) == 180
    assert open_minutes((2026, 3, 29)) == 120, "from 2 to 3 there is nothing"
    assert open_minutes((2026, 10, 25)) == 240, "from 2 to 3 there is twice"


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins():
    friday = Window(begin="22:00", end="05:00", days=(4,))
    at = lambda text: friday.is_open(UTC, datetime.fromisoformat(text + "+00:00").timestamp())  # noqa: E731  # short
    assert [at("2026-01-02T23:00"), at("2026-01-03T04:00"), at("2026-01-03T23:00"), at("2026-01-02T04:00")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_a_devices_zone_is_its_tag_then_what_it_says_and_nonsense_is_passed_over():
    window = Window(begin="22:00", end="05:00", zone="America/New_York")
    told = {"timezone": "Asia/Tokyo", "utc_offset": "+02:00"}
    assert zone_of(device("a", tags={"timezone": "Europe/Berlin"}, facts=told), window).key == "Europe/Berlin"
    assert zone_of(device("a", facts=told), window).key == "Asia/Tokyo"
    for evil in ("../../etc/passwd", "/etc/passwd", "Europe", "\x00", "x" * 200, "+99:00", ""):
        assert zone_of(device("a", facts={"timezone": evil}), window).key == "America/New_York", evil
    assert zone_of(device("a", facts={"timezone": "no/where", "utc_offset": "+02:00"}), window) == zone_named("+02:00")
    for bad in ({"begin": "22:00", "end": "22:00"}, {"begin": "22:00", "end": "05:00", "zone": "Mars/Base"}):
        with pytest.raises(UsageError):
            Window(**bad)


def test_over_a_whole_day_and_the_change_of_the_clock_nobody_is_asked_outside_of_their_night():
    zones = {"eu": "Europe/Berlin", "us": "America/New_York", "ap": "Asia/Tokyo"}
    fleet = [device(f"{r}-{i}", tags={"region": r, "timezone": zones[r]}) for r in zones for i in range(4)]
    plan = rollout_of(waves=(0.5, 1.0), strata=("tag.region",), window=NIGHT)
    world = World(fleet, plan)
    waves = {}
    for _ in range(3 * 48):
        for name in world.step(1800):
            assert is_its_time(world.states[name], plan.plan, world.now)
            hour = datetime.fromtimestamp(world.now, ZoneInfo(zones[name[:2]])).hour
            assert hour >= 22 or hour < 5
            waves[name] = world.rollout.assigned[name].wave
            world.answer(name)
    assert world.rollout.status == "done"
    assert sorted(waves) == sorted(world.states)
    assert all(sum(waves[f"{r}-{i}"] == 0 for i in range(4)) == 2 for r in zones), "no region is left out of wave 1"


def test_a_canary_of_which_nobody_is_there_at_night_waits_and_is_no_passed_wave():
    fleet = [device(f"pi-{i}", online=False) for i in range(10)]
    world = World(fleet, rollout_of(waves=(0.2, 1.0), window=NIGHT))
    for _ in range(96):
        assert world.step(1800) == []
    assert (world.rollout.status, world.rollout.wave) == ("running", 0)
    world.switch("pi-3", online=True)
    asked = [name for _ in range(48) for name in world.step(1800)]
    assert asked == ["pi-3"]
    world.answer("pi-3")
    for _ in range(48):
        world.step(1800)
    assert world.rollout.wave == 0, "half of the canary is no more than half"


def test_a_rollout_that_was_stored_before_there_were_paces_is_read():
    old = (
        b'{"id":"cat-v2","plan":{"model":"cat","version":2,"profiles":["pi"],"waves":[0.2,1.0],"max_failures":0,'
        b'"dwell":0.0,"spread":0.0},"status":"running","wave":0,"assigned":{"pi-1":{"wave":0,"profile":"pi",'
        b'"attempt":1,"outcome":"installed"}},"settled":null,"reason":""}'
    )
    rollout = msgspec.json.decode(old, type=Rollout)
    assert (rollout.plan.is_paced, rollout.plan.judging, rollout.assigned["pi-1"].at) == (False, None, 0.0)
    world = World([device("pi-1", version=2), *(device(f"pi-{i}") for i in range(2, 6))], rollout)
    assert len(world.step()) == 4
