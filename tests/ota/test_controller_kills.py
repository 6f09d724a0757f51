"""A controller that is killed before any of its writes to the database: whole transactions are left, and it goes on."""

import itertools
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa

from edgekit.ota import messages
from edgekit.ota.channel import Arrival
from edgekit.ota.messages import Hello, Installed
from edgekit.ota.server import database
from edgekit.ota.server.rollout import Plan
from edgekit.ota.server.service import Service
from edgekit.ota.server.store import Store

NAMES = ("pi-1", "pi-2", "pi-3", "pi-4")
PLAN = Plan(model="cat", version=2, profiles=("pi",), waves=(0.3, 1.0))
WRITES = ("INSERT", "UPDATE", "DELETE", "CREATE", "DROP", "ALTER", "COMMIT", "PRAGMA user")


class Deaf:
    """A channel on which nobody answers; what is said is remembered."""

    def __init__(self):
        self.said = []

    def publish(self, topic, payload, **_):
        self.said.append((topic, payload))

    def subscribe(self, *_):
        pass


def say(service, device, leaf, message):
    service._arrived(Arrival(messages.topic("home", device, leaf), messages.encode(message)))


def control(place, folder):
    """Be the controller from wherever it was left until the rollout is done; returns what was said to devices."""
    store, channel = Store(place, "home"), Deaf()
    service = Service(folder, channel, store, lambda: 1000.0)
    if not store.rollouts():
        store.start(PLAN, 1.0)
    for _ in range(12):
        for device in store.devices().values():
            if device.outcome == "pending":
                head = {"device": device.id, "deployment": device.deployment, "attempt": device.attempt}
                say(service, device.id, "report", Installed(**head, version=2, bundle="b" * 64))
        service._next_look = float("-inf")
        service.step()
    store.close()
    return channel.said


def count_writes(monkeypatch, before):
    """Call ``before`` with its number ahead of every statement that writes."""
    numbers = itertools.count(1)
    create = sa.create_engine

    def counted(*args, **settings):
        engine = create(*args, **settings)

        @sa.event.listens_for(engine, "before_cursor_execute")
        def look(_connection, _cursor, statement, *_):
            if statement.lstrip().startswith(WRITES):
                before(next(numbers))

        return engine

    monkeypatch.setattr(database.sa, "create_engine", counted)


def killed_before(number, work, monkeypatch):
    """Do ``work`` in a process that is killed before its write of that number; false where it had no so many."""
    child = os.fork()
    if child == 0:
        try:
            count_writes(monkeypatch, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def prepare(place, folder):
    store = Store(place, "home")
    service = Service(folder, Deaf(), store, lambda: 1000.0)
    for name in NAMES:
        hello = Hello(device=name, profile="pi", boot="b", online=True, release="models/cat/pi/1.json", version=1)
        say(service, name, "hello", hello)
    service.step()
    store.close()


def check_whole(place):
    """What one transaction wrote is there together: choice, diary, and what each device is asked for."""
    store = Store(place, "home")
    devices, rollouts, events = store.devices(), store.rollouts(), store.events(limit=1000)
    store.close()
    assigned = {name for rollout in rollouts for name in rollout.assigned}
    assert {d.id for d in devices.values() if d.deployment} == assigned
    assert {d.id for d in devices.values() if d.wish} == assigned
    assert len([e for e in events if e.text.startswith("started")]) == len(rollouts)
    reached = [name for e in events for name in re.findall(r"pi-\d", e.text.partition("reaches")[2])]
    assert sorted(reached) == sorted(assigned), "nobody is chosen twice, nobody without a line"
    return rollouts


@pytest.mark.slow
def test_controller_killed_before_each_write_skips_and_repeats_nobody(place, tmp_path, monkeypatch, request, capsys):
    template = tmp_path / "template.sqlite"
    statuses, number = [], 0
    prepare(place, tmp_path)
    is_file = "://" not in str(place)
    if is_file:
        shutil.copy(place, template)
    while True:
        number += 1
        if number > 1:
            if is_file:
                shutil.copy(template, place)
                for ending in ("-wal", "-shm"):
                    place.with_name(place.name + ending).unlink(missing_ok=True)
            else:
                place = request.getfixturevalue("postgresql").create()
                prepare(place, tmp_path)
        if not killed_before(number, lambda place=place: control(place, tmp_path), monkeypatch):
            break
        left = check_whole(place)
        statuses.append(left[0].status if left else "none")
        control(place, tmp_path)
        (done,) = check_whole(place)
        assert (done.status, sorted(done.assigned)) == ("done", sorted(NAMES)), number
        assert {a.attempt for a in done.assigned.values()} == {1}
        assert {a.outcome for a in done.assigned.values()} == {"installed"}
    with capsys.disabled():
        print(f"\nkilled before each write: {len(statuses)} of {number - 1} recovered")
    assert {"none", "running", "done"} <= set(statuses)
    assert len(statuses) > 20


@pytest.mark.slow
def test_upgrade_killed_before_each_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    old = Path(__file__).parent / "formats" / "fleet-v1.sqlite"
    path = tmp_path / "fleet.sqlite"
    number = 0
    while True:
        number += 1
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        shutil.copy(old, path)
        if not killed_before(number, lambda: Store(path).close(), monkeypatch):
            break
        store = Store(path)  # the next start takes it up, whatever was left
        assert (store.name, sorted(store.devices()), len(store.events())) == ("home", ["pi-1", "pi-2"], 4)
        store.close()
    assert number > 20
