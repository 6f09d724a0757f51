"""Which wish counts, which is a replay, and when a device's turn to download is."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import MessageError
from edgekit.ota.device.wishes import AHEAD_SECONDS, OWN, Wishes, turn_after
from edgekit.ota.messages import Desired

NOW = 1_800_000_000.0
PI = "raspberry-pi-5"


def wish(version=1, revision=0, deployment="", **more):
    release = f"models/cat/{PI}/{version}.json"
    return Desired(deployment=deployment or f"d{version}", release=release, version=version, revision=revision, **more)


@pytest.fixture
def wishes(tmp_path):
    return Wishes(tmp_path / "wishes.json", "pi-1", ["canary", "lab"])


def test_replayed_desired_state_is_refused_also_after_a_restart(wishes, tmp_path):
    old, new = wish(1, 10), wish(2, 11)
    wishes.take(OWN, old, NOW)
    wishes.take(OWN, new, NOW)
    for one in (wishes, Wishes(tmp_path / "wishes.json", "pi-1", ["canary"])):
        with pytest.raises(MessageError, match="revision 10, after 11"):
            one.take(OWN, old, NOW)
        one.take(OWN, new, NOW)  # the same once more is no replay: QoS 1 and retained messages bring it again
        assert one.chosen(PI) == new
        one.take("canary", old, NOW)  # another topic counts for itself


def test_a_wish_that_was_taken_back_does_not_come_again_as_an_older_one(wishes):
    wishes.take(OWN, wish(1, 10), NOW)
    wishes.take(OWN, None, NOW)
    assert wishes.chosen(PI) is None
    with pytest.raises(MessageError):
        wishes.take(OWN, wish(1, 9), NOW)


def test_a_forged_revision_far_ahead_locks_nobody_out(wishes):
    with pytest.raises(MessageError, match="far in the future"):
        wishes.take(OWN, wish(9, 1 << 53), NOW)
    wishes.take(OWN, wish(1, int(NOW * 1000)), NOW)
    assert wishes.chosen(PI) == wish(1, int(NOW * 1000))
    wishes.take(OWN, wish(2, int((NOW + AHEAD_SECONDS - 1) * 1000)), NOW)


def test_a_device_without_a_clock_judges_no_revision_by_it(wishes):
    wishes.take(OWN, wish(1, int(NOW * 1000)), 12.0)
    assert wishes.chosen(PI).version == 1


@pytest.mark.parametrize("group", [OWN, "lab"])
def test_a_revision_forged_before_the_clock_was_set_is_forgotten_once_it_is_set(wishes, tmp_path, group):
    wishes.take(group, wish(9, 1 << 53), 100.0)
    later = Wishes(tmp_path / "wishes.json", "pi-1", ["canary", "lab"])
    later.take(group, wish(1, int(NOW * 1000)), NOW)
    assert later.chosen(PI).version == 1
    again = Wishes(tmp_path / "wishes.json", "pi-1", ["canary", "lab"])
    assert again.revisions[group] == int(NOW * 1000)


def test_what_kills_left_of_the_file_is_swept(tmp_path):
    left = tmp_path / ".wishes.json.abc123"
    left.write_bytes(b"half")
    (tmp_path / ".other").write_bytes(b"kept")
    Wishes(tmp_path / "wishes.json", "pi-1")
    assert [path.name for path in tmp_path.iterdir()] == [".other"]


def test_the_devices_own_wish_comes_before_its_groups_and_the_newest_of_those_counts(wishes):
    wishes.take("lab", wish(3, 30), NOW)
    wishes.take("canary", wish(2, 40), NOW)
    assert wishes.chosen(PI).version == 2
    wishes.take("lab", wish(3, 40, "again"), NOW)
    assert wishes.chosen(PI).version == 3  # as new as the other: the group's name decides, everywhere alike
    wishes.take(OWN, wish(1, 5), NOW)
    assert wishes.chosen(PI).version == 1
    wishes.take(OWN, None, NOW)
    wishes.take("lab", None, NOW)
    assert wishes.chosen(PI).version == 2


def test_of_a_groups_wish_each_device_takes_the_release_for_its_own_class(wishes):
    wishes.take("lab", wish(3, 30), NOW)
    assert wishes.chosen("x86-64").release == "models/cat/x86-64/3.json"


def test_memory_that_is_lost_or_garbage_costs_replays_and_nothing_else(wishes, tmp_path, caplog):
    wishes.take(OWN, wish(2, 11), NOW)
    (tmp_path / "wishes.json").write_bytes(b"\xff{")
    again = Wishes(tmp_path / "wishes.json", "pi-1")
    assert "replays of old wishes" in caplog.text
    again.take(OWN, wish(1, 10), NOW)
    assert again.chosen(PI).version == 1


def test_a_full_disk_does_not_stop_a_wish(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    wishes = Wishes(tmp_path / "file" / "wishes.json", "pi-1")
    wishes.take(OWN, wish(1, 10), NOW)
    assert wishes.chosen(PI) == wish(1, 10)
    assert "the wish counts all the same" in caplog.text


def test_a_turn_counts_from_when_the_wish_was_first_met_also_over_a_restart(wishes, tmp_path):
    one = wish(1, 10, spread=1000.0)
    turn = turn_after("pi-1", one.deployment, 1000.0)
    wishes.take(OWN, one, NOW)
    assert wishes.seconds_left(one, NOW) == turn
    again = Wishes(tmp_path / "wishes.json", "pi-1")
    again.take(OWN, one, NOW + 1.5)
    assert again.seconds_left(one, NOW + 2.0) == pytest.approx(turn - 2.0)
    assert again.seconds_left(one, NOW + turn + 1) == 0.0
    assert again.seconds_left(one, NOW - 50_000.0) == turn  # a clock that went back makes nobody wait longer


def test_file_stays_small_however_many_deployments_there_were(wishes, tmp_path):
    for number in range(500):
        wishes.take(OWN, wish(1, number, f"d{number}"), NOW)
    assert (tmp_path / "wishes.json").stat().st_size < 4000
    assert wishes.seconds_left(msgspec.structs.replace(wish(1, 499, "d499"), spread=10.0), NOW + 11) == 0.0


@given(st.text(max_size=20), st.text(max_size=20), st.floats(0, 86_400))
def test_a_turn_is_the_same_each_time_and_within_the_spread(device, deployment, spread):
    turn = turn_after(device, deployment, spread)
    assert 0 <= turn <= spread
    assert turn == turn_after(device, deployment, spread)


@given(st.integers(0, 10_000))
def test_turns_are_spread_evenly_over_a_fleet(deployment):
    turns = sorted(turn_after(f"pi-{number}", f"d{deployment}", 1.0) for number in range(1000))
    worst = max(abs(turn - (place + 0.5) / 1000) for place, turn in enumerate(turns))
    assert worst < 0.08  # Kolmogorov's distance of 1,000 fair draws is above this once in 200,000 times


@given(st.integers(0, 10_000))
def test_who_is_last_in_one_deployment_is_not_last_in_the_next(deployment):
    order = [
        sorted(range(200), key=lambda n, d=d: turn_after(f"pi-{n}", f"d{d}", 1.0)) for d in (deployment, deployment + 1)
    ]
    same = sum(one == other for one, other in zip(*order, strict=True))
    assert same < 12
