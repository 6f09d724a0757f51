"""Attacks by messages, in memory and over a real Mosquitto: what a broker, or anybody who may write to it, can send."""

import json

import msgspec
import pytest
from fakes.brokers import running
from fakes.fleets import FLEET, NOW, eventually, wish
from fakes.simulator import victim

from edgekit.ota import messages
from edgekit.ota.device import slots
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.fetchers import Patience
from edgekit.ota.messages import Block, BlockRequest, Failed, Installed, Refused, Report

HABITS = Habits(
    health_seconds=60, first_pause=0.05, longest_pause=0.1, will_delay=0, patience=Patience(seconds=0.3, attempts=2)
)


class Scene:
    """A device with a model, its broker, and a server that answers as the test says."""

    def __init__(self, folder, connect):
        self.victim = victim(folder)
        self.connect = connect
        self.server = connect("server")
        self.said = []
        self.asked = 0
        self.answer = self.honest
        self.agent = None
        self.server.subscribe(self.topic("report"), self._hear)
        self.server.subscribe(self.topic("request"), self._answer)

    def topic(self, leaf):
        return messages.topic(FLEET, "pi-1", leaf)

    def _hear(self, arrival):
        self.said.append(messages.decode(arrival.payload, Report))

    def _answer(self, arrival):
        self.asked += 1
        block = self.answer(messages.decode(arrival.payload, BlockRequest))
        if block is not None:
            payload = messages.encode_block(block)
            self.server.publish(arrival.reply_to, payload, correlation=arrival.correlation)

    def honest(self, request):
        whole = self.victim.simulator.files.get(request.path)
        if whole is None:
            return Block(error="not found")
        return Block(total=len(whole), data=whole[request.offset : request.offset + request.length])

    def start(self):
        self.agent = Agent(FLEET, self.victim.device, HABITS)
        self.agent.clock = lambda: NOW
        self.agent.start(lambda will: self.connect("pi-1", will=will))
        return self.agent

    def want(self, release, deployment):
        self.server.publish(self.topic("desired"), messages.encode(wish(release, deployment)), retain=True)

    def heard(self, kind, deployment):
        def found():
            return [one for one in list(self.said) if isinstance(one, kind) and one.deployment == deployment]

        return eventually(found)[-1]

    @property
    def version(self):
        return slots.load(self.victim.device.state).current.version

    def recovers(self):
        """An honest server, and a wish that can be had, are all that it takes."""
        self.answer = self.honest
        self.want(self.victim.two, "afterwards")
        assert self.heard(Installed, "afterwards").version == 2
        assert self.version == 2


@pytest.fixture(params=["memory", "mosquitto"])
def scene(request, tmp_path):
    with running(request.param, tmp_path) as connect:
        scene = Scene(tmp_path, connect)
        yield scene
        if scene.agent is not None:
            scene.agent.stop()


def desired(**changes):
    fields = {"deployment": "d", "attempt": 1, "release": "models/digits/raspberry-pi-5/2.json", "version": 2}
    return json.dumps({**fields, **changes}).encode()


POISON = [
    b"\0", b"null", b"[]", b"\xff\xfe\xfd", b"{" * 60_000, b"[" * 60_000, b" " * 200_000, b"1" * 60_000,
    desired(deployment="../x"), desired(deployment="#"), desired(release="../../etc/passwd"), desired(version=-1),
    desired(version=2**63), desired(version=1e300), desired(attempt=None), desired(command="reboot"),
    desired(release="models/digits/raspberry-pi-5/2.json\n"), desired(release="models/a/b/99999999999.json"),
    b'{"deployment": "\xff"}',
]  # fmt: skip


@pytest.mark.attack("poisoned retained message")
def test_no_poisoned_wish_that_waits_for_a_device_does_it_any_harm(scene):
    scene.server.publish(scene.topic("desired"), POISON[0], retain=True)
    scene.server.publish(scene.topic("blocks"), b"garbage", retain=True)
    scene.server.publish(scene.topic("hello"), b"garbage", retain=True)
    agent = scene.start()
    eventually(lambda: agent.dropped >= 1)
    for number, payload in enumerate(POISON[1:], 2):
        scene.server.publish(scene.topic("desired"), payload, retain=True)
        eventually(lambda number=number: agent.dropped >= number)
    assert scene.version == 1
    scene.recovers()


@pytest.mark.attack("replayed desired state")
def test_wish_of_the_past_is_refused_and_one_that_is_repeated_is_work_once(scene):
    scene.start()
    scene.recovers()
    asked = scene.asked
    for _ in range(20):
        scene.want(scene.victim.two, "afterwards")
    scene.want(scene.victim.one, "replayed")
    assert "back from version 2 to 1" in scene.heard(Refused, "replayed").reason
    assert scene.version == 2
    fetched = scene.asked - asked
    scene.want(scene.victim.one, "replayed")
    eventually(lambda: len([one for one in scene.said if one.deployment == "replayed"]) >= 2)
    assert scene.asked - asked == fetched


@pytest.mark.attack("message flood")
def test_flood_of_garbage_holds_no_update_up(scene):
    agent = scene.start()
    scene.want(scene.victim.two, "amid")
    for number in range(400):
        scene.server.publish(scene.topic("blocks"), b"x" * 500, correlation=number.to_bytes(16, "big"))
        scene.server.publish(scene.topic("desired"), b"x" * 500)
    assert scene.heard(Installed, "amid").version == 2
    eventually(lambda: agent.dropped >= 400)


def silent(block):
    """Never answer."""


def short(block):
    """Give one byte at a time."""
    return msgspec.structs.replace(block, data=block.data[:1])


def surplus(block):
    """Give more than was asked for."""
    return msgspec.structs.replace(block, data=block.data + b"x" * bool(block.data))


@pytest.mark.attack("slow data")
@pytest.mark.parametrize("answer", [silent, short])
def test_server_that_drips_or_is_silent_is_given_up_and_tried_again(scene, answer):
    scene.start()
    scene.answer = lambda request: answer(scene.honest(request))
    scene.want(scene.victim.two, "slow")
    assert scene.heard(Failed, "slow")
    assert scene.version == 1
    scene.recovers()


@pytest.mark.attack("endless data")
def test_server_that_gives_more_than_was_asked_for_is_not_believed(scene):
    scene.start()
    scene.answer = lambda request: surplus(scene.honest(request))
    scene.want(scene.victim.two, "endless")
    assert scene.heard(Failed, "endless")
    assert scene.version == 1
    scene.recovers()


@pytest.mark.attack("endless data")
def test_file_that_grows_without_end_is_read_to_its_signed_length_alone(tmp_path):
    story = victim(tmp_path)
    simulator = story.simulator
    blob = simulator.blob_of(story.two)
    for number, path in enumerate((blob, simulator.content_of(story.two)[1], "metadata/timestamp.json")):
        simulator.endless, simulator.read = {path}, 0
        story.withstands("signed", deployment=f"endless-{number}")
        assert simulator.read < 2 << 20, path
    simulator.endless = set()
    story.recovers()
