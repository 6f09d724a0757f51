"""Two worker processes on a real Mosquitto and a real PostgreSQL, and the death of the one that leads."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from fakes.brokers import Mosquitto
from fakes.fleets import eventually
from test_service import Device

from edgekit.cli import cli
from edgekit.ota import identity, mqtt
from edgekit.ota.messages import Installed
from edgekit.ota.server.rollout import Plan
from edgekit.ota.server.store import Store

PLAN = Plan(model="cat", version=2, profiles=("pi",), waves=(0.2, 0.5, 1.0))


class Broker:
    """Connects scripted devices to a real broker, as `MemoryBroker.connect` does."""

    def __init__(self, url):
        self.url, self.channels = url, []

    def connect(self, name):
        self.channels.append(mqtt.connect(self.url, name))
        return self.channels[-1]


class Town:
    def __init__(self, folder, url, broker):
        self.folder, self.url, self.broker = folder, url, broker
        done = CliRunner().invoke(cli, ["ota", "init", str(folder), "--name", "home", "--database", url])
        assert done.exit_code == 0, done.output
        self.store = Store(url, "home")
        self.workers, self.devices = {}, {}

    def hire(self, name):
        command = [sys.executable, "-m", "edgekit", "ota", "server", self.folder, "--worker", name]
        self.workers[name] = subprocess.Popen(
            [*map(str, command), "--broker", self.broker.url],
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{name}.log").open("w"),
        )
        eventually(lambda: f"worker/{name}" in self.store.leases(), 30)

    def leader(self):
        lead = self.store.leases().get("lead")
        return lead.holder.partition("/")[0] if lead else None

    def kill(self, name):
        self.workers[name].send_signal(signal.SIGKILL)
        self.workers[name].wait()

    def close(self):
        for worker in self.workers.values():
            if worker.poll() is None:
                worker.terminate()
                worker.wait(timeout=20)
        for channel in self.broker.channels:
            channel.close()
        self.store.close()


@pytest.fixture
def town(tmp_path, postgresql):
    with Mosquitto(tmp_path) as mosquitto:
        town = Town(tmp_path / "fleet", postgresql.create(), Broker(mosquitto.url))
        yield town
        town.close()


@pytest.mark.slow
def test_the_leader_is_killed_mid_rollout_and_no_device_is_asked_twice_or_left_out(town):
    town.hire("a")
    town.hire("b")
    first = eventually(town.leader, 10)
    second = "b" if first == "a" else "a"
    names = [f"pi-{n}" for n in range(20)]
    for name in names:
        town.devices[name] = Device(town.broker, name, script=None)
    eventually(lambda: len(town.store.devices()) == 20, 20)
    town.store.start(PLAN, time.time())
    eventually(lambda: town.store.rollouts()[0].assigned, 10)
    for device in town.devices.values():
        device.script = Installed
    town.kill(first)
    killed = time.monotonic()
    eventually(lambda: town.leader() == second, 20)
    taken_over = time.monotonic() - killed
    done = eventually(lambda: (r := town.store.rollouts()[0]).status == "done" and r, 60)
    assert taken_over < 15, "a lease of 10 s, and the time between two looks at it"
    assert sorted(done.assigned) == sorted(names)
    assert {(a.attempt, a.outcome) for a in done.assigned.values()} == {(1, "installed")}
    reached = [n for e in town.store.events(limit=1000) for n in re.findall(r"pi-\d+", e.text.partition("reaches")[2])]
    assert sorted(reached) == sorted(names)
    wishes = {n: {(w.deployment, w.attempt) for w in d.desired if w} for n, d in town.devices.items()}
    assert wishes == {name: {("cat-v2", 1)} for name in names}
    print(f"taken over after {taken_over:.1f} s")


@pytest.mark.slow
def test_reports_are_split_between_workers_and_none_is_lost(town):
    town.hire("a")
    town.hire("b")
    eventually(town.leader, 10)
    device = Device(town.broker, "pi-1", script=None)
    eventually(lambda: "pi-1" in town.store.devices(), 10)
    pids = {name: worker.pid for name, worker in town.workers.items()}
    os.kill(pids["a"], signal.SIGSTOP)  # what is a's share waits; b takes its own
    for number in range(100):
        device.say("report", Installed(device="pi-1", deployment="x", attempt=number, version=1, bundle=""))
    eventually(lambda: 30 <= len(town.store.reports("pi-1")) <= 70, 20)
    os.kill(pids["a"], signal.SIGCONT)
    eventually(lambda: len(town.store.reports("pi-1")) == 100, 20)


@pytest.mark.slow
def test_workers_come_with_certificates_of_their_own_and_share_under_the_brokers_rules(town, tmp_path):
    def edgekit(*arguments):
        done = CliRunner().invoke(cli, ["ota", *map(str, arguments)])
        assert done.exit_code == 0, done.output

    fleet = town.folder
    edgekit("provision", fleet, "127.0.0.1", "--as", "broker", "-o", tmp_path / "broker")
    for name in ("a", "b"):
        edgekit("provision", fleet, f"edgekit-server-{name}", "--as", "server", "-o", tmp_path / name)
    edgekit("provision", fleet, "pi-1", "--profile", "pi", "-o", tmp_path / "pi-1")
    edgekit("broker-config", fleet, "--identity", tmp_path / "broker", "--worker", "a", "--worker", "b", "--port", 8883)
    config = (fleet / "broker" / "mosquitto.conf").read_text().splitlines()[1:]
    root = ["user root"] if os.getuid() == 0 else []  # else it gives up root's rights, and may not read this folder
    with Mosquitto(tmp_path, [*config, *root], "mqtts") as mosquitto, contextlib.ExitStack() as stack:
        tls = {
            name: mqtt.Tls(
                *(tmp_path / name / file for file in (identity.AUTHORITY, identity.CERTIFICATE, identity.KEY))
            )
            for name in ("a", "b", "pi-1")
        }
        got = {"a": [], "b": []}
        for name, arrived in got.items():
            channel = mqtt.connect(mosquitto.url, f"edgekit-server-home-{name}", tls=tls[name], shares=True)
            stack.callback(channel.close)
            channel.subscribe("$share/edgekit/edgekit/v1/home/devices/+/report", arrived.append)
        device = mqtt.connect(mosquitto.url, "pi-1", tls=tls["pi-1"])
        stack.callback(device.close)
        time.sleep(0.5)  # subscriptions are on their way; a message before them is nobody's
        for number in range(20):
            device.publish("edgekit/v1/home/devices/pi-1/report", b"%d" % number)
        eventually(lambda: sum(map(len, got.values())) == 20, 10)
        assert all(5 <= len(arrived) <= 15 for arrived in got.values())
