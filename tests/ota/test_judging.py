"""The statistics that halt a rollout: no more false alarms than stated, regressions found with the stated power."""

import math
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.ota.messages import Alert, Health, Hello, Installed
from edgekit.ota.server.evidence import e_value, power, upper_bound
from edgekit.ota.server.fleet import DeviceState, expect, fold
from edgekit.ota.server.judging import (
    CLEAR,
    HALF,
    Controls,
    Judging,
    Reading,
    Tally,
    Witness,
    believed,
    chance_to_find,
    is_ready,
    judge,
    read,
)
from edgekit.ota.server.plan import Plan
from edgekit.ota.server.records import REMEMBERED, Record, added
from edgekit.ota.server.rollout import Rollout, advance, begin, resume

HOW = Judging()


@given(st.floats(0.005, 0.5), st.floats(0.01, 0.4), st.integers(1, 60))
def test_where_the_share_is_as_believed_the_bets_are_fair(share, rise, tries):
    expected = sum(
        math.comb(tries, hits) * share**hits * (1 - share) ** (tries - hits) * e_value(hits, tries, share, rise)
        for hits in range(tries + 1)
    )
    assert expected == pytest.approx(1.0, rel=1e-6)


@given(st.floats(0.02, 0.5), st.floats(0.01, 0.3), st.integers(0, 40), st.integers(1, 40))
def test_a_hit_is_never_evidence_for_the_release_and_a_pass_never_against_it(share, rise, hits, more):
    tries = hits + more
    assert e_value(hits + 1, tries + 1, share, rise) >= e_value(hits, tries, share, rise)
    assert e_value(hits, tries + 1, share, rise) <= e_value(hits, tries, share, rise)


@pytest.mark.parametrize(("share", "rise"), [(0.02, 0.05), (0.06, 0.05), (HALF, CLEAR)])
def test_looking_after_every_device_it_is_wrong_at_most_as_often_as_stated(share, rise):
    for alpha in (0.05, 0.2):
        assert power(400, share, share, rise, bound=1 / alpha) <= alpha
        assert power(400, share / 2, share, rise, bound=1 / alpha) <= alpha / 4


def test_the_power_that_is_stated_is_the_power_that_is_played():
    random, caught = Random(1), 0  # noqa: S311  # the same each time, protects nothing
    for _ in range(2000):
        hits = 0
        for tries in range(1, 101):
            hits += random.random() < 0.12
            if e_value(hits, tries, 0.02, 0.05) >= 80:
                caught += 1
                break
    assert caught / 2000 == pytest.approx(power(100, 0.12, 0.02, 0.05, bound=80), abs=0.03)
    assert chance_to_find(1000, HOW, {}) > 0.95
    assert chance_to_find(20, HOW, {}) < 0.5


def test_a_slowdown_of_the_stated_size_is_found_by_a_hundred_devices_of_ten_percent_noise():
    """Of devices whose p95 varies by 10 % before and after, 68 % are slower by more than half of 15 %."""
    share = 0.5 * math.erfc(-(math.log(1.15) - math.log1p(0.15 / 2)) / (0.1 * 2))
    assert share == pytest.approx(0.68, abs=0.01)
    assert power(100, share, HALF, CLEAR, bound=HOW.bound) > 0.75
    assert power(200, share, HALF, CLEAR, bound=HOW.bound) > 0.95


def witnesses(profile, failed, passed, **reading):
    told = Reading(**reading) if reading else None
    return [Witness(profile, failed=i < failed, counts=True, reading=told) for i in range(failed + passed)]


def test_a_bad_class_is_not_hidden_by_good_ones_and_the_verdict_says_the_numbers():
    told = judge([*witnesses("pi", 0, 400), *witnesses("jetson", 6, 4)], HOW, {})
    assert told.test == "failures"
    assert told.why.startswith("6 of 10 jetson devices failed, 2.0% at most are believed to anyway; evidence ")
    assert "bound 80 (alpha 0.05)" in told.why
    assert judge(witnesses("pi", 1, 30), HOW, {}) is None
    assert judge([], HOW, {}) is None


def test_a_fleet_that_always_loses_five_in_a_hundred_is_judged_by_that():
    baseline = {"pi": Tally(50, 1000)}
    assert believed("pi", HOW, {}) == HOW.floor
    assert believed("pi", HOW, baseline) == pytest.approx(upper_bound(50, 1000))
    assert 0.05 < upper_bound(50, 1000) < 0.07
    assert judge(witnesses("pi", 50, 950), HOW, baseline) is None
    assert judge(witnesses("pi", 50, 950), HOW, {}).test == "failures"
    assert believed("new-class", HOW, baseline) == believed("pi", HOW, baseline)
    assert believed("pi", HOW, {"pi": Tally(3, 5)}) == HOW.floor, "five answers are no past"


def test_readings_halt_by_their_kind_and_tell_by_how_much():
    slow = judge(witnesses("pi", 0, 20, slower=True, ratio=1.2), HOW, {})
    assert (slow.test, "+20.0% of the p95" in slow.why) == ("latency", True)
    errs = judge(witnesses("pi", 0, 20, erring=True, error_rise=0.03), HOW, {})
    assert (errs.test, "+3.00% of requests" in errs.why) == ("errors", True)
    drifts = judge(witnesses("pi", 0, 20, drifting=True), HOW, {})
    assert (drifts.test, "20 of 20 pairs" in drifts.why) == ("drift", True)
    assert judge(witnesses("pi", 0, 20, slower=True), HOW, {}, waived=("latency",)) is None
    assert judge(witnesses("pi", 0, 20, drifting=True), Judging(tests=("failures",)), {}) is None


BEFORE, AFTER = "a" * 64, "b" * 64


def device(name, *, p95=(10.0,) * 6, after=(), errors=0, online=True):
    state = DeviceState(id=name, profile="pi", online=online, model="cat", version=1, bundle=BEFORE)
    number = 0
    for bundle, figures, failed in ((BEFORE, p95, 1), (AFTER, after, errors)):
        for figure in figures:
            number += 1
            health = Health(
                device=name, bundle=bundle, requests=100, errors=failed, p95_ms=figure, boot="b", number=number
            )
            state = fold(state, health, 1.0)
    return msgspec.structs.replace(state, version=2, bundle=AFTER) if after else state


def controls(count=20, last=10.0, alerts=()):
    fleet = [device(f"c{i}", p95=(10.0,) * 5 + (last,)) for i in range(count)]
    return Controls([msgspec.structs.replace(one, alerts=alerts) for one in fleet], HOW, set())


def test_a_device_is_held_against_itself_and_against_what_changed_elsewhere():
    slower = device("d", after=(12.0,) * 3)
    assert is_ready(slower, HOW)
    reading = read(slower, controls(), HOW)
    assert (reading.slower, reading.ratio, reading.erring) == (True, 1.2, False)
    # The whole fleet is slower at this time of day: the release is not to blame.
    assert read(slower, controls(last=12.0), HOW).slower is False
    assert read(device("d", after=(10.6,) * 3), controls(), HOW).slower is False, "less than half of 15 %"
    assert read(device("d", after=(10.0,) * 3, errors=5), controls(), HOW).erring is True
    assert read(device("d", after=(10.0,) * 3, errors=1), controls(), HOW).erring is False


def test_a_device_without_a_past_or_a_fleet_without_others_bears_no_witness():
    assert read(device("d", p95=(10.0,), after=(99.0,) * 3), controls(), HOW).slower is None
    assert read(device("d", after=(99.0,) * 3), controls(count=9), HOW).slower is None
    assert not is_ready(device("d", after=(99.0,) * 2), HOW)
    assert not is_ready(device("d"), HOW) or device("d").bundle == BEFORE


ALERT = Alert(kind="output-drift", what="answers", value=1.0, limit=0.5, since=1.0)


def test_alerts_count_beside_those_of_a_partner_that_nobody_else_has():
    drifting = msgspec.structs.replace(device("d", after=(10.0,) * 3), alerts=(ALERT,))
    calm = device("e", after=(10.0,) * 3)
    assert read(drifting, controls(), HOW).drifting is True
    assert read(drifting, controls(alerts=(ALERT,)), HOW).drifting is None, "both have some: neither says anything"
    assert read(calm, controls(alerts=(ALERT,)), HOW).drifting is False
    one = Controls([device("c0")], HOW, set())
    assert [read(drifting, one, HOW).partner for _ in range(2)] == ["c0", ""]
    assert read(drifting, Controls([device("c0")], HOW, {"c0"}), HOW).partner == ""


def test_health_is_counted_once_by_its_number_and_the_record_of_the_bundle_before_is_kept():
    state = device("d", p95=(10.0, 20.0), after=(30.0,))
    assert (state.before.reports, state.record.reports) == (2, 1)
    assert math.exp(state.before.log_p95) == pytest.approx(math.sqrt(200))
    again = Health(device="d", bundle=AFTER, requests=100, errors=0, p95_ms=99.0, boot="b", number=3)
    assert fold(state, again, 2.0).record == state.record
    anew = msgspec.structs.replace(again, boot="c", number=1)
    assert fold(state, anew, 2.0).record.reports == 2
    old = msgspec.structs.replace(again, boot="", number=0)
    twice = fold(fold(state, old, 2.0), old, 2.0)
    assert (twice.record.reports, twice.p95_ms) == (2, 99.0), "an old device says no number: the very same counts once"


def test_a_record_forgets_slowly_and_takes_no_nonsense():
    record = Record(bundle=BEFORE)
    for number in range(1000):
        health = Health(device="d", bundle=BEFORE, requests=10, errors=number >= 900, p95_ms=5.0)
        record = added(record, health)
    assert record.reports <= REMEMBERED
    assert record.error_rate > 0.09
    assert math.exp(record.log_p95) == pytest.approx(5.0)
    for requests, p95 in ((0, 5.0), (10, 0.0), (10, -1.0), (10, math.inf)):
        nonsense = Health(device="d", bundle=BEFORE, requests=requests, errors=0, p95_ms=p95)
        assert added(record, nonsense) == record


def test_a_reading_is_taken_once_survives_a_restart_and_a_resume_waives_what_halted():
    fleet = {f"d{i:03}": device(f"d{i:03}") for i in range(100)}
    plan = Plan(model="cat", version=2, profiles=("pi",), waves=(0.3, 1.0), max_failures=1.0, judging=HOW, dwell=9e9)
    rollout = begin("cat-v2", plan, ())
    step = advance(rollout, fleet, 1.0)
    assert len(step.assign) == 30
    for name in step.assign:
        state = expect(fleet[name], "cat-v2", 1, plan.release("pi"))
        word = Installed(device=name, deployment="cat-v2", attempt=1, version=2, bundle=AFTER)
        for number in range(7, 10):
            health = Health(device=name, bundle=AFTER, requests=100, errors=1, p95_ms=13.0, boot="b", number=number)
            state = fold(state, health, 2.0)
        fleet[name] = fold(state, word, 2.0)
    halted = advance(step.rollout, fleet, 3.0).rollout
    assert (halted.status, halted.halted_by, halted.wave) == ("halted", "latency", 0)
    assert "30 of 30 devices" in halted.reason.replace(" pi", "")
    again = msgspec.json.decode(msgspec.json.encode(halted), type=Rollout)
    assert again == halted
    assert all(a.reading.ratio == 1.3 for a in again.assigned.values())
    resumed = resume(again)
    assert resumed.waived == ("latency",)
    after = advance(resumed, fleet, 4.0).rollout
    assert (after.status, after.assigned) == ("running", halted.assigned), "no reading is taken twice"


def test_the_baseline_is_what_became_of_rollouts_that_were_done():
    from edgekit.ota.server.rollout import Assignment

    plan = Plan(model="cat", version=1, profiles=("pi",))
    answers = {
        f"d{i}": Assignment(wave=0, profile="pi", outcome="refused" if i < 4 else "installed") for i in range(50)
    }
    done = Rollout(id="a", plan=plan, status="done", assigned=answers)
    halted = msgspec.structs.replace(done, id="b", status="halted")
    resumed = msgspec.structs.replace(done, id="c", halted_by="failures")
    assert begin("d", plan, [done, halted, resumed]).baseline == {"pi": Tally(4, 50)}


@pytest.mark.parametrize("bad", [{"alpha": 0.0}, {"alpha": 0.6}, {"latency": -0.1}, {"latency": 9.0}, {"tests": ()},
                                 {"errors": math.nan}, {"tests": ("errors", "errors")}])  # fmt: skip
def test_a_judgement_that_makes_no_sense_is_refused(bad):
    with pytest.raises(UsageError):
        Judging(**bad)


def test_a_hello_brings_facts_and_one_of_an_old_device_takes_them_away():
    new = Hello(device="d", profile="pi", boot="b", online=True, facts={"runtime": "0.1.0"})
    state = fold(DeviceState(id="d"), new, 1.0)
    assert state.facts == {"runtime": "0.1.0"}
    will = msgspec.structs.replace(new, online=False, facts={})
    assert fold(state, will, 2.0).facts == {"runtime": "0.1.0"}
    assert fold(state, msgspec.structs.replace(new, facts={}), 2.0).facts == {}
