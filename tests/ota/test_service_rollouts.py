"""The service with filters, tags and ways back: what is decided together is written together."""

import msgspec
import pytest
from test_service import PLAN, Device, World

from edgekit.ota.messages import Health, Hello, Installed, RolledBack
from edgekit.ota.server.judging import Judging
from edgekit.ota.server.rollout import Plan, propose


@pytest.fixture
def world(tmp_path, place, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 0.0)
    world = World(tmp_path / "fleet", place)
    yield world
    world.service.stop()
    world.store.close()


def tag(world, device, text):
    world.store.change_setting(f"tags/{device}", lambda _: text)


def test_a_device_that_is_tagged_while_the_server_runs_is_reached_and_one_that_claims_a_group_is_not(world):
    world.add("pi-1", "pi-2", "pi-3")
    tag(world, "pi-1", '{"region":"eu"}')
    liar = world.devices["pi-3"]
    head = {
        "device": "pi-3",
        "profile": "pi",
        "boot": "b1",
        "online": True,
        "release": "models/cat/pi/1.json",
        "version": 1,
    }
    liar.say("hello", Hello(**head, groups={"beta": 1}, facts={"region": "eu"}), retain=True)
    plan = msgspec.structs.replace(PLAN, waves=(1.0,), where="tag.region = eu or group = beta")
    rollout = world.store.start(plan, world.now)
    world.settle()
    assert sorted(world.store.rollout(rollout.id).assigned) == ["pi-1"]
    assert world.store.rollout(rollout.id).status == "done"
    tag(world, "pi-2", '{"region":"eu"}')
    world.settle()
    assert world.fleet()["pi-2"].version == 2
    assert world.fleet()["pi-3"].version == 1
    assert world.fleet()["pi-3"].facts == {"region": "eu"}


def test_the_halt_and_its_way_back_are_written_together_or_not_at_all(world, monkeypatch):
    world.add("pi-1", "pi-2")
    world.add("pi-3", script=RolledBack)
    name = world.store.start(msgspec.structs.replace(PLAN, waves=(1.0,), back=3), world.now).id
    start, tried = world.store.start, []

    def killed(*arguments):
        tried.append(arguments)
        if len(tried) == 1:
            raise RuntimeError("killed between the halt and the way back")
        return start(*arguments)

    monkeypatch.setattr(world.store, "start", killed)
    with pytest.raises(RuntimeError):
        world.settle()
    assert [r.status for r in world.store.rollouts()] == ["running"]
    world.settle()
    old, back = world.store.rollouts()
    assert (old.id, old.status, old.halted_by) == (name, "aborted", "limit")
    assert (back.plan.version, back.status, sorted(back.assigned)) == (3, "done", ["pi-1", "pi-2"])
    assert [d.desired[-1].version for d in world.devices.values() if d.script is Installed] == [3, 3]
    assert sum("takes the reached devices to version 3" in event.text for event in world.store.events(name)) == 1


def test_a_way_back_that_cannot_be_gone_is_told_and_the_halt_stands(world):
    world.add("pi-9")
    world.devices["pi-9"].hello(version=7)
    world.add("pi-1", script=RolledBack)
    world.settle()
    for device, state in world.fleet().items():
        assert state.version == {"pi-9": 7, "pi-1": 1}[device]
    plan = msgspec.structs.replace(PLAN, waves=(1.0,), where="id = pi-1", back=3)
    with pytest.raises(Exception, match="run a newer cat"):
        world.store.start(plan, world.now)
    world.devices["pi-9"].hello(version=1)
    world.settle()
    name = world.store.start(plan, world.now).id
    world.devices["pi-9"].hello(version=7)
    world.settle()
    assert world.store.rollout(name).status == "halted"
    assert any("were not taken back" in event.text for event in world.store.events(name))


def test_a_proposed_rollout_tells_nobody_and_ends_nothing(world):
    world.add("pi-1")
    first = world.store.start(PLAN, world.now)
    second = world.store.start(msgspec.structs.replace(PLAN, version=3), world.now, lambda new: propose(new, "ann"))
    world.settle()
    assert [world.store.rollout(r.id).status for r in (first, second)] == ["done", "proposed"]
    assert world.devices["pi-1"].desired[-1].version == 2


def test_a_slow_release_is_halted_from_the_health_that_real_messages_bring(world):
    names = [f"pi-{i:02}" for i in range(40)]
    world.add(*names)
    for number in range(1, 6):
        for name in names:
            health(world, name, "a" * 64, 10.0, number)
    judging = Judging(reports=2, tests=("latency",))
    plan = Plan(
        model="cat", version=2, profiles=("pi",), waves=(0.5, 1.0), dwell=1e6, max_failures=1.0, judging=judging
    )
    name = world.store.start(plan, world.now).id
    world.settle()
    asked = world.store.rollout(name).assigned
    assert len(asked) == 20
    for number in range(6, 9):
        for device in asked:
            health(world, device, "b" * 64, 14.0, number)
    world.settle()
    halted = world.store.rollout(name)
    assert (halted.status, halted.halted_by) == ("halted", "latency")
    assert "20 of 20 pi devices are slower than before by a median of +40.0% of the p95" in halted.reason


def health(world, name, bundle, p95, number):
    message = Health(device=name, bundle=bundle, requests=50, errors=0, p95_ms=p95, boot="b1", number=number)
    world.devices[name].say("report", message)
    world.settle() if name.endswith("00") else None


def test_a_device_of_before_says_no_facts_and_is_served_all_the_same(world):
    world.devices["pi-1"] = Device(world.broker, "pi-1")
    world.settle()
    assert world.fleet()["pi-1"].facts == {}
    world.store.start(PLAN, world.now)
    world.settle()
    assert world.fleet()["pi-1"].version == 2
