"""Wishes of groups, over a real broker: who joins gets them, rollouts come first, a restored server is heard."""

import pytest
from click.testing import CliRunner
from fakes.brokers import running
from fakes.fleets import FLEET, NOW, PROFILE, Fleet, eventually

from edgekit.cli import cli
from edgekit.ota import messages
from edgekit.ota.device import slots
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.fetchers import Patience
from edgekit.ota.server.rollout import Plan
from edgekit.ota.server.service import Service
from edgekit.ota.server.store import Group, Store

QUICK = Habits(first_pause=0.05, longest_pause=0.2, hurry=True, patience=Patience(seconds=1.0))


class Lab:
    def __init__(self, folder, connect):
        self.folder, self.connect = folder, connect
        self.fleet = Fleet(folder / "fleet")
        self.agents = {}
        self.open()

    def open(self):
        self.store = Store(self.fleet.folder / "fleet.sqlite", FLEET)
        self.channel = self.connect("server")
        self.service = Service(self.fleet.folder, self.channel, self.store, NOW.timestamp).start()

    def close(self):
        self.service.stop()
        self.channel.close()
        self.store.close()

    def boot(self, name, *groups):
        agent = Agent(FLEET, self.fleet.device(self.folder / name, name=name), QUICK, groups=groups)
        agent.clock = lambda: NOW
        agent.start(lambda will: self.connect(name, will=will))
        self.agents[name] = agent
        return agent

    def runs(self, name):
        current = slots.load(self.folder / name).current
        return current.version if current else 0

    def known(self, name):
        return self.store.devices().get(name)


@pytest.fixture(params=["memory", "mosquitto"])
def lab(request, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 0.1)
    with running(request.param, tmp_path) as connect:
        lab = Lab(tmp_path, connect)
        yield lab
        for agent in lab.agents.values():
            agent.stop()
        lab.close()


def group(lab, *arguments, code=0):
    done = CliRunner().invoke(cli, ["ota", "group", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def test_new_devices_of_a_group_get_its_wish_and_others_do_not(lab):
    lab.fleet.publish(1)
    group(lab, "want", lab.fleet.folder, "canary", "digits")
    lab.boot("pi-1", "canary", "lab")
    lab.boot("pi-2", "lab")
    eventually(lambda: lab.runs("pi-1") == 1)
    eventually(lambda: lab.known("pi-1").outcome == "installed")
    assert lab.known("pi-1").deployment.startswith("g-canary-")
    assert lab.runs("pi-2") == 0
    lab.boot("pi-3", "canary")  # retained: whoever joins later finds it
    eventually(lambda: lab.runs("pi-3") == 1)


def test_a_rollout_comes_before_the_groups_wish(lab):
    lab.fleet.publish(1)
    group(lab, "want", lab.fleet.folder, "canary", "digits")
    agent = lab.boot("pi-1", "canary")
    eventually(lambda: lab.known("pi-1") and lab.known("pi-1").outcome == "installed")
    two = lab.fleet.publish(2)
    lab.store.start(Plan(model=two.model, version=2, profiles=(PROFILE,), waves=(1.0,)), NOW.timestamp())
    eventually(lambda: lab.known("pi-1").version == 2)
    assert lab.known("pi-1").deployment == "digits-v2"
    group(lab, "want", lab.fleet.folder, "canary", "digits", 1)  # newer as a wish, and still the group's
    told = lab.store.groups()["canary"].wish.revision
    eventually(lambda: agent._wishes.revisions["canary"] == told)
    assert agent._wanted.version == 2


def test_a_server_restored_from_a_backup_is_obeyed_again(lab):
    one, two = lab.fleet.publish(1), lab.fleet.publish(2)
    agent = lab.boot("pi-1")
    eventually(lambda: lab.known("pi-1"))
    lab.store.start(Plan(model=one.model, version=1, profiles=(PROFILE,), waves=(1.0,)), NOW.timestamp())
    eventually(lambda: lab.known("pi-1").outcome == "installed")
    lab.close()
    backup = {path: path.read_bytes() for path in lab.fleet.folder.glob("fleet.sqlite*")}
    lab.open()
    lab.store.start(Plan(model=two.model, version=2, profiles=(PROFILE,), waves=(1.0,)), NOW.timestamp())
    eventually(lambda: lab.known("pi-1").version == 2)
    lab.close()
    for path in lab.fleet.folder.glob("fleet.sqlite*"):
        path.unlink()
    for path, data in backup.items():
        path.write_bytes(data)
    lab.open()
    three = lab.fleet.publish(3)
    eventually(lambda: lab.known("pi-1").version == 2)  # what the retained hello says
    lab.store.start(Plan(model=three.model, version=3, profiles=(PROFILE,), waves=(1.0,)), NOW.timestamp())
    eventually(lambda: lab.known("pi-1").version == 3)
    assert lab.known("pi-1").revision >= agent._wishes.revisions[""] > NOW.timestamp() * 1000 - 1


def test_replayed_desired_state_of_a_group_changes_nothing(lab):
    lab.fleet.publish(1)
    group(lab, "want", lab.fleet.folder, "canary", "digits")
    old = lab.store.groups()["canary"].wish
    lab.fleet.publish(2)
    group(lab, "want", lab.fleet.folder, "canary", "digits")
    agent = lab.boot("pi-1", "canary")
    eventually(lambda: lab.runs("pi-1") == 2)
    attacker = lab.connect("attacker")
    attacker.publish(messages.group_topic(FLEET, "canary"), messages.encode(old), retain=True)
    eventually(lambda: agent.dropped == 1)
    assert agent._wanted.version == 2


def test_group_commands_say_what_they_did_and_refuse_what_they_cannot(lab):
    folder = lab.fleet.folder
    assert "has 2 devices" in group(lab, "add", folder, "canary", "pi-1", "pi-2")
    assert "has 1 devices" in group(lab, "remove", folder, "canary", "pi-2", "pi-9")
    lab.fleet.publish(1)
    first = group(lab, "want", folder, "canary", "digits", 1)
    assert "runs version 1 of digits" in first
    before = lab.store.groups()["canary"].wish
    group(lab, "want", folder, "canary", "digits", 1)
    again = lab.store.groups()["canary"].wish
    assert again.revision > before.revision  # said again, it is tried again
    assert again.deployment != before.deployment
    listed = group(lab, "list", folder)
    assert "canary" in listed
    assert "pi-1" in listed
    group(lab, "clear", folder, "canary")
    assert lab.store.groups()["canary"] == Group(members=("pi-1",))
    assert "unknown group" in group(lab, "clear", folder, "canari", code=2)
    assert "cannot name" in group(lab, "add", folder, "#", "pi-1", code=2)
    assert "cannot name" in group(lab, "add", folder, "canary", "../x", code=2)
    assert "unknown model" in group(lab, "want", folder, "canary", "cats", code=2)
