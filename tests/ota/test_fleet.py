"""What is known of a device after its reports, however they come."""

from itertools import permutations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from edgekit.ota.messages import Failed, Health, Hello, Installed, Refused, RolledBack
from edgekit.ota.server.fleet import DeviceState, expect, fold, model_of

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


def test_every_order_of_every_answer_gives_the_same_verdict():
    verdicts = set()
    for order in permutations(ANSWERS):
        state = ASKED
        for report in order:
            state = fold(state, report, 1.0)
        verdicts.add(verdict(state))
    assert verdicts == {("refused", "expired")}


@given(st.lists(st.sampled_from([*ANSWERS, hello(), hello(version=2), hello(online=False)]), max_size=8))
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
