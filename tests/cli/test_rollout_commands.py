"""The operator's words for devices and rollouts: tags, filters, two people, ways back, and plans played beforehand."""

import json

import pytest
from click.testing import CliRunner
from fakes.steps import sealed, weights

from edgekit.cli import cli
from edgekit.ota.device import facts
from edgekit.ota.server.fleet import DeviceState
from edgekit.ota.server.rollout import Assignment
from edgekit.ota.server.store import Store


def ota(*arguments, code=0):
    done = CliRunner().invoke(cli, ["ota", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def say(*arguments):
    return json.loads(ota(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    ota("init", folder / "fleet", "--name", "home")
    for version in (1, 2):
        ota("publish", folder / "fleet", sealed(folder / str(version), weights(version)).folder, "--deltas", 0)
    ota("publish", folder / "fleet", folder / "1", "--deltas", 0)
    return folder / "fleet"


@pytest.fixture
def fleet(published, tmp_path):
    import shutil

    folder = tmp_path / "fleet"
    shutil.copytree(published, folder)
    with_devices(folder, *(DeviceState(id=f"pi-{i}", profile="raspberry-pi-5", online=True) for i in range(4)))
    return folder


def with_devices(fleet, *states):
    store = Store(fleet / "fleet.sqlite")
    store.save_devices(states)
    store.close()


def test_tags_are_given_changed_taken_and_listed_by_filter(fleet):
    assert (
        "pi-1: region=eu, shop=12" in ota("devices", "tag", fleet, "pi-1", "region=us", "shop=12", "region=eu").output
    )
    assert say("devices", "tag", fleet, "pi-2", "region=us")["tags"] == {"region": "us"}
    assert [d["id"] for d in say("devices", "list", fleet, "--where", "tag.region = eu")["devices"]] == ["pi-1"]
    assert "region=us" in ota("devices", "list", fleet).output
    ota("group", "add", fleet, "lab", "pi-3")
    assert [d["id"] for d in say("devices", "list", fleet, "--where", "not group = lab")["devices"]] == [
        "pi-0", "pi-1", "pi-2",
    ]  # fmt: skip
    assert say("devices", "untag", fleet, "pi-1", "region", "unknown")["tags"] == {"shop": "12"}
    shown = say("devices", "show", fleet, "pi-1")
    assert shown["device"]["tags"] == {"shop": "12"}
    assert shown["events"][-1]["text"] == "tags: shop=12"
    assert "did you mean pi-1" in ota("devices", "show", fleet, "pi-11", code=2).output


@pytest.mark.parametrize("bad", ["region", "region=", "=eu", "a b=c", "region=e\x1bu", "k=" + "x" * 101])
def test_what_is_no_tag_is_refused(fleet, bad):
    assert "hint" in ota("devices", "tag", fleet, "pi-1", bad, code=2).output
    assert say("devices", "list", fleet)["devices"][1]["tags"] == {}


def test_a_plan_with_everything_is_kept_as_it_was_told(fleet):
    words = (
        "--waves 1,2,50%,1 --alpha 5% --detect latency=20% --rate 10 --growth 2 --in-flight 5 --patience 600 "
        "--window 22:00-05:00 --zone Europe/Berlin --penalty 3 --roll-back 3 --by ann"
    )
    rollout = say("rollout", "start", fleet, "digits", 2, *words.split(), "--where", "class = raspberry-pi-5")[
        "rollout"
    ]
    plan = rollout["plan"]
    assert (plan["waves"], plan["max_failures"], plan["back"], rollout["started_by"]) == (
        [1, 2, 0.5, 1.0],
        1.0,
        3,
        "ann",
    )
    assert (plan["judging"]["latency"], plan["judging"]["alpha"]) == (0.2, 0.05)
    assert plan["window"]["zone"] == "Europe/Berlin"
    assert plan["strata"] == ["tag.region", "fact.runtime"]


def test_what_a_canary_can_find_is_said_before_it_begins(fleet):
    told = ota("rollout", "start", fleet, "digits", 2, "--alpha", "5%").output
    assert "a canary of 1 devices finds a rise of failures by 5.0% of devices with a probability of 0%" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--where", "clas = x"), "character 1"),
        (("--where", "class ="), "a value is expected"),
        (("--stratify", "colour"), "no field 'colour'"),
        (("--detect", "latency=15%"), "--detect without --alpha"),
        (("--alpha", "5%", "--detect", "speed=1%"), "nothing that is judged"),
        (("--alpha", "0"), "out of bounds"),
        (("--window", "late"), "is no window"),
        (("--window", "22:00-05:00", "--zone", "Mars"), "no time zone"),
        (("--roll-back", "1"), "is not above 2"),
        (("--roll-back", "9"), "known: 1, 2, 3"),
        (("--growth", "0.5"), "are no pace"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(fleet, options, told):
    assert told in ota("rollout", "start", fleet, "digits", 2, *options, code=2).output
    assert say("rollout", "list", fleet)["rollouts"] == []


def test_a_way_back_to_the_very_same_bundle_is_refused(fleet):
    assert (
        "is the very bundle of version 1"
        in ota("rollout", "start", fleet, "digits", 1, "--roll-back", 3, code=2).output
    )


def test_where_two_are_required_somebody_else_approves_and_only_then_the_running_one_ends(fleet):
    ota("rollout", "start", fleet, "digits", 1)
    ota("rollout", "require-approval", fleet, "two")
    told = ota("rollout", "start", fleet, "digits", 2, "--by", "ann")
    assert "waits for approval" in told.output
    status = lambda: [r["status"] for r in say("rollout", "list", fleet)["rollouts"]]  # noqa: E731  # short
    assert status() == ["running", "proposed"]
    assert "somebody else" in ota("rollout", "approve", fleet, "digits-v2", "--by", "ann", code=2).output
    assert status() == ["running", "proposed"]
    ota("rollout", "approve", fleet, "digits-v2", "--by", "ben")
    ota("rollout", "approve", fleet, "digits-v2", "--by", "ben")
    assert status() == ["aborted", "running"]
    assert say("rollout", "show", fleet, "digits-v2")["rollout"]["approved_by"] == "ben"
    ota("rollout", "require-approval", fleet, "one")
    ota("rollout", "abort", fleet, "digits-v2")
    assert say("rollout", "start", fleet, "digits", 2)["rollout"]["status"] == "running"


def test_rollouts_are_promoted_retried_and_taken_back_by_hand(fleet):
    ota("rollout", "start", fleet, "digits", 2, "--waves", "25%,50%,100%")
    assert say("rollout", "promote", fleet, "digits-v2", 2)["rollout"]["wave"] == 1
    assert say("rollout", "promote", fleet, "digits-v2", 2)["rollout"]["wave"] == 1
    assert "has no wave 4" in ota("rollout", "promote", fleet, "digits-v2", 4, code=2).output
    assert say("rollout", "retry-failed", fleet, "digits-v2")["rollout"]["status"] == "running"
    back = say("rollout", "roll-back", fleet, "digits-v2", 3)["rollout"]
    assert (back["plan"]["version"], back["plan"]["where"]) == (3, "version = 2")
    assert [r["status"] for r in say("rollout", "list", fleet)["rollouts"]] == ["aborted", "running"]
    assert "is not above" in ota("rollout", "roll-back", fleet, "digits-v2", 1, code=2).output


def test_a_device_in_the_penalty_box_is_named_and_let_out(fleet):
    failed = {"pi-1": Assignment(wave=0, profile="raspberry-pi-5", outcome="refused")}
    store = Store(fleet / "fleet.sqlite")
    from edgekit.ota.server.plan import Plan
    from edgekit.ota.server.rollout import Rollout

    plan = Plan(model="digits", version=1, profiles=("raspberry-pi-5",))
    store.start(plan, 1.0, lambda new: Rollout(id=new.id, plan=plan, status="done", assigned=failed))
    store.close()
    told = ota("rollout", "start", fleet, "digits", 2, "--penalty", 1)
    assert "1 devices sit out, they failed again and again: pi-1" in told.output
    ota("devices", "release", fleet, "pi-1")
    assert say("rollout", "show", fleet, "digits-v2")["rollout"]["boxed"] == []
    ota("rollout", "abort", fleet, "digits-v2")
    assert say("rollout", "start", fleet, "digits", 2, "--penalty", 1)["rollout"]["boxed"] == []


PLAN = """
hours = 24
[plan]
waves = ["5%", "100%"]
dwell = 1800
[plan.judging]
alpha = 0.05
[fleet]
devices = 300
[[faults]]
where = "class = jetson-orin"
failures = 0.9
"""


def test_a_plan_is_played_beforehand_and_tells_what_would_have_happened(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    told = ota("simulate", plan).output
    assert told.startswith("halted after 0.")
    assert "jetson-orin devices failed" in told
    assert "| class " in told
    (story,) = say("simulate", plan, "--seed", 3, "--devices", 200)["stories"]
    assert (story["halted_by"], story["wave"], story["devices"]) == ("failures", 1, 200)
    assert (story,) == tuple(say("simulate", plan, "--seed", 3, "--devices", 200)["stories"])
    assert "3 of 3 halted" in ota("simulate", plan, "--seeds", 3).output


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plan = ", "is no scenario"),
        ("[plan]\nwaves = [3]", "are no plan"),
        ("[fleet]\ncolour = 1", "unknown field `colour`"),
        ("[fleet]\ndevices = 0", "devices"),
        ("[fleet]\nclasses = {}", "are no weights"),
        ('[fleet]\nzones = {eu = "Mars"}', "no time zone"),
        ('[[faults]]\nwhere = "clas = x"', "character 1"),
        ('[plan.window]\nbegin = "25:00"\nend = "26:00"', "is no scenario"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(tmp_path, text, told):
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    assert told in ota("simulate", plan, code=2).output


def test_a_device_says_its_facts_within_bounds(tmp_path):
    link = tmp_path / "localtime"
    link.symlink_to("/usr/share/zoneinfo/Europe/Berlin")
    found = facts.gather(link)
    assert found["timezone"] == "Europe/Berlin"
    assert {"runtime", "python", "machine", "os", "utc_offset"} <= found.keys()
    assert all(len(value) <= 200 for value in found.values())
    assert "timezone" not in facts.gather(tmp_path / "none")
    assert [facts._offset(s) for s in (0, 19_800, -12_600)] == ["+00:00", "+05:30", "-03:30"]
