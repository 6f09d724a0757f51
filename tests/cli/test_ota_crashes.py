"""A model whose engine crashes on live requests: real engines, real crashes, a real agent, and the way back."""

import contextlib
import itertools
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from fakes import engines, processes
from fakes.brokers import running
from fakes.fleets import FLEET, NOW, Fleet, eventually
from fakes.requests_to import post_json
from test_ota_commands import FAST, Process, agent_arguments, free_port, ota, say

from edgekit.cli.ota._serving import HostServing
from edgekit.errors import EdgekitError, EngineCrashed, HealthError
from edgekit.ota import messages
from edgekit.ota.device import slots, trust
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.fetchers import Patience
from edgekit.ota.device.update import Device
from edgekit.ota.messages import Desired, Installed, Report, RolledBack
from edgekit.ota.release import Limits, Release
from edgekit.ota.server import publisher
from edgekit.runtime.isolation import Isolation, crashes

HABITS = Habits(health_seconds=60, first_pause=0.05, longest_pause=0.2, will_delay=0, patience=Patience(seconds=1.0))
POISON = {"image": np.array([[engines.CRASH, 0, 0]], np.float32)}
SOUND = {"image": np.array([[1, 2, 3]], np.float32)}
AT_ONCE = Limits(probation_requests=0, probation_seconds=0)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(crashes, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(crashes, "LONGEST_SECONDS", 0.05)


@pytest.fixture(autouse=True)
def misbehaving(tmp_path, monkeypatch):
    engines.install(tmp_path / "site", monkeypatch)


@pytest.fixture
def serving():
    serving = HostServing("any", port=0, threads=1)
    serving.isolation = Isolation(seconds=10.0)
    yield serving
    serving.close()


def isolated_release(bundle, **limits):
    return Release(model="touchy", profile="any", version=2, bundle=bundle.digest, limits=Limits(**limits))


def crash(host):
    """Send what crashes the touchy engine, and wait until it is back."""
    before = host.session
    with pytest.raises(EngineCrashed, match="SIGSEGV"):
        host.run(POISON)
    eventually(lambda: host.session is not before or host.session.condition().pid)


class World:
    """A publisher, a channel, a device with a real agent and real engines, and what it said."""

    def __init__(self, folder, connect, serving):
        self.folder = folder
        self.fleet = Fleet(folder / "fleet")
        self.server = connect("server")
        self.fleet.serve(self.server)
        self.said = []
        self.server.subscribe(messages.topic(FLEET, "+", "report"), self._hear)
        self.serving = serving
        trust.install_root(folder / "device", publisher.root(self.fleet.folder))
        self.device = Device("pi-1", "any", folder / "device", serving)
        self.agent = Agent(FLEET, self.device, HABITS, serving.vitals)
        self.agent.clock = lambda: NOW
        serving.on_broken = self.agent.give_up
        self.agent.start(lambda will: connect("pi-1", will=will))

    def _hear(self, arrival):
        self.said.append(messages.decode(arrival.payload, Report))

    def publish(self, kind, version, limits=AT_ONCE):
        sealed = engines.sealed(self.folder / f"v{version}", kind, version=str(version))
        (release,) = publisher.publish(
            self.fleet.folder, sealed, version=version, now=NOW, limits=limits, allow_unverified=True
        )
        return release

    def want(self, release, deployment, attempt=1):
        wish = Desired(deployment=deployment, attempt=attempt, release=release.path, version=release.version)
        self.server.publish(messages.topic(FLEET, "pi-1", "desired"), messages.encode(wish), retain=True)

    def heard(self, kind, version, count=1):
        found = []

        def listen():
            found[:] = [word for word in list(self.said) if isinstance(word, kind) and word.version == version]
            return len(found) >= count

        eventually(listen, 60)
        return found[-1]


@pytest.fixture(params=["memory", "mosquitto"])
def world(request, tmp_path, serving):
    with running(request.param, tmp_path) as connect:
        world = World(tmp_path, connect, serving)
        yield world
        serving.stop()
        world.agent.stop()


def test_the_third_crash_after_the_probation_brings_the_old_model_back_over_the_air(world):
    one, two = world.publish("calm", 1), world.publish("touchy", 2)
    world.want(one, "d1")
    world.heard(Installed, 1)
    world.want(two, "d2")
    world.heard(Installed, 2)
    host = world.serving.host
    assert host.digest == two.bundle
    for _ in range(2):
        crash(host)
    assert host.run(SOUND).digest == two.bundle, "two crashes are no reason to go back"
    assert not [word for word in world.said if isinstance(word, RolledBack)]
    with pytest.raises(EngineCrashed):
        host.run(POISON)
    word = world.heard(RolledBack, 2)
    assert (word.deployment, word.attempt) == ("d2", 1)
    assert word.reason == "the engine crashed 3 times within 10 min; at last it crashed with SIGSEGV"
    eventually(lambda: host.digest == one.bundle)
    answer = host.run(POISON)
    assert (answer.digest, answer.outputs["scores"][0, 0]) == (one.bundle, engines.CRASH)
    assert slots.load(world.device.state).current == one
    world.want(two, "d2")
    assert world.heard(RolledBack, 2, count=2) == word, "the wish that stands is not obeyed again"
    assert host.digest == one.bundle
    eventually(lambda: len(processes.children()) <= 2)  # the model's, and the broker's where that is a process


def test_crashes_in_the_probation_end_it_and_the_old_model_comes_back(world):
    one = world.publish("calm", 1)
    two = world.publish("touchy", 2, Limits(probation_requests=100_000, probation_seconds=600, max_error_rate=1.0))
    world.want(one, "d1")
    world.heard(Installed, 1)
    world.want(two, "d2")
    host = world.serving.host
    eventually(lambda: host.digest == two.bundle, 60)
    while host.digest == two.bundle:
        with contextlib.suppress(EngineCrashed):
            host.run(POISON)
        time.sleep(0.005)
    word = world.heard(RolledBack, 2)
    assert "in its probation the engine crashed too often: 3 times SIGSEGV" in word.reason
    assert host.run(POISON).digest == one.bundle
    assert not [w for w in world.said if isinstance(w, Installed) and w.version == 2]


def test_a_first_model_that_crashes_serves_on_as_there_is_nothing_to_go_back_to(world):
    one = world.publish("touchy", 1)
    world.want(one, "d1")
    world.heard(Installed, 1)
    for _ in range(5):
        crash(world.serving.host)
    assert world.serving.host.run(SOUND).outputs["scores"][0, 0] == 6
    assert not [word for word in world.said if isinstance(word, RolledBack)]
    assert slots.load(world.device.state).current == one
    vitals = world.serving.vitals()
    assert (vitals.requests, vitals.errors) == (6, 5)


@pytest.mark.slow
def test_a_bundle_that_crashes_at_load_in_a_swap_fails_no_request(serving, tmp_path):
    calm, bad = engines.sealed(tmp_path / "calm", "calm"), engines.sealed(tmp_path / "bad", "crash when opened")
    serving.activate(calm)
    failed, count, stop = [], itertools.count(), threading.Event()

    def asking():
        while not stop.is_set():
            next(count)
            try:
                assert serving.host.run(SOUND).outputs["scores"][0, 0] == 6
            except (AssertionError, EdgekitError) as error:
                failed.append(error)

    threads = [threading.Thread(target=asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        with pytest.raises(HealthError, match="SIGSEGV"):
            serving.try_out(bad, isolated_release(bad))
        with pytest.raises(EngineCrashed, match="when it was opened"):
            serving.activate(bad)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert next(count) > 100
    assert serving.host.digest == calm.digest


def test_vitals_count_the_memory_of_both_processes(serving, tmp_path):
    from edgekit.runtime.memory import rss_mib

    serving.activate(engines.sealed(tmp_path / "calm", "calm"))
    pid = serving.host.session.condition().pid
    assert rss_mib(pid) > 10
    assert serving.vitals().rss_mib == pytest.approx(rss_mib() + rss_mib(pid), rel=0.2)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: serving.host.session.condition().pid != pid)
    assert rss_mib(pid) == 0.0


@pytest.mark.slow
def test_the_command_isolates_engines_and_goes_back_after_the_third_crash(tmp_path):
    fleet, started = tmp_path / "fleet", []

    def begin(name, *arguments):
        started.append(Process(tmp_path, name, *arguments))
        return started[-1]

    ota("init", fleet, "--name", "home")
    port = free_port()
    try:
        begin("server", "server", fleet, "--port", port).says("is served over")
        agent = begin("agent", *agent_arguments(fleet, f"mqtt://127.0.0.1:{port}", target="any"), "--port", 0)
        for version, kind in ((1, "calm"), (2, "touchy")):
            sealed = engines.sealed(tmp_path / kind, kind, version=str(version))
            ota("publish", fleet, sealed.folder, *FAST, "--allow-unverified")
            ota("rollout", "start", fleet, "touchy", version)
            agent.says(f"installed version {version}")
        url = agent.says("serving on").split()[-1]
        eventually(lambda: len(processes.children(agent.process.pid)) == 1)  # the engine before it is just leaving
        (engine,) = processes.children(agent.process.pid)
        statuses = []

        def third():
            given = {"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [engines.CRASH, 0, 0]}
            status, answer = post_json(url, "/v2/models/touchy/infer", {"inputs": [given]})
            statuses.append(status)
            return status == 200 and answer["outputs"][0]["data"][0] == engines.CRASH

        eventually(third, 60)
        agent.says("rolled back version 2: the engine crashed 3 times within 10 min")
        assert set(statuses) == {503, 200}
        eventually(lambda: say("status", fleet)["devices"][0]["outcome"] == "rolled-back")
        assert say("status", fleet)["devices"][0]["version"] == 1
        (other,) = processes.children(agent.process.pid)
        assert other != engine
        agent.process.kill()
        eventually(lambda: not processes.lives(other))
    finally:
        for process in started:
            process.end(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "count"), [((), 1), (("--no-isolate",), 0)])
def test_a_device_updated_from_a_stick_goes_back_too_and_isolation_may_be_declined(tmp_path, flags, count):
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--name", "home")
    ota("publish", fleet, engines.sealed(tmp_path / "calm", "calm").folder, *FAST, "--allow-unverified")
    base = (*agent_arguments(fleet, "none", target="any")[:9], "--repository", fleet / "repository")
    ota(*base, "--once")
    touchy = engines.sealed(tmp_path / "touchy", "touchy", version="2")
    ota("publish", fleet, touchy.folder, *FAST, "--allow-unverified")
    agent = Process(tmp_path, "agent", *base, "--port", 0, *flags)
    try:
        agent.says("installed version 2")
        url = agent.says("serving on").split()[-1]
        eventually(lambda: len(processes.children(agent.process.pid)) == count)
        if count:
            given = {"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [engines.CRASH, 0, 0]}
            eventually(lambda: post_json(url, "/v2/models/touchy/infer", {"inputs": [given]})[0] == 200, 60)
            agent.says("rolled back version 2: the engine crashed 3 times")
        assert agent.end() == 0
    finally:
        agent.end(signal.SIGKILL)
    current = json.loads((tmp_path / "pi-1" / "state.json").read_text())["current"]
    assert current["version"] == (1 if count else 2)
