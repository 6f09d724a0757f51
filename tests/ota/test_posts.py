"""Several workers of one fleet: one leads, by a lease in the database; reports are split; who lost it is silent."""

import time

import pytest
from test_service import PLAN, Device

from edgekit.errors import ResourceError
from edgekit.ota import messages
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.messages import Installed
from edgekit.ota.server.post import LEASE_SECONDS, Post
from edgekit.ota.server.service import SHARE, Service
from edgekit.ota.server.store import Store


class Workers:
    """Workers in one process, each with a store of its own, on one clock that is moved by hand."""

    def __init__(self, place, folder):
        self.place, self.folder, self.now, self.broker = place, folder, 1000.0, MemoryBroker()
        self.stores, self.devices = [], {}

    def hire(self, name):
        store = Store(self.place, "home", clock=lambda: self.now)
        self.stores.append(store)
        post = Post(store, name, monotonic=lambda: self.now)
        service = Service(self.folder, self.broker.connect(f"server-{name}"), store, lambda: self.now).join(post)
        service.subscribe()
        return service

    def add(self, *names, **settings):
        for name in names:
            self.devices[name] = Device(self.broker, name, **settings)

    def settle(self, *services, seconds=1.0):
        quiet = 0
        while quiet < 4:
            before = (sum(s.counts.total() for s in services), self.stores[0].rollouts())
            self.now += seconds / 8
            for service in services:
                service.step(0.03)
            after = (sum(s.counts.total() for s in services), self.stores[0].rollouts())
            quiet = quiet + 1 if before == after else 0

    def leaders(self, *services):
        return [service._post.name for service in services if service._post.leads]

    def close(self):
        for store in self.stores:
            store.close()


@pytest.fixture
def workers(place, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.service.TICK_SECONDS", 0.0)
    workers = Workers(place, tmp_path)
    yield workers
    workers.close()


def diary(workers):
    return [e.text for e in workers.stores[0].events(limit=1000)]


def test_one_of_two_leads_and_both_take_reports(workers):
    a, b = workers.hire("a"), workers.hire("b")
    workers.settle(a, b)
    workers.add(*(f"pi-{n}" for n in range(8)))
    workers.settle(a, b)
    workers.stores[0].start(PLAN, workers.now)
    workers.settle(a, b)
    assert workers.leaders(a, b) == ["a"]
    (rollout,) = workers.stores[0].rollouts()
    assert (rollout.status, rollout.count("installed")) == ("done", 8)
    assert b.counts["reports"] >= 3, "reports are split"
    assert {d.name: len({(w.deployment, w.attempt) for w in d.desired if w}) for d in workers.devices.values()} == {
        f"pi-{n}": 1 for n in range(8)
    }
    assert a.fleet == workers.stores[0].devices()


def test_the_lead_goes_over_when_its_lease_has_run_out_and_not_before(workers):
    a, b = workers.hire("a"), workers.hire("b")
    a.step()
    b.step()
    workers.now += LEASE_SECONDS - 0.5  # a is dead: it is never asked again
    b.step()
    assert not b._post.leads
    workers.now += 2.5
    b.step()
    assert b._post.leads


def test_a_dead_leader_is_followed_by_one_who_knows_everything_and_repeats_nobody(workers):
    a, b = workers.hire("a"), workers.hire("b")
    workers.settle(a, b)
    workers.add("pi-1", "pi-2", "pi-3", "pi-4", script=None)
    workers.settle(a, b)
    workers.stores[0].start(PLAN, workers.now)
    workers.settle(a, b)
    asked = [d.name for d in workers.devices.values() if any(d.desired)]
    assert len(asked) == 2
    workers.broker.drop("server-a")
    for device in workers.devices.values():
        device.script = Installed
    workers.now += LEASE_SECONDS + 3
    workers.settle(b)
    (rollout,) = workers.stores[0].rollouts()
    assert (rollout.status, rollout.count("installed")) == ("done", 4)
    assert {a.attempt for a in rollout.assigned.values()} == {1}
    first = next(t for t in diary(workers) if "reaches" in t)
    assert all(name in first for name in asked)
    assert sum(t.count("pi-") for t in diary(workers) if "reaches" in t) == 4


def test_a_leader_that_was_held_up_writes_and_says_nothing_once_another_leads(workers):
    a, b = workers.hire("a"), workers.hire("b")
    workers.settle(a, b)
    workers.add("pi-1", "pi-2", script=None)
    workers.settle(a, b)
    workers.now += LEASE_SECONDS + 3
    b.step()  # a sleeps
    assert b._post.leads
    assert a._post.leads, "it does not know yet"
    workers.stores[0].start(PLAN, workers.now)
    said = []
    a.channel.publish = lambda topic, *_, **__: said.append(topic)
    a._post._renew_at = float("inf")  # it wakes in the middle of a step, behind its renewal
    a.step()
    assert not a._post.leads
    assert workers.stores[0].rollouts()[0].assigned == {}
    assert said == []
    told = {name: len(device.desired) for name, device in workers.devices.items()}
    workers.settle(b)
    assert len(workers.stores[0].rollouts()[0].assigned) == 1
    assert all(len(d.desired) > told[n] for n, d in workers.devices.items()), "the new one says all again"


def test_a_leader_that_is_held_up_between_writing_and_saying_stops_in_the_middle(workers):
    a, b = workers.hire("a"), workers.hire("b")
    workers.settle(a, b)
    workers.add("pi-1", "pi-2", "pi-3", script=None)
    workers.settle(a, b)
    a._published.clear()
    publish, said = a.channel.publish, []

    def slow(topic, payload, **options):
        said.append(topic)
        workers.now += LEASE_SECONDS + 1
        return publish(topic, payload, **options)

    a.channel.publish = slow
    a.step()
    assert len(said) == 1


def test_fenced_by_the_database_itself_a_transaction_of_the_old_epoch_is_refused(workers):
    a, b = workers.hire("a"), workers.hire("b")
    a.step()
    epoch = a.store.leases()["lead"].epoch
    workers.now += LEASE_SECONDS + 3
    b.step()
    lead = b.store.leases()["lead"]
    assert (lead.epoch, lead.holder.partition("/")[0]) == (epoch + 1, "b")
    with a.store.transaction():
        assert not a._post.confirm()
    workers.now += LEASE_SECONDS + 3
    a.step()
    assert a.store.leases()["lead"].epoch == epoch + 2, "the old one may lead again, as a new holder"


def test_what_a_worker_took_to_its_grave_is_said_again_by_the_device(workers):
    a, b = workers.hire("a"), workers.hire("b")
    workers.settle(a, b)
    workers.add("pi-1", "pi-2", "pi-3", script=None)
    workers.settle(a, b)
    workers.stores[0].start(PLAN, workers.now)
    workers.settle(a, b)
    (victim,) = [d for d in workers.devices.values() if any(d.desired)]
    wish = [w for w in victim.desired if w][-1]
    head = {"device": victim.name, "deployment": wish.deployment, "attempt": wish.attempt, "version": 2}
    shared = f"{SHARE}{messages.topic('home', '+', 'report')}"
    a.channel.unsubscribe(shared)
    victim.say("report", Installed(**head, bundle="b" * 64))
    while not b._waiting._waiting:  # the broker has its acknowledgement, the database has nothing
        time.sleep(0.001)
    workers.broker.drop("server-b")  # and b is killed
    a.channel.subscribe(shared, a._arrived)
    assert workers.stores[0].reports(victim.name) == []
    for device in workers.devices.values():
        device.script = Installed  # as real agents do, who answer a wish that they have fulfilled with their last word
    for _ in range(8):
        workers.now += 2
        a.step(0.05)
    workers.settle(a)
    assert "this worker went without a word" in diary(workers)
    assert workers.stores[0].rollouts()[0].status == "done"


def test_a_worker_that_leaves_in_good_order_is_followed_at_once(workers):
    a, b = workers.hire("a"), workers.hire("b")
    a.step()
    b.step()
    a._post.resign()
    workers.now += 2.1
    b.step()
    assert b._post.leads
    assert not [t for t in diary(workers) if "without a word" in t]


def test_a_worker_of_the_same_name_that_comes_again_has_everything_said_again(workers):
    a = workers.hire("a")
    a.step()
    assert not a._post.is_asked_again()
    other = workers.hire("a")
    other.step()
    assert not other._post.leads, "the old one may be alive"
    assert a._post.is_asked_again()


def test_a_new_leader_reads_what_devices_have_said_while_nobody_led(workers):
    workers.add("pi-1", "pi-2")  # retained; whoever shares gets no retained message
    a = workers.hire("a")
    workers.settle(a)
    assert set(a.fleet) == {"pi-1", "pi-2"}
    workers.broker.drop("server-a")
    workers.devices["pi-1"].hello(boot="b2")
    b = workers.hire("b")
    workers.now += LEASE_SECONDS + 3
    workers.settle(b)
    assert workers.stores[0].devices()["pi-1"].boot == "b2"


def test_a_worker_that_does_not_lead_takes_no_hello(workers):
    a, b = workers.hire("a"), workers.hire("b")
    workers.settle(a, b)
    workers.add("pi-1")
    workers.settle(a, b)
    assert (a.counts["reports"] > 0, b.counts["reports"]) == (True, 0)


def test_a_stalled_transaction_of_a_leader_is_ended_by_postgresql(postgresql, monkeypatch):
    monkeypatch.setattr("edgekit.ota.server.database._POSTGRESQL", "-c idle_in_transaction_session_timeout=300ms")
    url = postgresql.create()
    stalled, next_one = Store(url, "home"), Store(url, "home")

    def stall():
        with stalled.transaction():
            stalled.note("cat-v2", "written by who was stopped", 1.0)
            assert stalled.devices() == {}
            next_one.note("cat-v2", "written by who came next", 2.0)  # waits until PostgreSQL has ended the other

    with pytest.raises(ResourceError):
        stall()
    assert [e.text for e in next_one.events()] == ["written by who came next"]
    stalled.close()
    next_one.close()
