"""A clock that is wrong: neither refused nor accepted blindly, said to the fleet, and made good once it is set."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from fakes.fleets import NOW, Fleet, Serving, install, wish
from hypothesis import given
from hypothesis import strategies as st
from test_agent import Town

from edgekit.errors import ResourceError
from edgekit.ota.device import agent as agents
from edgekit.ota.device import clock, marks, slots
from edgekit.ota.device.clock import RELEASED, SLACK, believed
from edgekit.ota.device.trust import Expired, Unproven
from edgekit.ota.device.update import update
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Failed, Installed
from edgekit.ota.server import metadata

BOOT = datetime(1970, 1, 1, 0, 1, tzinfo=UTC)
YEARS = timedelta(days=5 * 365)
TIMES = st.integers(0, 3_786_912_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path / "fleet")


@pytest.fixture
def story(fleet, tmp_path):
    """A device whose clock nothing has set, on which version 1 serves; version 2 is published."""
    device = replace(fleet.device(tmp_path / "device"), clock_is_set=lambda: False)
    assert isinstance(install(fleet, device, fleet.publish(1)), Installed)
    return fleet, device, fleet.publish(2)


def fails(story, now, because):
    """Check that an update fails for that reason, that nothing is final, and that what is installed serves on."""
    fleet, device, two = story
    before = slots.load(device.state)
    calls = list(device.serving.calls)
    with pytest.raises(ResourceError) as caught:
        install(fleet, device, two, now=now, deployment="d2")
    assert because in caught.value.message
    assert "over NTP say" in caught.value.message
    assert (slots.load(device.state), device.serving.calls) == (before, calls)


@given(TIMES, TIMES)
def test_no_metadata_is_ever_judged_by_an_earlier_time_than_was_seen(now, seen):
    floor = max(seen, RELEASED)
    try:
        assert believed(now, seen) == max(now, floor)
        assert now >= floor - SLACK
    except ResourceError:
        assert now < floor - SLACK


def test_a_device_that_boots_in_1970_says_so_and_asks_for_time(story):
    fails(story, BOOT, "it says 1970-01-01 00:01+00:00, before 2026-11-22 12:00")
    assert isinstance(install(story[0], story[1], story[2], deployment="d2"), Installed)


def test_a_new_device_in_1970_knows_when_it_was_made(fleet, tmp_path):
    device = fleet.device(tmp_path / "new")
    with pytest.raises(ResourceError, match="this version of edgekit was made then"):
        install(fleet, device, fleet.publish(1), now=BOOT)
    assert slots.load(device.state).current is None


def test_with_a_wrong_clock_nothing_is_even_asked_for(fleet, tmp_path):
    class Nobody:
        def stream(self, *_):
            raise AssertionError("asked")

    device = fleet.device(tmp_path / "new")
    with pytest.raises(ResourceError):
        update(device, wish(fleet.publish(1)), Nobody(), BOOT)


def test_a_clock_that_is_years_ahead_sees_everything_expired_and_refuses_nothing(story):
    fails(story, NOW + YEARS, "the clock may be ahead: it says 2031")
    assert isinstance(install(story[0], story[1], story[2], deployment="d2"), Installed), "once it is right"


def test_a_clock_that_is_set_and_expired_metadata_are_a_frozen_repository(story):
    fleet, device, two = story
    right = replace(device, clock_is_set=lambda: True)
    with pytest.raises(Expired, match="expired"):
        install(fleet, right, two, now=NOW + timedelta(days=8), deployment="d2")


@pytest.mark.parametrize("hours", [1, 5, 23])
def test_a_clock_that_goes_back_by_hours_updates_all_the_same(story, hours):
    assert isinstance(install(*story[:2], story[2], now=NOW - timedelta(hours=hours), deployment="d2"), Installed)


def test_a_clock_that_goes_back_by_days_is_wrong(story):
    fails(story, NOW - timedelta(days=2), "before 2026-11-22 12:00")


def test_a_clock_that_goes_back_makes_no_expired_metadata_good(story):
    """An attacker who freezes the repository gains nothing by a clock that he sets back within the slack."""
    fleet, device, two = story
    late = NOW + timedelta(days=6, hours=23)
    assert isinstance(install(fleet, device, two, now=late, deployment="d2"), Installed)
    three = fleet.publish(3)
    marks.note_time(device.state, NOW + timedelta(days=7, hours=1))
    right = replace(device, clock_is_set=lambda: True)
    with pytest.raises(Expired, match="expired"):
        install(fleet, right, three, now=NOW + timedelta(days=6, hours=20), deployment="d3")
    assert slots.load(device.state).current == two


def test_the_mark_never_goes_back_and_only_verified_metadata_moves_it(story):
    fleet, device, two = story
    assert marks.load(device.state).verified == NOW
    (fleet.repository / "metadata" / "timestamp.json").write_bytes(b"{}")
    with pytest.raises(Unproven):
        install(fleet, device, two, now=NOW + timedelta(days=1), deployment="d2")
    assert marks.load(device.state).verified == NOW
    marks.note_time(device.state, NOW - timedelta(days=1))
    assert marks.load(device.state).verified == NOW


@pytest.mark.parametrize("data", [b"", b"\xff", b'{"verified": 3}', b'{"verified": "2026-11-22T12:00:00"}'])
def test_damaged_marks_are_begun_anew_above_the_time_of_the_package(story, data):
    fleet, device, two = story
    (device.state / marks.FILE).write_bytes(data)
    fails(story, BOOT, "this version of edgekit was made then")
    assert isinstance(install(fleet, device, two, deployment="d2"), Installed)
    assert marks.load(device.state).verified == NOW


def test_the_agent_tells_the_fleet_of_its_clock_and_tries_again_as_soon_as_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "LOOK_SECONDS", 0.01)
    town = Town(tmp_path, MemoryBroker().connect)
    time = [BOOT]
    monkeypatch.setattr(agents.Agent, "_pause", lambda *_: 3600.0)  # only the clock can end it
    agent = town.agent(Serving())
    agent.clock = lambda: time[0]
    one = town.fleet.publish(1)
    town.want(one)
    assert "the clock is wrong" in town.heard(Failed).reason
    time[0] = NOW
    assert town.heard(Installed).version == 1
    town.end()


def test_a_clock_that_was_set_is_told_from_one_that_ran():
    assert not clock.has_jumped((100.0, 5.0), (160.0, 65.0))
    assert clock.has_jumped((100.0, 5.0), (1_700_000_000.0, 6.0))
    assert clock.has_jumped((1_700_000_000.0, 5.0), (100.0, 6.0))


def test_the_time_of_this_version_is_no_time_to_come():
    """Else every device that gets it would call its clock wrong."""
    assert datetime.now(UTC) > RELEASED
    assert metadata.lifetime("timestamp") > SLACK
