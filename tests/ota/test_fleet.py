"""What is known of a device after its reports, however they come."""

from itertools import permutations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from edgekit.ota.messages import Alert, Drift, Failed, Health, Hello, Installed, Refused, RolledBack, Waiting
from edgekit.ota.server.fleet import (
    AHEAD_SECONDS,
    CLOCK_IS_SET,
    DeviceState,
    expect,
    fold,
    model_of,
    next_revision,
    tell,
)

ASK = {"device": "pi-1", "deployment": "cat-v2", "attempt": 1, "version": 2}
RELEASE = "models/cat/pi/2.json"
NEW = DeviceState(id="pi-1")
ASKED = expect(NEW, "cat-v2", 1, RELEASE)


def hello(*, online=True, version=1, boot="b1"):
    release = f"models/cat/pi/{version}.json" if version else ""
    return Hello(
        device="pi-1", profile="pi", boot=boot, online=online, release=release, version=version, bundle="a" * 64
    )


ANSWERS = [
    Installed(**ASK, bundle="b" * 64, measured={"p95_ms": 3.0}),
    RolledBack(**ASK, reason="p95 90 ms, limit 20"),
    RolledBack(**ASK, reason="NaN"),
    Refused(**ASK, reason="expired"),
    Failed(**ASK, reason="disk full"),
    Waiting(**ASK, reason="outside the maintenance window", until=9),
    Waiting(**ASK, reason="the link is metered"),
]


def verdict(state):
    return (state.outcome, state.reason)


def test_a_hello_says_who_the_device_is_and_what_it_runs():
    state = fold(NEW, hello(), 5.0)
    assert (state.profile, state.online, state.model, state.version, state.seen) == ("pi", True, "cat", 1, 5.0)


def test_a_will_turns_the_device_offline_and_forgets_nothing():
    state = fold(fold(NEW, hello(version=2), 1.0), hello(online=False, version=1), 9.0)
    assert (state.online, state.version, state.model) == (False, 2, "cat")


def test_an_answer_to_another_deployment_or_attempt_is_stale():
    for stale in (
        {"deployment": "cat-v1"},
        {"attempt": 2},
    ):
        state = fold(ASKED, Refused(**{**ASK, **stale}, reason="no"), 3.0)
        assert verdict(state) == ("pending", "")
        assert state.seen == 3.0


def test_a_version_in_a_hello_is_no_answer_because_its_probation_may_not_be_over():
    state = fold(ASKED, hello(version=2), 1.0)
    assert (state.version, state.outcome) == (2, "pending")


def test_a_failed_transfer_may_still_become_installed_and_never_the_other_way():
    failed = fold(ASKED, ANSWERS[4], 1.0)
    done = fold(failed, ANSWERS[0], 2.0)
    assert verdict(done) == ("installed", "")
    assert (done.version, done.bundle, done.model, done.measured) == (2, "b" * 64, "cat", {"p95_ms": 3.0})
    assert verdict(fold(done, ANSWERS[4], 3.0)) == ("installed", "")


def test_asking_again_starts_over_and_asking_the_same_does_not():
    refused = fold(ASKED, ANSWERS[3], 1.0)
    assert expect(refused, "cat-v2", 1, RELEASE) == refused
    assert verdict(expect(refused, "cat-v2", 2, RELEASE)) == ("pending", "")


def test_health_leaves_the_answer_alone():
    state = fold(ASKED, Health(device="pi-1", bundle="a" * 64, requests=10, errors=1, p95_ms=4.0), 2.0)
    assert (state.requests, state.errors, state.p95_ms, state.outcome) == (10, 1, 4.0, "pending")


DARK = Alert(kind="input-drift", what="image: mean of channel 0", value=0.6, limit=0.2, since=1.0)
DRIFT = Drift(device="pi-1", bundle="a" * 64, alerts=(DARK,))


def test_alerts_stand_until_the_device_says_that_they_passed_or_starts_anew():
    health = Health(device="pi-1", bundle="a" * 64, requests=10, errors=1, p95_ms=4.0)
    state = fold(fold(fold(ASKED, hello(), 1.0), DRIFT, 2.0), health, 3.0)
    assert (state.alerts, state.outcome) == ((DARK,), "pending")
    assert fold(state, hello(online=False), 4.0).alerts == (DARK,)
    assert fold(state, hello(), 4.0).alerts == (DARK,)
    assert fold(state, hello(boot="b2"), 4.0).alerts == ()
    assert fold(state, msgspec.structs.replace(DRIFT, alerts=()), 4.0).alerts == ()


def test_a_device_that_was_stored_before_there_were_alerts_is_read():
    stored = msgspec.to_builtins(fold(NEW, hello(), 1.0))
    del stored["alerts"]
    assert msgspec.convert(stored, DeviceState).alerts == ()


def test_every_order_of_every_answer_gives_the_same_verdict():
    verdicts = set()
    for order in permutations(ANSWERS):
        state = ASKED
        for report in order:
            state = fold(state, report, 1.0)
        verdicts.add(verdict(state))
    assert verdicts == {("refused", "expired")}


@given(
    st.lists(
        st.sampled_from([*ANSWERS, DRIFT, hello(), hello(version=2), hello(online=False), hello(boot="b2")]), max_size=8
    )
)
def test_a_report_that_comes_twice_in_a_row_counts_once(reports):
    once = twice = ASKED
    for report in reports:
        once = fold(once, report, 1.0)
        twice = fold(fold(twice, report, 1.0), report, 1.0)
    assert once == twice


@given(st.lists(st.sampled_from(ANSWERS), max_size=6), st.randoms(use_true_random=False))
def test_shuffled_and_repeated_answers_give_the_same_verdict(reports, random):
    def run(sequence):
        state = ASKED
        for report in sequence:
            state = fold(state, report, 1.0)
        return verdict(state)

    shuffled = reports + reports[: len(reports) // 2]
    random.shuffle(shuffled)
    assert run(shuffled) == run(reports)


def test_a_state_survives_the_trip_through_bytes():
    state = fold(fold(ASKED, hello(), 1.5), ANSWERS[1], 2.5)
    assert msgspec.json.decode(msgspec.json.encode(state), type=DeviceState) == state


def test_only_a_target_path_names_a_model():
    assert model_of(RELEASE) == "cat"
    for odd in ("", "models/cat/2.json", "models/../pi/2.json/x", "models/cat/pi/2.json\n", "x" * 5000):
        assert model_of(odd) == ""


def test_a_device_that_waits_has_neither_failed_nor_answered_and_says_why():
    waits = fold(ASKED, ANSWERS[5], 1.0)
    assert verdict(waits) == ("pending", "outside the maintenance window")
    assert verdict(fold(waits, ANSWERS[0], 2.0)) == ("installed", "")
    assert verdict(fold(fold(ASKED, ANSWERS[4], 1.0), ANSWERS[5], 2.0)) == ("failed", "disk full")


def test_the_will_of_an_earlier_start_that_comes_late_does_not_turn_the_device_offline():
    back = fold(fold(NEW, hello(boot="b1"), 1.0), hello(boot="b2"), 2.0)
    late = fold(back, hello(online=False, boot="b1"), 3.0)
    assert (late.online, late.boot) == (True, "b2")
    gone = fold(late, hello(online=False, boot="b2"), 4.0)
    assert not gone.online


def test_the_will_of_a_start_that_nobody_saw_counts():
    away = fold(fold(NEW, hello(boot="b1"), 1.0), hello(online=False, boot="b2"), 2.0)
    assert not away.online


def test_a_device_that_starts_over_and_over_is_no_growing_memory():
    state = NEW
    for number in range(50):
        state = fold(state, hello(boot=f"b{number}"), float(number))
    assert state.boots == ("b48", "b47", "b46", "b45")


YEAR = 1_800_000_000.0
TIMES = st.one_of(st.floats(0, CLOCK_IS_SET), st.floats(YEAR, YEAR + AHEAD_SECONDS - 1))


@given(st.lists(st.sampled_from(["", "wish 1", "wish 2"]), max_size=20), st.lists(TIMES, min_size=20, max_size=20))
def test_each_new_wish_has_a_higher_revision_though_the_clock_is_not_set_or_off_by_a_year(wishes, times):
    state = NEW
    for wish, now in zip(wishes, times, strict=False):
        told = tell(state, wish, now)
        assert told.wish == wish
        assert told.revision > state.revision if wish != state.wish else told == state
        state = told


def test_a_server_restored_from_a_backup_says_its_wish_above_what_the_device_has_met():
    before = tell(NEW, "wish 1", 100.0)
    since = tell(before, "wish 2", 200.0)
    met = msgspec.structs.replace(hello(), revision=since.revision)
    restored = tell(fold(before, met, 300.0), "wish 1", 50.0)
    assert restored.revision == since.revision + 1
    assert tell(restored, "wish 1", 60.0) == restored


@given(st.integers(1, 3))
def test_a_forged_revision_that_a_device_met_is_answered_with_one_that_it_takes(times):
    now, state = 1_800_000_000.0, NEW
    for _ in range(times):
        state = tell(fold(state, msgspec.structs.replace(hello(), revision=1 << 53), now), "wish 1", now)
    assert state.revision / 1000 < now + 60
    locked = msgspec.structs.replace(state, revision=(1 << 53) + 1)  # as an earlier server had answered it
    assert tell(locked, "wish 1", now).revision / 1000 < now + 60


def test_a_lie_about_a_groups_revision_leads_to_none_that_devices_refuse():
    assert next_revision([], 100.0) == 100_000
    assert next_revision([100_007, 1 << 53], 100.0) == 100_008
