"""Attacks on the messages, over a real Mosquitto that anybody may write to: nothing changes, and all is counted."""

import json
import os
import signal

import msgspec
import pytest
from fakes.brokers import Mosquitto
from fakes.fleets import FLEET, NOW, PROFILE, Fleet, Serving, eventually

from edgekit.errors import MessageError, TransferError, UsageError
from edgekit.ota import messages, mqtt
from edgekit.ota.channel import Will
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.fetchers import Patience
from edgekit.ota.device.update import Device
from edgekit.ota.messages import Desired, Hello, Installed
from edgekit.ota.server.rollout import Plan
from edgekit.ota.server.service import Service
from edgekit.ota.server.store import Store

QUICK = Habits(first_pause=0.05, longest_pause=0.2, will_delay=0, hurry=True, patience=Patience(seconds=1.0))
GROUP = "canary"


class Town:
    """A fleet's service, a device and an attacker, who may write wherever he likes."""

    def __init__(self, folder, broker):
        self.folder, self.broker = folder, broker
        self.fleet = Fleet(folder / "fleet")
        self.store = Store(folder / "fleet" / "fleet.sqlite", FLEET)
        self.server, self.attacker = (mqtt.connect(broker.url, name) for name in ("server", "attacker"))
        self.service = Service(self.fleet.folder, self.server, self.store, NOW.timestamp).start()
        self.agent = self.channel = None
        self.boot()

    def boot(self):
        self.agent = Agent(FLEET, self.fleet.device(self.folder / "device", Serving()), QUICK, groups=[GROUP])
        self.agent.clock = lambda: NOW
        self.agent.start(self._connect)
        eventually(lambda: "pi-1" in self.store.devices())

    def _connect(self, will):
        self.channel = mqtt.connect(self.broker.url, "pi-1", will=will)
        return self.channel

    def topic(self, leaf, device="pi-1"):
        return messages.topic(FLEET, device, leaf)

    def roll_out(self):
        release = self.fleet.publish(len(self.store.rollouts()) + 1)
        self.store.start(Plan(model="digits", version=release.version, profiles=(PROFILE,), waves=(1.0,)), 0.0)
        eventually(lambda: self.store.devices()["pi-1"].version == release.version)
        return release

    def retained(self, topic):
        watcher, got = mqtt.connect(self.broker.url, "watcher"), []
        watcher.subscribe(topic, got.append)
        found = eventually(lambda: got)[0]
        watcher.close()
        return found.payload

    def stop(self):
        self.agent.stop()
        self.service.stop()
        for channel in (self.server, self.attacker):
            channel.close()
        self.store.close()


@pytest.fixture
def town(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 0.1)
    with Mosquitto(tmp_path) as broker:
        town = Town(tmp_path, broker)
        yield town
        town.stop()


HUGE = 1 << 53
POISON = [
    b"\x00",
    b"\xff\xfe\xfd",
    b"[" * 60_000,
    b"{}" * 40_000,  # longer than a message may be
    b'{"deployment": "../x", "release": "models/digits/raspberry-pi-5/1.json", "version": 1}',
    b'{"deployment": "d", "release": "../../root.json", "version": 1}',
    b'{"deployment": "d", "release": "models/digits/raspberry-pi-5/1.json", "version": -1}',
    b'{"deployment": "d", "release": "models/digits/raspberry-pi-5/1.json", "version": 1, "command": "reboot"}',
    b'{"deployment": "d", "release": "models/digits/raspberry-pi-5/1.json", "version": 1, "spread": 1e12}',
    b'{"type": "hello", "device": "pi-1", "profile": "raspberry-pi-5", "boot": "b", "online": true}',
    json.dumps(
        {"deployment": "d", "release": f"models/digits/{PROFILE}/1.json", "version": 1, "revision": HUGE}
    ).encode(),
]


@pytest.mark.attack("poisoned retained message")
def test_poisoned_retained_messages_on_every_topic_change_nothing_and_are_counted(town):
    town.roll_out()
    before = town.service.counts["dropped"]
    for poison in POISON:
        town.attacker.publish(town.topic("desired"), poison, retain=True)
        town.attacker.publish(messages.group_topic(FLEET, GROUP), poison, retain=True)
        town.attacker.publish(town.topic("report"), poison)
        town.attacker.publish(town.topic("request"), poison, reply_to=town.topic("blocks"), correlation=b"c")
        town.attacker.publish(town.topic("blocks"), poison, correlation=b"c")
    eventually(lambda: town.agent.dropped == 2 * len(POISON))
    eventually(lambda: town.service.counts["dropped"] >= before + 2 * len(POISON) - 1)  # one of them is a hello
    assert town.roll_out().version == 2
    town.agent.stop()
    town.attacker.publish(town.topic("desired"), POISON[0], retain=True)
    town.boot()  # it meets the poison when it comes up
    assert town.roll_out().version == 3


@pytest.mark.attack("replayed desired state")
def test_replayed_desired_state_takes_no_device_back_also_after_a_restart(town):
    town.roll_out()
    old = town.retained(town.topic("desired"))
    town.roll_out()
    new = town.retained(town.topic("desired"))
    assert messages.decode(new, Desired).revision > messages.decode(old, Desired).revision
    dropped = town.agent.dropped
    town.attacker.publish(town.topic("desired"), old, retain=True)
    eventually(lambda: town.agent.dropped == dropped + 1)
    assert town.agent._wanted == messages.decode(new, Desired)
    town.agent.stop()
    town.service.stop()
    town.attacker.publish(town.topic("desired"), old, retain=True)
    town.agent = Agent(FLEET, town.agent._device, QUICK)
    town.agent.clock = lambda: NOW
    town.agent.start(town._connect)
    eventually(lambda: town.agent.dropped == 1)
    assert town.agent._wanted is None


@pytest.mark.attack("replayed desired state")
def test_forged_revision_at_a_device_is_outbid_by_the_server(town):
    release = town.roll_out()
    forged = Desired(deployment="evil", release=release.path, version=1, revision=int(NOW.timestamp() * 1000) + 10**9)
    town.attacker.publish(town.topic("desired"), messages.encode(forged), retain=True)
    eventually(lambda: town.agent._wanted is not None and town.agent._wanted.deployment == "evil")
    assert town.roll_out().version == 2
    assert town.store.devices()["pi-1"].revision > forged.revision


@pytest.mark.attack("device ids")
@pytest.mark.parametrize("name", ["+", "#", "../x", "a/b", "", "pi 1", "-x", "x" * 65, "é"])
def test_device_ids_that_could_change_a_topic_name_no_device(town, name, tmp_path):
    with pytest.raises(UsageError):
        Device(name, PROFILE, tmp_path, Serving())
    if name != "+":  # what the server listens with
        with pytest.raises(MessageError):
            messages.topic(FLEET, name, "hello")
    with pytest.raises(UsageError):
        Agent(FLEET, town.agent._device, groups=[name])
    hello = {"type": "hello", "device": name, "profile": PROFILE, "boot": "b", "online": True}
    levels = "".join(c for c in name if c not in "+#")  # a broker takes no message with those
    before = town.service.counts["dropped"]
    for where in {levels or "_", "pi-1"}:
        town.attacker.publish(f"edgekit/v1/{FLEET}/devices/{where}/hello", msgspec.json.encode(hello))
    eventually(lambda: town.service.counts["dropped"] > before)
    assert set(town.store.devices()) == {"pi-1"}


@pytest.mark.attack("message flood")
def test_message_flood_leaves_memory_bounded_and_the_next_update_comes(town):
    count = 3000
    for number in range(count):
        town.attacker.publish(town.topic("desired"), b"x" * 200)(5.0 if number % 500 == 0 else 0.0)
        if number % 3 == 0:
            town.attacker.publish(town.topic("report"), b"x" * 2000)
    eventually(lambda: town.agent.dropped + town.channel.dropped == count, 60)
    eventually(lambda: town.service.counts["dropped"] + town.server.dropped >= count / 3, 60)
    assert town.channel._inbox.maxsize == town.server._inbox.maxsize == mqtt.QUEUE_LENGTH
    assert town.roll_out().version == 1


@pytest.mark.attack("message flood")
def test_flood_of_questions_while_the_broker_reads_nothing_is_no_growing_memory(tmp_path):
    with Mosquitto(tmp_path) as broker:
        server, block = mqtt.connect(broker.url, "server"), bytes(256 << 10)
        os.kill(broker._process.pid, signal.SIGSTOP)
        sent = []

        def flood():
            while len(sent) < 500:
                server.publish("blocks", block, correlation=b"c")
                sent.append(1)

        with pytest.raises(TransferError, match=r"packets to .* wait already"):
            flood()
        assert len(sent) < mqtt.UNWRITTEN + 40  # and what the sockets of the system hold
        os.kill(broker._process.pid, signal.SIGCONT)
        eventually(lambda: server.publish("reports", b"x")(1.0))
        server.publish("blocks", block, correlation=b"c")
        server.close()


@pytest.mark.attack("endless data")
def test_payload_beyond_the_brokers_limit_reaches_nobody(tmp_path):
    with Mosquitto(tmp_path, ["allow_anonymous true", "max_packet_size 300000"]) as broker:
        attacker, device, got = mqtt.connect(broker.url, "attacker"), mqtt.connect(broker.url, "pi-1"), []
        device.subscribe("desired", lambda arrival: got.append(len(arrival.payload)))
        attacker.publish("desired", bytes(400_000))
        other = mqtt.connect(broker.url, "other")
        assert other.publish("desired", bytes(1000))(10.0)
        eventually(lambda: got == [1000])
        for channel in (attacker, device, other):
            channel.close()


def test_broker_that_lost_all_it_kept_has_wishes_and_hellos_again(town):
    release = town.roll_out()
    town.broker.stop()
    town.broker.start()
    hello = messages.decode(town.retained(town.topic("hello")), Hello)
    assert (hello.online, hello.version) == (True, 1)
    assert messages.decode(town.retained(town.topic("desired")), Desired).release == release.path


def test_will_of_an_earlier_start_that_comes_late_leaves_the_device_online(town):
    first = town.agent._boot
    town.agent.stop()
    town.boot()
    eventually(lambda: town.store.devices()["pi-1"].boot == town.agent._boot)
    gone = Hello(device="pi-1", profile=PROFILE, boot=first, online=False)
    late = mqtt.connect(town.broker.url, "late", will=Will(town.topic("hello"), messages.encode(gone), 0))
    seen = []
    town.attacker.subscribe(town.topic("hello"), lambda arrival: seen.append(messages.decode(arrival.payload, Hello)))
    late._closed = True
    late._client.socket().shutdown(2)
    eventually(lambda: any(not hello.online for hello in seen))
    eventually(lambda: seen[-1].online)  # and it says so itself: for those that know nothing of boots
    assert town.store.devices()["pi-1"].online


def test_reports_delivered_twice_count_once(town):
    town.roll_out()
    state = town.store.devices()["pi-1"]
    told = Installed(device="pi-1", deployment=state.deployment, attempt=1, version=1, bundle=state.bundle)
    for _ in range(20):
        town.attacker.publish(town.topic("report"), messages.encode(told))
    before = town.service.counts["reports"]
    eventually(lambda: town.service.counts["reports"] >= before + 1)
    wish = town.retained(town.topic("desired"))
    calls = len(town.agent._device.serving.calls)
    for _ in range(5):
        town.attacker.publish(town.topic("desired"), wish, retain=True)
    eventually(lambda: len(town.store.reports("pi-1")) >= 2)
    assert town.store.devices()["pi-1"].outcome == "installed"
    assert len(town.agent._device.serving.calls) == calls  # the same wish again is no work
    assert [event.text for event in town.store.events()].count("pi-1 installed") == 1
