"""The whole of OTA but the engine: publisher, service, brokers and three real agents, which take a rollout in waves."""

import pytest
from fakes import brokers
from fakes.fleets import FLEET, NOW, PROFILE, Fleet, eventually

from edgekit.errors import HealthError
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.fetchers import Patience
from edgekit.ota.server import publisher
from edgekit.ota.server.rollout import Plan
from edgekit.ota.server.service import Service
from edgekit.ota.server.store import Store

TAKEN = ["pi-1", "pi-3"]
QUICK = Habits(first_pause=0.05, longest_pause=0.2, patience=Patience(seconds=1.0))


class Picky:
    """Serves every bundle but those it is told to dislike, and remembers what it activated."""

    def __init__(self, disliked):
        self.disliked, self.activated = disliked, []

    def try_out(self, bundle, release):
        if bundle.digest in self.disliked:
            raise HealthError("sqnr_db is 3, at least 20 is wanted")
        return {"sqnr_db": 40.0}

    def activate(self, bundle):
        self.activated.append(bundle.digest if bundle else None)

    def probation(self, release):
        return {"p95_ms": 2.0}


class Lab:
    def __init__(self, folder, connect):
        self.folder, self.connect, self.disliked = folder, connect, set()
        self.fleet = Fleet(folder / "fleet")
        self.store = Store(folder / "fleet" / "fleet.sqlite", FLEET)
        self.agents = {}
        self.service = self.serve()

    def serve(self):
        return Service(self.fleet.folder, self.connect("server"), self.store, NOW.timestamp).start()

    def boot(self, name):
        serving = Picky(self.disliked)
        agent = Agent(FLEET, self.fleet.device(self.folder / name, serving, name=name), QUICK)
        agent.clock = lambda: NOW
        agent.start(lambda will: self.connect(name, will=will))
        self.agents[name] = (agent, serving)
        return serving

    def roll_out(self, release):
        plan = Plan(model=release.model, version=release.version, profiles=(PROFILE,), waves=(0.3, 1.0))
        return self.store.start(plan, NOW.timestamp()).id

    def ended(self, name):
        def check():
            rollout = self.store.rollout(name)
            return rollout if rollout.status in ("done", "halted") else None

        return eventually(check, 60.0)

    def stop(self):
        for agent, _ in self.agents.values():
            agent.stop()
        self.service.stop()
        self.store.close()


@pytest.fixture(params=brokers.KINDS)
def lab(request, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 0.2)
    with brokers.running(request.param, tmp_path) as connect:
        lab = Lab(tmp_path, connect)
        for name in ("pi-1", "pi-2", "pi-3"):
            lab.boot(name)
        eventually(lambda: len(lab.store.devices()) == 3)
        yield lab
        lab.stop()


def test_three_devices_update_in_two_waves_and_a_bad_release_never_leaves_its_canary(lab):
    good, bad = lab.fleet.publish(1), lab.fleet.publish(2)
    lab.disliked.add(bad.bundle)

    done = lab.ended(lab.roll_out(good))
    assert (done.status, done.reason) == ("done", "3 installed")
    assert sorted(a.wave for a in done.assigned.values()) == [0, 1, 1]
    assert [s.activated[-1] for _, s in lab.agents.values()] == [good.bundle] * 3

    halted = lab.ended(lab.roll_out(bad))
    assert halted.status == "halted"
    assert halted.reason == "1 of 1 reached devices failed (1 rolled-back), limit 0, in wave 1"
    (victim,) = halted.assigned
    assert "sqnr_db is 3" in lab.store.devices()[victim].reason
    assert all(bad.bundle not in s.activated for _, s in lab.agents.values())
    eventually(lambda: {d.version for d in lab.store.devices().values()} == {1})


def test_a_service_that_was_away_while_its_devices_updated_learns_it_all_the_same(lab):
    release = lab.fleet.publish(1)
    name = lab.roll_out(release)
    eventually(lambda: lab.store.rollout(name).assigned)
    for _ in range(4):
        lab.service.stop()
        lab.service.channel.close()
        lab.service = lab.serve()
    assert lab.ended(name).reason == "3 installed"
    assert [s.activated.count(release.bundle) for _, s in lab.agents.values()] == [1, 1, 1]


def test_a_device_that_was_off_catches_up_when_it_comes_back(lab):
    agent, _ = lab.agents.pop("pi-3")
    agent.stop()
    eventually(lambda: not lab.store.devices()["pi-3"].online)
    for seed in (1, 2):
        name = lab.roll_out(lab.fleet.publish(seed))
        eventually(lambda name=name: lab.store.rollout(name).count("installed") >= 2, 60.0)
    serving = lab.boot("pi-3")
    assert lab.ended(name).reason == "3 installed"
    newest = publisher.releases(lab.fleet.folder)[-1]
    assert [digest for digest in serving.activated if digest] == [newest.bundle]


def test_after_a_halt_the_reached_devices_go_back_by_a_signed_release_of_which_they_fetch_nothing(lab):
    good = lab.fleet.publish(1)
    assert lab.ended(lab.roll_out(good)).status == "done"
    bad, anew = lab.fleet.publish(2), lab.fleet.publish(1)
    assert (anew.bundle, anew.version) == (good.bundle, 3)
    lab.agents["pi-2"][1].disliked = {bad.bundle}
    plan = Plan(model=bad.model, version=2, profiles=(PROFILE,), waves=(1.0,), back=3)
    name = lab.store.start(plan, NOW.timestamp()).id
    back = eventually(lambda: next((r for r in lab.store.rollouts() if r.plan.version == 3), None), 60.0)
    eventually(lambda: [lab.agents[n][1].activated[-1] for n in lab.agents] == [good.bundle] * 3, 60.0)
    halted = lab.store.rollout(name)
    assert halted.status == "aborted"
    assert "it had halted: 1 of 3 reached devices failed (1 rolled-back)" in halted.reason
    devices = eventually(
        lambda: (
            (d := lab.store.devices()) and all((d[n].version, d[n].outcome) == (3, "installed") for n in TAKEN) and d
        ),
        60.0,
    )
    assert devices["pi-2"].version == 1
    assert [devices[n].measured["downloaded_bytes"] for n in TAKEN] == [0.0, 0.0]
    assert sorted(lab.store.rollout(back.id).assigned) == TAKEN
