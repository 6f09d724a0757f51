"""The fleet's service over a broker in the process, with devices that follow a script."""

import time
from datetime import UTC, datetime

import pytest

from edgekit.errors import ResourceError, TransferError
from edgekit.ota import messages
from edgekit.ota.channel import Back
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import (
    Alert,
    Block,
    BlockRequest,
    Chosen,
    Desired,
    Drift,
    Failed,
    Health,
    Hello,
    Installed,
    Refused,
    RolledBack,
)
from edgekit.ota.server import metadata, publisher, roots
from edgekit.ota.server.keys import Custody, Unlock
from edgekit.ota.server.rollout import Plan, abort
from edgekit.ota.server.service import BATCH, Service
from edgekit.ota.server.store import Store

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
PLAN = Plan(model="cat", version=2, profiles=("pi",), waves=(0.3, 1.0))


class Device:
    """Says hello, and answers what it is asked by its script."""

    def __init__(self, broker, name, script=Installed, boot="b1"):
        self.name, self.script = name, script
        self.desired, self.blocks = [], []
        self.channel = broker.connect(name)
        self.channel.subscribe(self.topic("desired"), self.on_desired)
        self.channel.subscribe(self.topic("blocks"), lambda a: self.blocks.append(messages.decode_block(a.payload)))
        self.hello(boot=boot)

    def topic(self, leaf):
        return messages.topic("home", self.name, leaf)

    def hello(self, boot="b1", version=1, online=True):
        head = {"device": self.name, "profile": "pi", "boot": boot, "online": online}
        self.say("hello", Hello(**head, release=f"models/cat/pi/{version}.json", version=version), retain=True)

    def say(self, leaf, message, *, retain=False):
        self.channel.publish(self.topic(leaf), messages.encode(message), retain=retain)

    def on_desired(self, arrival):
        if not arrival.payload:
            self.desired.append(None)
            return
        wish = messages.decode(arrival.payload, Desired)
        self.desired.append(wish)
        head = {"device": self.name, "deployment": wish.deployment, "attempt": wish.attempt, "version": wish.version}
        if self.script is Installed:
            self.say("report", Installed(**head, bundle="b" * 64))
        elif self.script is RolledBack:
            self.say("report", RolledBack(**head, reason="p95 90 ms, limit 20"))


class World:
    def __init__(self, folder, place):
        self.folder, self.broker, self.now = folder, MemoryBroker(), NOW.timestamp()
        publisher.init(folder, NOW)
        self.store = Store(place, "home")
        self.devices, self.service = {}, self.new_service()

    def new_service(self):
        service = Service(self.folder, self.broker.connect("server"), self.store, lambda: self.now)
        service.subscribe()
        return service

    def add(self, *names, **settings):
        for name in names:
            self.devices[name] = Device(self.broker, name, **settings)
        self.settle()

    def settle(self):
        quiet = 0
        while quiet < 4:  # nothing came and nothing changed, four times in a row
            before = (self.service.counts.total(), self.store.rollouts())
            self.now += 1
            self.service.step(0.04)
            quiet = quiet + 1 if before == (self.service.counts.total(), self.store.rollouts()) else 0

    def fleet(self):
        return self.store.devices()


@pytest.fixture
def world(tmp_path, place, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 0.0)
    world = World(tmp_path / "fleet", place)
    yield world
    world.service.stop()
    world.store.close()


def test_a_rollout_reaches_everybody_and_the_diary_tells_how(world):
    world.add("pi-1", "pi-2", "pi-3")
    rollout = world.store.start(PLAN, world.now)
    world.settle()
    assert world.store.rollout(rollout.id).status == "done"
    assert {s.outcome for s in world.fleet().values()} == {"installed"}
    diary = [e.text for e in world.store.events(rollout.id)]
    assert diary[0] == "started, waves 30%,100%"
    assert diary[1].startswith("wave 1 of 2 reaches pi-")
    assert diary[-1] == "done: 3 installed"
    assert [w.version for d in world.devices.values() for w in d.desired if w] == [2, 2, 2]


def test_a_bad_release_halts_in_its_canary_and_its_wish_is_withdrawn(world):
    world.add("pi-1", "pi-2", "pi-3", script=RolledBack)
    rollout = world.store.start(PLAN, world.now)
    world.settle()
    halted = world.store.rollout(rollout.id)
    assert halted.status == "halted"
    assert halted.reason == "1 of 1 reached devices failed (1 rolled-back), limit 0, in wave 1"
    (victim,) = halted.assigned
    assert world.devices[victim].desired[-1] is None
    assert world.fleet()[victim].reason == "p95 90 ms, limit 20"
    assert world.broker.retained("edgekit/v1/home/devices/+/desired") == []


def test_after_a_halt_the_canary_is_told_to_run_what_the_fleet_runs(world):
    world.add("pi-1", "pi-2")
    world.store.start(PLAN, world.now)
    world.settle()
    for device in world.devices.values():
        device.script = RolledBack
    world.store.start(Plan(model="cat", version=3, profiles=("pi",), waves=(0.3, 1.0)), world.now)
    world.settle()
    assert world.store.rollout("cat-v3").status == "halted"
    assert {d.desired[-1].deployment for d in world.devices.values()} == {"cat-v2"}


def test_a_service_killed_after_every_step_goes_on_without_skipping_or_repeating_anybody(world):
    world.add("pi-1", "pi-2", "pi-3", "pi-4")
    rollout = world.store.start(PLAN, world.now)
    for steps in (1, 1, 2, 1, 3, 1, 2, 3, 1, 2, 3, 4):
        world.service = world.new_service()  # the old one is simply never asked again
        for _ in range(steps):
            world.service.step(0.05)
    assert world.store.rollout(rollout.id).status == "done"
    assert {a.attempt for a in world.store.rollout(rollout.id).assigned.values()} == {1}
    said = {d.name: {(w.deployment, w.attempt) for w in d.desired if w} for d in world.devices.values()}
    assert said == {name: {("cat-v2", 1)} for name in world.devices}


def test_a_new_service_says_again_what_everybody_should_run(world):
    world.add("pi-1", "pi-2", "pi-3")
    world.store.start(PLAN, world.now)
    world.settle()
    fresh = MemoryBroker()  # a broker that lost all it had retained
    world.broker, world.devices = fresh, {}
    world.service = world.new_service()
    world.settle()
    assert len(fresh.retained("edgekit/v1/home/devices/+/desired")) == 3


def test_a_device_that_starts_anew_is_told_again_and_one_that_repeats_itself_is_not(world):
    world.add("pi-1")
    world.store.start(PLAN, world.now)
    world.settle()
    device = world.devices["pi-1"]
    count = len(device.desired)
    device.hello(version=2)
    world.settle()
    assert len(device.desired) == count
    device.hello(version=2, boot="b2")
    world.settle()
    assert len(device.desired) == count + 1


def test_a_latecomer_gets_what_the_fleet_runs(world):
    world.add("pi-1")
    world.store.start(PLAN, world.now)
    world.settle()
    world.add("pi-9")
    assert world.devices["pi-9"].desired[-1].version == 2
    assert world.fleet()["pi-9"].outcome == "installed"


def test_what_an_operator_changes_in_the_store_is_picked_up(world):
    world.add("pi-1", "pi-2", "pi-3", script=None)
    rollout = world.store.start(PLAN, world.now)
    world.settle()
    (reached,) = world.store.rollout(rollout.id).assigned
    world.store.change(rollout.id, abort, world.now)
    world.settle()
    assert world.devices[reached].desired[-1] is None
    assert len(world.store.rollout(rollout.id).assigned) == 1


def test_a_report_in_another_devices_name_is_dropped_and_counted(world):
    world.add("pi-1", "pi-2", script=None)
    liar = world.devices["pi-1"]
    liar.say("hello", Hello(device="pi-2", profile="pi", boot="x", online=False))
    for payload in (b"", b"no json", b'{"type":"hello"}', b"[" * 70_000):
        liar.channel.publish(liar.topic("report"), payload)
    world.settle()
    assert world.fleet()["pi-2"].online
    assert world.service.counts["dropped"] == 4
    assert set(world.fleet()) == {"pi-1", "pi-2"}


def test_blocks_are_answered_to_the_device_that_asks_and_nowhere_else(world):
    world.add("pi-1", "pi-2", script=None)
    device = world.devices["pi-1"]
    request = messages.encode(BlockRequest(path="metadata/1.root.json", offset=0, length=1000))
    for reply_to in (device.topic("blocks"), world.devices["pi-2"].topic("desired"), ""):
        device.channel.publish(device.topic("request"), request, reply_to=reply_to, correlation=b"c")
    device.channel.publish(device.topic("request"), b"{}", reply_to=device.topic("blocks"))
    world.settle()
    time.sleep(0.1)
    root = publisher.root(world.folder)
    assert device.blocks == [Block(total=len(root), data=root[:1000])]
    assert world.devices["pi-2"].desired == [None]
    assert (world.service.counts["blocks"], world.service.counts["dropped"]) == (1, 3)


def test_reports_that_the_disk_refused_are_kept_and_written_later(world, monkeypatch):
    world.add("pi-1", script=None)
    world.store.start(PLAN, world.now)
    world.settle()
    head = {"device": "pi-1", "deployment": "cat-v2", "attempt": 1, "version": 2}
    world.devices["pi-1"].say("report", Installed(**head, bundle="b" * 64))

    def full(states):
        raise ResourceError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "save_devices", full)
        for _ in range(3):
            with pytest.raises(ResourceError):
                world.service.step(0.1)
    assert world.fleet()["pi-1"].outcome == "pending"
    world.settle()
    assert world.fleet()["pi-1"].outcome == "installed"


@pytest.mark.attack("message flood")
def test_a_flood_is_taken_in_batches_and_loses_nothing(world):
    world.add("pi-1", script=None)
    device = world.devices["pi-1"]
    before = world.service.counts["reports"]
    for number in range(BATCH + 50):
        device.say("report", Installed(device="pi-1", deployment="x", attempt=number, version=1, bundle=""))
    deadline = time.monotonic() + 10
    while world.service.counts["reports"] - before < BATCH + 50 and time.monotonic() < deadline:
        world.service.step(0.02)
    assert len(world.store.reports("pi-1")) == BATCH + 50


def test_running_in_its_thread_it_survives_what_fails_and_signs_the_timestamp_anew(world, monkeypatch):
    world.now += 3 * 86_400
    signed = metadata.place(world.folder, "timestamp").read_bytes()
    calls = []
    honest = world.store.rollouts

    def flaky():
        calls.append(1)
        if len(calls) == 1:
            raise ResourceError("not now")
        return honest()

    monkeypatch.setattr(world.store, "rollouts", flaky)
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 0.02)
    world.service.start()
    deadline = time.monotonic() + 10
    while len(calls) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    world.service.stop()
    assert world.service.counts["failed steps"] == 1
    assert metadata.place(world.folder, "timestamp").read_bytes() != signed


def test_a_missing_key_does_not_stop_the_service(world, caplog):
    for key in (world.folder / "keys").iterdir():
        key.unlink()
    world.service._refresh()
    assert "cannot sign" in caplog.text


def test_a_key_that_is_offline_is_asked_for_before_it_is_too_late(world, caplog):
    world.now += 340 * 86_400
    (world.folder / "keys" / "targets.pem").rename(world.folder / "targets.pem")
    signed = metadata.read(world.folder, "timestamp").signed.version
    world.service._refresh()
    assert "targets expires in" in caplog.text
    assert "edgekit ota refresh FLEET targets" in caplog.text
    assert metadata.read(world.folder, "timestamp").signed.version == signed + 1


def test_a_locked_key_signs_for_a_service_that_was_given_its_passphrase(world, caplog):
    unlock = Unlock(ask=lambda _: "correct horse battery")
    (world.folder / "keys" / "timestamp.pem").unlink()
    custody = Custody(world.folder, unlock)
    key = custody.make("locked", world.folder / "keys", encrypted=True)
    custody.save()
    roots.rotate(custody, ["timestamp"], NOW, uri=custody.ring.keys[key.keyid])
    world.service._refresh()
    assert "is locked" in caplog.text
    signed = metadata.read(world.folder, "timestamp").signed.version
    Service(world.folder, world.service.channel, world.store, lambda: world.now, unlock=unlock)._refresh()
    assert metadata.read(world.folder, "timestamp").signed.version == signed + 1


def test_one_fleet_has_one_server_and_a_stopped_one_makes_room(world):
    world.service.start()
    second = world.new_service()
    with pytest.raises(ResourceError, match="another server serves"):
        second.start()
    world.service.stop()
    second.start().stop()


def test_health_is_shown_and_not_kept(world):
    world.add("pi-1", script=None)
    for requests in (5, 7):
        health = Health(device="pi-1", bundle="", requests=requests, errors=1, p95_ms=2.5)
        world.devices["pi-1"].say("report", health)
    world.settle()
    state = world.fleet()["pi-1"]
    assert (state.requests, state.errors, state.p95_ms) == (7, 1, 2.5)
    assert world.store.reports("pi-1") == []


def drift_of(*kinds):
    alerts = tuple(Alert(kind=kind, what="image: spread", value=0.6, limit=0.2, since=1.0) for kind in kinds)
    return Drift(device="pi-1", bundle="", alerts=alerts)


def test_alerts_are_shown_and_the_diary_tells_when_they_came_and_went(world):
    world.add("pi-1", script=None)
    for kinds in (("input-drift",), ("input-drift",), ("confidence", "input-drift"), ("confidence",)):
        world.devices["pi-1"].say("report", drift_of(*kinds))
        world.settle()
    assert [alert.kind for alert in world.fleet()["pi-1"].alerts] == ["confidence"]
    assert [event.text for event in world.store.events("pi-1")] == [
        "input-drift: image: spread is 0.6, limit 0.2",
        "confidence: image: spread is 0.6, limit 0.2",
        "input-drift: image: spread has passed",
    ]
    assert world.store.reports("pi-1") == []


def test_the_diary_tells_once_which_variant_a_device_runs_and_why_not_the_better_one(world):
    world.add("pi-1", script=None)
    before = world.fleet()["pi-1"]
    word = Chosen(device="pi-1", bundle="a" * 64, variant="pi.fp32", left={"pi": "it needs onnxruntime >=9"})
    for _ in range(3):  # each restart says it again
        world.devices["pi-1"].say("report", word)
        world.settle()
    told = "pi-1 runs the variant pi.fp32; not pi: it needs onnxruntime >=9"
    assert [event.text for event in world.store.events("pi-1")] == [told]
    assert (world.fleet()["pi-1"].outcome, world.fleet()["pi-1"].alerts) == (before.outcome, before.alerts)


def test_a_rollout_goes_on_whatever_a_device_says_of_its_inputs(world):
    world.add(*(f"pi-{n}" for n in range(1, 5)))
    world.store.start(PLAN, world.now)
    for _ in range(3):
        world.devices["pi-1"].say("report", drift_of("input-drift", "class-mix"))
        world.settle()
    assert [rollout.status for rollout in world.store.rollouts()] == ["done"]


@pytest.mark.attack("nested message")
def test_a_report_that_nests_without_end_is_dropped_and_the_next_one_counts(world):
    deep = b"[" * 20_000 + b"]" * 20_000
    evil = world.broker.connect("evil")
    evil.publish(messages.topic("home", "evil", "hello"), b'{"x":' + deep + b',"type":"hello"}', retain=True)
    world.add("good")
    assert list(world.fleet()) == ["good"]
    assert world.service.counts["dropped"] == 1


def test_a_server_that_knows_no_drift_drops_it_and_takes_what_else_the_device_says(world, monkeypatch):
    before = Hello | Installed | RolledBack | Refused | Failed | Health
    monkeypatch.setattr("edgekit.ota.server.service.Report", before)
    world.add("pi-1", script=None)
    world.devices["pi-1"].say("report", drift_of("input-drift"))
    world.devices["pi-1"].say("report", Health(device="pi-1", bundle="", requests=7, errors=1, p95_ms=2.5))
    world.settle()
    assert world.service.counts["dropped"] == 1
    assert world.fleet()["pi-1"].requests == 7


@pytest.mark.attack("message flood")
def test_what_comes_faster_than_it_can_be_taken_is_dropped_and_counted(world, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.inbox.MAX_COUNT", 3)
    world.service = world.new_service()
    device = Device(world.broker, "pi-1", script=None)
    for _ in range(5):
        device.hello()
    time.sleep(0.2)
    world.settle()
    assert (world.service.counts["reports"], world.service.counts["dropped"]) == (3, 3)


def test_block_requests_alone_do_not_make_the_service_look_at_every_device(world, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 60.0)
    world.add("pi-1", script=None)
    looks = []
    monkeypatch.setattr(world.service, "_look", lambda: looks.append(1))
    device = world.devices["pi-1"]
    request = messages.encode(BlockRequest(path="metadata/1.root.json", offset=0, length=10))
    for _ in range(20):
        device.channel.publish(device.topic("request"), request, reply_to=device.topic("blocks"), correlation=b"c")
    world.settle()
    assert world.service.counts["blocks"] == 20
    assert looks == []


def test_a_broker_that_forgot_everything_is_told_all_wishes_again(world):
    world.add("pi-1", "pi-2")
    world.store.start(PLAN, world.now)
    world.settle()
    told = {name: len(device.desired) for name, device in world.devices.items()}
    world.service._on_back(Back(0.0, is_remembered=True))
    world.settle()
    assert told == {name: len(device.desired) for name, device in world.devices.items()}
    world.service._on_back(Back(0.0, is_remembered=False))
    world.settle()
    assert told == {name: len(device.desired) - 1 for name, device in world.devices.items()}
    assert world.devices["pi-1"].desired[-1] == world.devices["pi-1"].desired[-2]


def test_wishes_that_a_full_queue_refused_go_with_the_next_step(world, monkeypatch):
    world.add("pi-1", "pi-2", "pi-3", script=None)
    world.service._published.clear()
    publish, left = world.service.channel.publish, [2]

    def full(topic, payload, **options):
        if topic.endswith("desired") and not left:
            raise TransferError("1000 messages wait already")
        left.clear() if topic.endswith("pi-2/desired") else None
        return publish(topic, payload, **options)

    monkeypatch.setattr(world.service.channel, "publish", full)
    world.service.step()
    assert len(world.service._published) == 2
    left.append(1)
    world.service.step()
    assert len(world.service._published) == 3


def test_same_report_over_and_over_counts_once(world):
    world.add("pi-1", script=None)
    world.store.start(PLAN, world.now)
    world.settle()
    wish = world.devices["pi-1"].desired[-1]
    head = {"device": "pi-1", "deployment": wish.deployment, "attempt": wish.attempt, "version": wish.version}
    for _ in range(50):
        world.devices["pi-1"].say("report", RolledBack(**head, reason="p95 90 ms, limit 20"))
    world.settle()
    assert len(world.store.reports("pi-1")) == 1
    assert [event.text for event in world.store.events()].count("pi-1 rolled-back: p95 90 ms, limit 20") == 1
    assert world.store.rollouts()[0].count("rolled-back") == 1


def test_flood_of_one_device_leaves_room_for_the_others_and_a_bounded_disk(world, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.inbox.MAX_OF_ONE", 20)
    monkeypatch.setattr("edgekit.ota.server.store.REMEMBERED_REPORTS", 10)
    world.add("pi-1", "rogue", script=None)
    world.store.start(PLAN, world.now)
    world.settle()
    for number in range(300):
        head = {"device": "rogue", "deployment": f"d{number}", "attempt": 1, "version": 2}
        world.devices["rogue"].say("report", Failed(**head, reason="x" * 2000))
        world.devices["rogue"].channel.publish(world.devices["rogue"].topic("report"), bytes(65 << 10))
    world.devices["pi-1"].say("report", Health(device="pi-1", bundle="", requests=7, errors=0, p95_ms=2.0))
    world.settle()
    assert world.fleet()["pi-1"].requests == 7
    assert world.service.counts["dropped"] >= 580 - 20
    assert 0 < len(world.store.reports("rogue")) <= 10


def test_diary_keeps_its_last_lines_only(world, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.store.REMEMBERED_EVENTS", 5)
    for number in range(20):
        world.store.note("pi-1", f"line {number}", world.now)
    assert [event.text for event in world.store.events(limit=100)] == [f"line {n}" for n in range(15, 20)]
