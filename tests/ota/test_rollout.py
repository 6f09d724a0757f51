"""Rollouts against a simulated fleet: who is asked, when it stops, and that a crash changes neither."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.ota.messages import Failed, Hello, Installed, Refused, RolledBack, Waiting
from edgekit.ota.server.fleet import DeviceState, expect, fold
from edgekit.ota.server.rollout import Plan, Rollout, abort, advance, live, lot, pause, resume, wanted

CLASSES = ("pi", "jetson", "phone")


class Fleet:
    """Devices that answer what they are asked, as `behave` says."""

    def __init__(self, devices, version=1):
        self.states = {}
        self.asked = []
        for name, profile in devices.items():
            self.hello(name, profile, version=version)

    def hello(self, name, profile, *, online=True, version=1):
        release = f"models/cat/{profile}/{version}.json" if version else ""
        message = Hello(device=name, profile=profile, boot="b", online=online, release=release, version=version)
        self.states[name] = fold(self.states.get(name, DeviceState(id=name)), message, 0.0)

    def offline(self, *names):
        for name in names:
            self.states[name] = msgspec.structs.replace(self.states[name], online=False)

    def online(self, *names):
        for name in names:
            self.states[name] = msgspec.structs.replace(self.states[name], online=True)

    def ask(self, rollout, names):
        for name in names:
            mine = rollout.assigned[name]
            self.asked.append((name, mine.attempt))
            self.states[name] = expect(self.states[name], rollout.id, mine.attempt, rollout.plan.release(mine.profile))

    def answer(self, name, kind=Installed, **fields):
        state = self.states[name]
        head = {"device": name, "deployment": state.deployment, "attempt": state.attempt, "version": 2}
        rest = {"bundle": "b" * 64} if kind is Installed else {"reason": "it was bad"}
        self.states[name] = fold(state, kind(**head, **rest, **fields), 1.0)


def fleet_of(per_class=10, classes=CLASSES):
    return Fleet({f"{c}-{i:03}": c for c in classes for i in range(per_class)})


def rollout_of(**plan):
    defaults = {"model": "cat", "version": 2, "profiles": CLASSES, "waves": (0.2, 1.0)}
    return Rollout(id="cat-v2", plan=Plan(**{**defaults, **plan}))


def begin(fleet, **plan):
    """Ask the canary; return the rollout and whom it asked."""
    step = advance(rollout_of(**plan), fleet.states, 0.0)
    fleet.ask(step.rollout, step.assign)
    return step.rollout, step.assign


def play(rollout, fleet, behave=lambda name: Installed, until=50):
    """Advance and answer until nothing changes any more."""
    for now in range(until):
        step = advance(rollout, fleet.states, float(now))
        fleet.ask(step.rollout, step.assign)
        before = dict(fleet.states)
        for name in [d for d, s in fleet.states.items() if s.outcome == "pending" and s.online]:
            if kind := behave(name):
                fleet.answer(name, kind)
        if step.rollout == rollout and before == fleet.states:
            return rollout
        rollout = step.rollout
    return rollout


def test_a_good_release_reaches_everyone_in_two_waves_and_is_done():
    fleet = fleet_of()
    first = advance(rollout_of(), fleet.states, 0.0)
    assert len(first.assign) == 6
    assert {c: sum(d.startswith(c) for d in first.assign) for c in CLASSES} == dict.fromkeys(CLASSES, 2)
    final = play(rollout_of(), fleet)
    assert (final.status, final.reason) == ("done", "30 installed")
    assert sorted(d for d, _ in fleet.asked) == sorted(fleet.states)
    assert [a.wave for a in final.assigned.values()].count(0) == 6


def test_a_device_that_waits_by_its_own_policy_holds_no_wave_back_and_is_waited_for_in_the_end():
    waits = min(begin(fleet_of())[1])
    fleet = fleet_of()
    rollout = play(rollout_of(), fleet, lambda d: Waiting if d == waits else Installed)
    assert (rollout.status, rollout.wave + 1, len(rollout.assigned)) == ("running", 2, 30)
    fleet.answer(waits)
    assert play(rollout, fleet).status == "done"


def test_a_release_that_is_bad_on_one_class_halts_in_the_canary_and_never_reaches_wave_two():
    for limit in (0, 1, 0.3):
        fleet = fleet_of()
        final = play(
            rollout_of(max_failures=limit), fleet, lambda d: RolledBack if d.startswith("jetson") else Installed
        )
        assert final.status == "halted"
        assert final.wave == 0
        assert len(fleet.asked) == 6
        assert "2 of " in final.reason
        assert "2 rolled-back" in final.reason
        assert "wave 1" in final.reason


def test_a_share_is_judged_class_by_class_so_that_good_classes_cannot_hide_a_bad_one():
    fleet = fleet_of(per_class=20)
    final = play(rollout_of(max_failures=0.4), fleet, lambda d: Refused if d.startswith("phone") else Installed)
    assert final.status == "halted"
    assert final.reason == "4 of 4 reached phone devices failed (4 refused), limit 40%, in wave 1"


def test_failures_within_the_limit_do_not_stop_it():
    fleet = fleet_of()
    bad = advance(rollout_of(), fleet.states, 0.0).assign[0]
    final = play(rollout_of(max_failures=1), fleet, lambda d: RolledBack if d == bad else Installed)
    assert (final.status, final.reason) == ("done", "29 installed, 1 rolled-back")


def test_half_of_the_canary_offline_neither_passes_nor_fails_it():
    fleet = fleet_of()
    rollout, canary = begin(fleet)
    fleet.offline(*canary[::2])
    waiting = play(rollout, fleet)
    assert (waiting.status, waiting.wave, waiting.count("pending")) == ("running", 0, 3)
    fleet.online(canary[0])
    assert play(waiting, fleet).wave == 1


def test_a_canary_that_is_wholly_offline_waits_and_a_failure_in_it_still_halts():
    fleet = fleet_of()
    rollout, canary = begin(fleet)
    fleet.offline(*canary)
    waiting = play(rollout, fleet)
    assert (waiting.status, waiting.wave) == ("running", 0)
    fleet.online(*canary)
    assert play(waiting, fleet, lambda d: Refused).status == "halted"


def test_a_few_offline_devices_hold_up_the_end_but_not_the_next_wave():
    fleet = fleet_of()
    rollout, canary = begin(fleet)
    fleet.offline(canary[0])
    final = play(rollout, fleet)
    assert (final.status, final.wave, final.count("installed")) == ("running", 1, 29)
    fleet.online(canary[0])
    assert play(final, fleet).status == "done"


def test_devices_that_are_switched_off_are_chosen_last():
    fleet = fleet_of()
    fleet.offline(*(name for name in fleet.states if not name.endswith(("001", "007"))))
    _, canary = begin(fleet)
    assert sorted(canary) == sorted(f"{c}-{n}" for c in CLASSES for n in ("001", "007"))


def test_a_device_whose_transfer_fails_is_no_failure_of_the_release_and_blocks_nobody():
    fleet = fleet_of()
    canary = advance(rollout_of(), fleet.states, 0.0).assign
    final = play(rollout_of(), fleet, lambda d: Failed if d == canary[0] else Installed)
    assert (final.status, final.wave, final.count("installed"), final.count("failed")) == ("running", 1, 29, 1)


def test_a_canary_that_is_brought_wrong_bytes_halts_nothing_and_goes_on_once_they_are_right():
    """Whoever has no key and sends them must not be able to end a rollout, nor to let it go on unproven."""
    fleet = fleet_of()
    rollout, canary = begin(fleet)
    waiting = play(rollout, fleet, lambda _: Failed)
    assert (waiting.status, waiting.wave, waiting.count("failed"), len(waiting.assigned)) == ("running", 0, 6, 6)
    for device in canary[:4]:
        fleet.answer(device)
    opened = play(waiting, fleet)
    assert (opened.status, opened.wave, opened.count("installed"), opened.count("failed")) == ("running", 1, 28, 2)
    for device in canary[4:]:
        fleet.answer(device)
    assert play(opened, fleet).status == "done"


def test_an_online_device_that_has_not_answered_keeps_the_next_wave_closed():
    fleet = fleet_of()
    silent = advance(rollout_of(), fleet.states, 0.0).assign[0]
    final = play(rollout_of(), fleet, lambda d: None if d == silent else Installed)
    assert (final.wave, len(final.assigned)) == (0, 6)


def test_the_dwell_time_is_counted_from_the_last_answer_and_starts_again_when_one_is_missing():
    fleet = fleet_of()
    step = advance(rollout_of(dwell=10.0), fleet.states, 0.0)
    fleet.ask(step.rollout, step.assign)
    for name in step.assign:
        fleet.answer(name)
    settled = advance(step.rollout, fleet.states, 100.0).rollout
    assert (settled.wave, settled.settled) == (0, 100.0)
    assert advance(settled, fleet.states, 109.9).rollout == settled
    assert advance(settled, fleet.states, 110.0).rollout.wave == 1
    fleet.answer(step.assign[0], RolledBack)
    assert advance(settled, fleet.states, 110.0).rollout.status == "halted"


def test_pause_stops_choosing_and_resume_goes_on_where_it_was():
    fleet = fleet_of()
    step = advance(rollout_of(), fleet.states, 0.0)
    fleet.ask(step.rollout, step.assign)
    paused = play(pause(step.rollout), fleet)
    assert (paused.status, len(paused.assigned), paused.count("installed")) == ("paused", 6, 6)
    assert play(resume(paused), fleet).status == "done"
    assert len(fleet.asked) == len(set(fleet.asked)) == 30


def test_resume_after_a_halt_asks_those_that_failed_once_more():
    fleet = fleet_of()
    halted = play(rollout_of(), fleet, lambda d: RolledBack if d.startswith("pi") else Installed)
    again = resume(halted)
    fleet.ask(again, [d for d, a in again.assigned.items() if a.attempt == 2])
    final = play(again, fleet)
    assert (final.status, final.reason) == ("done", "30 installed")
    assert sorted(d for d, attempt in fleet.asked if attempt == 2) == sorted(
        d for d, a in halted.assigned.items() if a.outcome == "rolled-back"
    )


def test_abort_is_final_and_a_done_rollout_cannot_be_changed():
    aborted = abort(rollout_of())
    assert abort(aborted) == aborted
    assert advance(aborted, fleet_of().states, 0.0).assign == []
    for call in (pause, resume):
        with pytest.raises(UsageError, match="it is aborted"):
            call(aborted)
    done = play(rollout_of(), fleet_of())
    with pytest.raises(UsageError, match="it is done"):
        abort(done)


def test_devices_of_other_classes_and_models_and_those_ahead_are_left_alone():
    fleet = fleet_of()
    fleet.hello("watch-1", "watch")
    fleet.hello("pi-new", "pi", version=0)
    fleet.hello("pi-ahead", "pi", version=3)
    other = Hello(device="pi-dog", profile="pi", boot="b", online=True, release="models/dog/pi/1.json", version=1)
    fleet.states["pi-dog"] = fold(DeviceState(id="pi-dog"), other, 0.0)
    final = play(rollout_of(), fleet)
    assert final.status == "done"
    assert set(final.assigned) == set(fleet.states) - {"watch-1", "pi-ahead", "pi-dog"}


def test_a_device_that_joins_after_the_end_is_served_too():
    fleet = fleet_of()
    done = play(rollout_of(), fleet)
    fleet.hello("pi-late", "pi", version=0)
    step = advance(done, fleet.states, 99.0)
    assert (step.assign, step.rollout.status) == (["pi-late"], "done")


def test_an_empty_fleet_waits_and_a_fleet_that_has_it_already_is_done():
    assert advance(rollout_of(), {}, 0.0).rollout.status == "running"
    there = Fleet({"pi-1": "pi"}, version=2)
    final = advance(rollout_of(), there.states, 0.0).rollout
    assert (final.status, final.reason) == ("done", "every device had it already")


def test_a_halted_or_aborted_rollout_stands_only_where_it_is_installed():
    fleet = Fleet({"pi-1": "pi", "pi-2": "pi"})
    old = play(rollout_of(waves=(1.0,)), fleet)
    new = msgspec.structs.replace(rollout_of(version=3, waves=(1.0,)), id="cat-v3")
    step = advance(new, fleet.states, 0.0)
    fleet.ask(step.rollout, step.assign)
    fleet.answer("pi-1")
    observed = abort(advance(step.rollout, fleet.states, 0.0).rollout)
    assert wanted("pi-1", [old, observed]).id == "cat-v3"
    assert wanted("pi-2", [old, observed]).id == "cat-v2"
    assert wanted("pi-2", [observed]) is None


def test_only_the_newest_done_rollout_of_a_model_still_serves_latecomers():
    runs = [
        msgspec.structs.replace(rollout_of(), id=name, status=status)
        for name, status in (("a", "done"), ("b", "halted"), ("c", "done"), ("d", "running"))
    ]
    assert [r.id for r in live(runs)] == ["b", "c", "d"]


def test_the_queue_is_another_in_each_rollout_and_the_same_for_ever_in_one():
    names = [f"d{i}" for i in range(50)]
    assert sorted(names, key=lambda d: lot(d, "a")) != sorted(names, key=lambda d: lot(d, "b"))
    assert lot("d1", "a").hex().startswith("03803201")


@pytest.mark.parametrize(
    "bad",
    [
        {"waves": ()},
        {"waves": (0.5,)},
        {"waves": (0.5, 0.2, 1.0)},
        {"waves": (0.0, 1.0)},
        {"waves": (0.2, float("nan"), 1.0)},
        {"max_failures": -1},
        {"max_failures": 1.5},
        {"max_failures": float("nan")},
        {"dwell": -1.0},
        {"dwell": float("inf")},
        {"profiles": ()},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(bad):
    with pytest.raises(UsageError) as caught:
        rollout_of(**bad)
    assert caught.value.hint


KINDS = st.sampled_from([Installed, RolledBack, Refused, Failed, None])
PLANS = st.builds(
    rollout_of,
    waves=st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(lambda w: (*sorted(w), 1.0)),
    max_failures=st.one_of(st.integers(0, 3), st.floats(0.0, 1.0)),
)


@settings(max_examples=60, deadline=None)
@given(st.data(), PLANS, st.integers(1, 6))
def test_killed_and_repeated_anywhere_it_neither_skips_nor_repeats_a_device(data, rollout, size):
    fleet = fleet_of(size, ("pi", "jetson"))
    fates = {name: data.draw(KINDS) for name in fleet.states}
    straight = play(rollout, fleet_of(size, ("pi", "jetson")), fates.get)
    for now in range(30):
        first = advance(rollout, fleet.states, float(now))
        again = advance(rollout, fleet.states, float(now))  # killed before it was written: the same step
        assert first == again
        after = advance(first.rollout, fleet.states, float(now))  # written, killed before anybody was asked
        assert after.assign == []
        assert after.rollout == first.rollout
        fleet.ask(first.rollout, first.assign)
        assert advance(first.rollout, fleet.states, float(now)).assign == []
        for name in [d for d, s in fleet.states.items() if s.outcome == "pending"]:
            if kind := fates[name]:
                fleet.answer(name, kind)
        rollout = msgspec.json.decode(msgspec.json.encode(first.rollout), type=Rollout)
    assert len(fleet.asked) == len(set(fleet.asked))
    assert rollout == straight


@settings(max_examples=60, deadline=None)
@given(st.data(), PLANS, st.integers(1, 8))
def test_no_wave_opens_while_the_failures_exceed_the_limit(data, rollout, size):
    fleet = fleet_of(size)
    fates = {name: data.draw(st.sampled_from([Installed, RolledBack])) for name in fleet.states}
    final = play(rollout, fleet, fates.get)
    assert final.status in ("done", "halted")
    failed = [a for a in final.assigned.values() if a.outcome == "rolled-back"]
    limit = rollout.plan.max_failures
    if final.status == "done":
        assert set(final.assigned) == set(fleet.states)
    elif isinstance(limit, int):
        assert len(failed) > limit
        assert len([a for a in failed if a.wave < final.wave]) <= limit
