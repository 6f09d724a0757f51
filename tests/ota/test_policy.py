"""When a device may load and change its model: windows across midnight and summer time, metered links."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.ota.device.policy import DAY, Policy, Window, parse_window

BERLIN = ZoneInfo("Europe/Berlin")
MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  # hypothesis adds the zone
MINUTES = st.integers(0, DAY - 1)
WINDOWS = st.builds(Window, MINUTES, MINUTES, st.sampled_from([UTC, BERLIN, None])).filter(lambda w: w.start != w.end)


def at(text):
    return datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("window", "open_at", "shut_at"),
    [
        ("22:00-06:00Z", ["2026-11-30T22:00Z", "2026-11-30T23:59Z", "2026-12-01T00:00Z", "2026-12-01T05:59Z"],
         ["2026-11-30T21:59Z", "2026-12-01T06:00Z", "2026-12-01T12:00Z"]),
        ("02:30-03:00Z", ["2026-11-30T02:30Z", "2026-11-30T02:59:59Z"], ["2026-11-30T02:29Z", "2026-11-30T03:00Z"]),
        ("18:00-24:00Z", ["2026-11-30T23:59Z"], ["2026-12-01T00:00Z"]),
    ],
)  # fmt: skip
def test_window_is_open_from_its_start_up_to_its_end(window, open_at, shut_at):
    one = parse_window(window)
    assert all(one.is_open(at(moment)) for moment in open_at)
    assert not any(one.is_open(at(moment)) for moment in shut_at)
    assert str(one) == window


def test_window_is_in_local_time_unless_it_says_utc():
    summer, winter = at("2026-07-01T20:30Z"), at("2026-12-01T20:30Z")
    berlin = Window(22 * 60, 6 * 60, BERLIN)
    assert (berlin.is_open(summer), berlin.is_open(winter)) == (True, False)
    assert berlin.opens(winter) == at("2026-12-01T21:00Z")
    assert not parse_window("22:00-06:00Z").is_open(summer)
    assert parse_window("22:00-06:00").zone is None


def test_window_in_the_hour_that_summer_time_skips_opens_all_the_same():
    night = Window(2 * 60 + 15, 2 * 60 + 45, BERLIN)
    opens = night.opens(at("2026-03-29T00:30Z"))
    assert at("2026-03-29T00:30Z") < opens <= at("2026-03-29T02:00Z")


@given(WINDOWS, MOMENTS)
def test_a_shut_window_opens_within_a_day_or_so_and_is_open_then(window, now):
    if window.is_open(now):
        return
    opens = window.opens(now)
    assert now < opens <= now + timedelta(hours=26)
    if window.zone is UTC:
        assert window.is_open(opens)
        assert not window.is_open(opens - timedelta(minutes=1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "22-06",
        "22:00-22:00",
        "00:00-24:00",
        "25:00-06:00",
        "22:60-06:00",
        "24:00-06:00",
        "22:00-06:00X",
        "1:00-2:00",
    ],
)
def test_what_is_no_window_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="no maintenance window") as caught:
        parse_window(text)
    assert "22:00-06:00Z" in caught.value.hint


def test_default_policy_holds_nothing_back():
    assert Policy().hold(at("2026-11-30T12:00Z"), 1 << 40) is None


def test_outside_all_windows_nothing_goes_and_the_next_one_is_named():
    policy = Policy(windows=(parse_window("22:00-06:00Z"), parse_window("13:00-13:30Z")))
    hold = policy.hold(at("2026-11-30T12:00Z"))
    assert hold.reason == "outside the maintenance window 22:00-06:00Z, 13:00-13:30Z"
    assert hold.until == at("2026-11-30T13:00Z")
    assert policy.hold(at("2026-11-30T13:10Z"), 5) is None
    assert policy.hold(at("2026-11-30T13:30Z"), 5).until == at("2026-11-30T22:00Z")


def test_metered_link_holds_bytes_back_and_no_change_of_model():
    noon = at("2026-11-30T12:00Z")
    for policy, seen in ((Policy(is_metered=True), False), (Policy(), True)):
        assert policy.hold(noon, 1, is_metered=seen).reason == "the link is metered: 1 bytes wait for another one"
        assert policy.hold(noon, 0, is_metered=seen) is None
    small = Policy(is_metered=True, metered_below=1000)
    assert small.hold(noon, 999) is None
    assert small.hold(noon, 1000) is not None
