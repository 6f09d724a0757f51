"""Stories of whole rollouts, told with the simulation: the code that decides for a real fleet, a clock set by hand."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.ota.server import rollout as rollouts
from edgekit.ota.server import simulation
from edgekit.ota.server.fleet import DeviceState, expect
from edgekit.ota.server.penalties import boxed
from edgekit.ota.server.plan import Plan
from edgekit.ota.server.rollout import Assignment, Rollout, advance
from edgekit.ota.server.scenario import parse

BASE = """
hours = {hours}
[plan]
waves = ["5%", "25%", "100%"]
dwell = 3600
patience = 3600
{plan}
[plan.judging]
alpha = {alpha}
[fleet]
devices = {devices}
flaky = {flaky}
offline = {offline}
past = 1000
{faults}
"""


def story(seed=0, watch=None, **told):
    defaults = {"hours": 48, "plan": "", "alpha": 0.05, "devices": 1000, "flaky": 0.02, "offline": 0.2, "faults": ""}
    return simulation.play(parse(BASE.format(**{**defaults, **told})), seed, watch)


BAD_CLASS = '[[faults]]\nwhere = "class = jetson-orin"\nfailures = 0.8\n'
SLOW = "[[faults]]\nlatency = 0.15\n"


@pytest.mark.parametrize("seed", range(8))
def test_a_release_that_is_bad_on_one_class_is_caught_in_the_canary_and_never_reaches_wave_two(seed):
    told = story(seed, faults=BAD_CLASS)
    assert (told.status, told.halted_by, told.wave) == ("halted", "failures", 1)
    assert "jetson-orin devices failed" in told.reason
    assert told.hurt <= 20
    assert sum(part.hurt for part in told.parts if part.stratum[0] != "jetson-orin") == 0
    assert all(part.reached >= 1 for part in told.parts), "every stratum was in the canary"


def test_a_good_release_reaches_everyone_though_some_are_flaky_and_a_fifth_is_switched_off():
    told = story(hours=96)
    assert (told.status, told.wave, told.reached, told.hurt) == ("done", 3, 1000, 0)
    assert told.installed + told.failed == 1000
    assert told.opened[1] >= 1.0, "the canary was watched for its hour"


def test_the_same_seed_tells_the_same_story_and_another_an_other():
    assert story(3, faults=SLOW) == story(3, faults=SLOW)
    assert story(3, faults=SLOW) != story(4, faults=SLOW)


def test_half_of_the_canary_offline_neither_passes_nor_fails_it():
    seen = []

    def watch(rollout, fleet, _):
        canary = [d for d, a in rollout.assigned.items() if a.wave == 0]
        answered = sum(rollout.assigned[d].outcome in ("installed", "rolled-back") for d in canary)
        seen.append((rollout.status, rollout.wave, answered * 2 > len(canary)))

    story(devices=60, offline=0.9, hours=12, watch=watch)
    assert any(not most for _, _, most in seen)
    assert all(wave == 0 for _, wave, most in seen if not most)
    assert all(status == "running" for status, wave, most in seen if not most)


def test_a_release_that_drifts_or_errs_is_found_and_said_by_name():
    assert story(faults="[[faults]]\ndrift = 0.4\n").halted_by == "drift"
    assert story(faults="[[faults]]\nerrors = 0.02\n").halted_by == "errors"


def test_after_a_halt_whoever_runs_the_release_goes_to_the_old_bundle_under_a_new_version():
    told = story(faults=SLOW, plan="roll_back = true", hours=96)
    assert told.halted_by == "latency"
    assert told.reached >= told.installed > 0
    assert told.back >= 0.75 * told.installed


@pytest.mark.slow
def test_a_slowdown_of_fifteen_percent_is_caught_with_the_stated_power():
    stories = [story(seed, faults=SLOW) for seed in range(60)]
    caught = [one for one in stories if one.halted_by == "latency" and one.wave < 3]
    print(
        f"power {len(caught) / len(stories):.0%}, in the canary {sum(o.wave == 1 for o in caught) / len(stories):.0%}"
    )
    assert len(caught) >= 0.9 * len(stories)


@pytest.mark.slow
def test_a_release_that_is_no_worse_is_halted_at_most_as_often_as_stated():
    """Of 150 at alpha 20 %, at most 30 are expected; 45 have a probability of 2 in 1,000 even at the very bound."""
    stories = [story(seed, alpha=0.2, devices=400, hours=12, flaky=0.05) for seed in range(150)]
    alarms = [one.halted_by for one in stories if one.halted_by]
    print(f"false alarms {len(alarms)} of {len(stories)}: {alarms}")
    assert len(alarms) <= 45


# Pauses, aborts and the rest at every stage: whatever the operator does, between any two steps.

PLAN = Plan(model="cat", version=2, profiles=("pi",), waves=(0.2, 0.5, 1.0), max_failures=1.0)


def fleet_of(size=20):
    return {
        f"d{i:02}": DeviceState(id=f"d{i:02}", profile="pi", online=True, model="cat", version=1) for i in range(size)
    }


def answered(fleet, rollout, names, outcome="installed"):
    for name in names:
        mine = rollout.assigned[name]
        asked = expect(fleet[name], rollout.id, mine.attempt, PLAN.release("pi"))
        version = 2 if outcome == "installed" else 1
        fleet[name] = msgspec.structs.replace(asked, outcome=outcome, version=version)


def staged(stage):
    """Return a rollout that has opened so many waves, the last not answered yet, and its fleet."""
    fleet, rollout = fleet_of(), Rollout(id="cat-v2", plan=PLAN)
    step = advance(rollout, fleet, 0.0)
    for _ in range(stage):
        answered(fleet, step.rollout, step.assign)
        step = advance(step.rollout, fleet, 0.0)
    return step.rollout, fleet


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_paused_at_any_stage_nobody_is_asked_and_resumed_nobody_is_left_out_or_asked_twice(stage):
    rollout, fleet = staged(stage)
    paused = rollouts.pause(rollout)
    answered(fleet, paused, [d for d, a in paused.assigned.items() if a.outcome == "pending"])
    step = advance(paused, fleet, 1.0)
    assert (step.assign, step.rollout.status, set(step.rollout.assigned)) == ([], "paused", set(rollout.assigned))
    rollout = rollouts.resume(step.rollout)
    for _ in range(4):
        step = advance(rollout, fleet, 2.0)
        answered(fleet, step.rollout, step.assign)
        rollout = step.rollout
    assert (rollout.status, rollout.count("installed")) == ("done", 20)
    assert {a.attempt for a in rollout.assigned.values()} == {1}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_aborted_at_any_stage_it_stands_only_where_it_is_installed(stage):
    rollout, fleet = staged(stage)
    aborted = advance(rollouts.abort(rollout), fleet, 1.0)
    assert (aborted.assign, aborted.rollout.status) == ([], "aborted")
    for name, mine in aborted.rollout.assigned.items():
        wish = rollouts.wanted(name, [aborted.rollout])
        assert (wish is not None) == (mine.outcome == "installed")


@pytest.mark.parametrize("stage", [0, 1])
def test_promoted_the_next_wave_opens_without_waiting_and_the_same_wave_twice_is_once(stage):
    rollout, fleet = staged(stage)
    promoted = rollouts.promote(rollout, stage + 1)
    assert rollouts.promote(promoted, stage + 1) == promoted
    step = advance(promoted, fleet, 1.0)
    assert len(step.rollout.assigned) == (10, 20)[stage]
    assert rollouts.promote(rollout) == promoted
    for bad in (3, -1):
        with pytest.raises(UsageError, match="has no wave"):
            rollouts.promote(rollout, bad)


def test_those_that_failed_are_retried_and_a_rollout_that_was_done_is_done_again():
    rollout, fleet = staged(2)
    pending = [d for d, a in rollout.assigned.items() if a.outcome == "pending"]
    answered(fleet, rollout, pending[:3], "rolled-back")
    answered(fleet, rollout, pending[3:])
    done = advance(rollout, fleet, 1.0).rollout
    assert (done.status, done.reason) == ("done", "17 installed, 3 rolled-back")
    again = rollouts.retry(done)
    assert again.status == "running"
    assert rollouts.retry(again) == again, "said twice it is said once"
    assert rollouts.wanted(pending[0], [again]) is None, "nobody is told before it is asked"
    step = advance(again, fleet, 2.0)
    assert sorted(step.assign) == sorted(pending[:3])
    assert {step.rollout.assigned[d].attempt for d in step.assign} == {2}
    answered(fleet, step.rollout, step.assign)
    assert advance(step.rollout, fleet, 3.0).rollout.reason == "20 installed"


def test_a_proposed_rollout_asks_nobody_until_somebody_else_approves():
    proposed = rollouts.propose(Rollout(id="cat-v2", plan=PLAN), "ann")
    assert advance(proposed, fleet_of(), 0.0).assign == []
    for who in ("ann", ""):
        with pytest.raises(UsageError, match="somebody else"):
            rollouts.approve(proposed, who)
    for verb in (rollouts.pause, rollouts.resume, rollouts.retry, rollouts.promote):
        with pytest.raises(UsageError, match="it is proposed"):
            verb(proposed)
    approved = rollouts.approve(proposed, "ben")
    assert (approved.status, approved.started_by, approved.approved_by) == ("running", "ann", "ben")
    assert rollouts.approve(approved, "ben") == approved
    assert len(advance(approved, fleet_of(), 0.0).assign) == 4
    assert rollouts.abort(proposed).status == "aborted"
    with pytest.raises(UsageError, match="needs a name"):
        rollouts.propose(proposed, "")


def rollout_in_which(name, status="done", **outcomes):
    assigned = {d: Assignment(wave=0, profile="pi", outcome=o.replace("_", "-")) for d, o in outcomes.items()}
    return Rollout(id=name, plan=PLAN, status=status, assigned=assigned)


def test_devices_that_fail_again_and_again_sit_out_until_they_are_released():
    past = [
        rollout_in_which(f"r{i}", d00="rolled_back", d01="installed", d02="refused" if i else "installed")
        for i in range(3)
    ]
    assert boxed(past, 2) == ("d00", "d02")
    assert boxed(past, 3) == ("d00",)
    assert boxed(past, 0) == ()
    assert boxed(past, 2, {"d00": "r2"}) == ("d02",)
    bad_release = [rollout_in_which(f"h{i}", "halted", d03="rolled_back") for i in range(3)]
    assert boxed([*past, *bad_release], 3) == ("d00",), "a release that was halted speaks of the release"
    rollout = rollouts.begin("new", msgspec.structs.replace(PLAN, waves=(1.0,), penalty=2), past)
    step = advance(rollout, fleet_of(4), 0.0)
    assert sorted(step.assign) == ["d01", "d03"]
    released = rollouts.release(step.rollout, ["d00"])
    assert advance(released, fleet_of(4), 1.0).assign == ["d00"]
    assert rollouts.release(released, ["d00"]) == released


def test_a_rollout_for_some_ends_none_for_the_others():
    whole = Rollout(id="a", plan=PLAN, status="done")
    some = Rollout(id="b", plan=msgspec.structs.replace(PLAN, version=3, where="tag.region = eu"), status="done")
    every = Rollout(id="c", plan=msgspec.structs.replace(PLAN, version=4), status="done")
    assert [one.id for one in rollouts.live([whole, some])] == ["a", "b"]
    assert [one.id for one in rollouts.live([whole, some, every])] == ["c"]


def test_only_devices_of_which_the_filter_holds_are_reached_also_when_it_begins_to_hold_later():
    fleet = fleet_of(4)
    fleet["d01"] = msgspec.structs.replace(fleet["d01"], tags={"region": "eu"})
    rollout = Rollout(id="b", plan=msgspec.structs.replace(PLAN, waves=(1.0,), where="tag.region = eu"))
    step = advance(rollout, fleet, 0.0)
    assert step.assign == ["d01"]
    fleet["d02"] = msgspec.structs.replace(fleet["d02"], tags={"region": "eu"})
    assert advance(step.rollout, fleet, 1.0).assign == ["d02"]


def test_a_way_back_names_a_version_above_and_reaches_whoever_runs_the_bad_one():
    with pytest.raises(UsageError, match="no device ever goes back"):
        msgspec.structs.replace(PLAN, back=2)
    rollout, fleet = staged(0)
    plan = msgspec.structs.replace(PLAN, back=3, max_failures=0)
    rollout = msgspec.structs.replace(rollout, plan=plan)
    asked = sorted(rollout.assigned)
    answered(fleet, rollout, asked[1:])
    answered(fleet, rollout, asked[:1], "rolled-back")
    step = advance(rollout, fleet, 1.0)
    assert (step.rollout.status, step.back.version, step.back.where) == ("halted", 3, "version = 2")
    assert advance(step.rollout, fleet, 2.0).back is None, "it is started once"
    way = advance(rollouts.begin("back", step.back, [step.rollout]), fleet, 3.0)
    assert sorted(way.assign) == asked[1:]
    ended = rollouts.abort(step.rollout, "superseded by back")
    assert ended.reason.startswith("superseded by back; it had halted: 1 of 4 reached devices failed")


VERBS = st.sampled_from(
    ["pause", "resume", "retry", "promote", "step", "step", "step", "kill", "answer", "fail", "off", "on"]
)


class Hands:
    """An operator, devices and a server that do what they are told, one thing at a time."""

    def __init__(self, plan, random):
        self.fleet, self.rollout, self.random = fleet_of(12), Rollout(id="cat-v2", plan=plan), random
        self.asked, self.now = [], 0.0

    def do(self, verb):
        self.now += self.random.choice([0.0, 1.0, 50.0])
        if verb in ("pause", "resume", "retry", "promote"):
            with contextlib.suppress(UsageError):
                self.rollout = getattr(rollouts, verb)(self.rollout)
        elif verb == "kill":  # the step was made, and nothing of it was written
            assert advance(self.rollout, self.fleet, self.now) == advance(self.rollout, self.fleet, self.now)
        elif verb == "step":
            self.step()
        elif verb in ("on", "off"):
            self.change(self.random.choice(sorted(self.fleet)), online=verb == "on")
        elif pending := sorted(d for d, s in self.fleet.items() if s.outcome == "pending"):
            fails = verb == "fail"
            outcome = {"outcome": "rolled-back" if fails else "installed", "version": 1 if fails else 2}
            self.change(self.random.choice(pending), **outcome)

    def change(self, name, **fields):
        self.fleet[name] = msgspec.structs.replace(self.fleet[name], **fields)

    def step(self):
        step = advance(self.rollout, self.fleet, self.now)
        self.rollout = msgspec.json.decode(msgspec.json.encode(step.rollout), type=Rollout)
        after = advance(self.rollout, self.fleet, self.now)
        assert after.assign == [], "written, and killed before anybody was asked"
        for name, mine in self.rollout.assigned.items():  # as the service does: from what is written, not from the step
            if mine.outcome != "none":
                before = self.fleet[name]
                self.fleet[name] = expect(before, self.rollout.id, mine.attempt, PLAN.release("pi"))
                if self.fleet[name] != before:
                    self.asked.append((name, mine.attempt))


@settings(max_examples=150, deadline=None)
@given(st.lists(VERBS, max_size=40), st.randoms(use_true_random=False), st.booleans())
def test_whatever_is_done_and_whenever_it_is_killed_each_attempt_is_asked_once(verbs, random, paced):
    hands = Hands(msgspec.structs.replace(PLAN, in_flight=3 if paced else 0, patience=100.0), random)
    for verb in [*verbs, *["step"] * 3]:
        hands.do(verb)
    assert len(hands.asked) == len(set(hands.asked))
    for name, attempt in hands.asked:
        assert attempt == 1 or (name, attempt - 1) in hands.asked
