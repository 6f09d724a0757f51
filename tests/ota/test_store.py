"""The fleet's memory: what was committed is there after a kill, what was not is not, and damage is named."""

import multiprocessing
import os
import signal
import sqlite3
import time

import msgspec
import pytest
import sqlalchemy as sa

from edgekit.errors import ResourceError, UnknownName, UsageError
from edgekit.ota.server.fleet import DeviceState
from edgekit.ota.server.rollout import Assignment, Plan, abort, pause
from edgekit.ota.server.store import Store

PLAN = Plan(model="cat", version=2, profiles=("pi",))


@pytest.fixture
def store(place):
    store = Store(place, "home")
    yield store
    store.close()


def again(store):
    """Open the database of a store once more."""
    return Store(store.path or store.database._engine.url.render_as_string(hide_password=False), store.name)


def put(store, statement, **values):
    """Write past the store."""
    with store.transaction():
        store.database.rows(sa.text(f"{statement} RETURNING 1"), values)


def waits_at_most(store, milliseconds):
    word = "PRAGMA busy_timeout=" if store.database.kind == "sqlite" else "SET lock_timeout="
    store.database._connection.exec_driver_sql(f"{word}{milliseconds}")


def version(number):
    return msgspec.structs.replace(PLAN, version=number)


def test_what_is_written_is_read_again_by_another_process_view(store):
    store.save_devices([DeviceState(id="b", profile="pi"), DeviceState(id="a", measured={"p95_ms": 1.5})])
    rollout = store.start(PLAN, 1.0)
    other = again(store)
    assert list(other.devices().values()) == [
        DeviceState(id="a", measured={"p95_ms": 1.5}),
        DeviceState(id="b", profile="pi"),
    ]
    assert other.rollouts() == [rollout]
    assert other.name == "home"
    other.close()


def test_a_file_is_written_for_good_with_each_transaction(tmp_path):
    store = Store(tmp_path / "fleet.sqlite")
    ask = store.database._connection.exec_driver_sql
    told = [ask(f"PRAGMA {what}").scalar() for what in ("journal_mode", "synchronous", "foreign_keys")]
    assert told == ["wal", 2, 1]
    store.close()


def test_the_same_report_is_kept_once(store):
    assert store.remember("a", b"one", 1.0)
    assert not store.remember("a", b"one", 2.0)
    assert store.remember("b", b"one", 2.0)
    assert store.remember("a", b"two", 3.0)
    assert store.reports("a") == [b"one", b"two"]


def test_a_transaction_that_fails_leaves_nothing_behind(store):
    def half():
        with store.transaction():
            store.save_devices([DeviceState(id="a")])
            store.start(PLAN, 1.0)
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert (store.devices(), store.rollouts(), store.events()) == ({}, [], [])


def test_a_newer_rollout_ends_the_older_ones_of_its_model(store):
    first = store.start(PLAN, 1.0)
    dog = store.start(msgspec.structs.replace(PLAN, model="dog"), 1.0)
    second = store.start(version(3), 2.0)
    assert store.rollout(first.id).status == "aborted"
    assert store.rollout(first.id).reason == f"superseded by {second.id}"
    assert store.rollout(dog.id).status == "running"


def test_a_rollout_that_would_take_devices_back_is_refused_and_ends_nothing(store):
    running = store.start(version(3), 1.0)
    store.save_devices([DeviceState(id="a", profile="pi", model="cat", version=3)])
    with pytest.raises(UsageError, match="a runs 3") as caught:
        store.start(PLAN, 2.0)
    assert "publish" in caught.value.hint
    assert store.rollout(running.id).status == "running"
    store.save_devices([DeviceState(id="a", profile="phone", model="cat", version=3)])
    assert store.start(PLAN, 3.0).status == "running"


def test_the_same_release_is_not_rolled_out_twice_at_once_but_again_after_a_halt(store):
    first = store.start(PLAN, 1.0)
    with pytest.raises(UsageError, match="is running"):
        store.start(PLAN, 2.0)
    store.change(first.id, lambda r: msgspec.structs.replace(r, status="halted", reason="bad"), 3.0)
    assert store.start(PLAN, 4.0).id == "cat-v2-2"


def test_changes_of_status_go_into_the_diary(store):
    rollout = store.start(PLAN, 1.0)
    store.change(rollout.id, pause, 2.0)
    store.change(rollout.id, pause, 3.0)
    store.change(rollout.id, abort, 4.0)
    store.note("other", "something", 5.0)
    assert [(e.at, e.text) for e in store.events(rollout.id)] == [
        (1.0, "started, waves 20%,100%"),
        (2.0, "paused: paused by the operator"),
        (4.0, "aborted: aborted by the operator"),
    ]
    assert [e.at for e in store.events(limit=2)] == [4.0, 5.0]


def test_an_unknown_rollout_is_named_with_the_nearest(store):
    store.start(PLAN, 1.0)
    with pytest.raises(UnknownName) as caught:
        store.rollout("cat-v3")
    assert caught.value.hint == "did you mean cat-v2?"


def test_a_long_model_name_still_gives_a_valid_rollout_name(store):
    rollout = store.start(msgspec.structs.replace(PLAN, model="m" * 100), 1.0)
    assert len(rollout.id) < 64
    assert store.rollouts() == [rollout]


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "fleet.sqlite"
    path.write_bytes(b"this is a letter to my aunt, and no database" * 100)
    with pytest.raises(ResourceError, match=r"fleet\.sqlite: file is not a database"):
        Store(path)


def test_a_database_of_a_newer_edgekit_is_refused(store):
    put(store, "UPDATE alembic_version SET version_num='0999'")
    with pytest.raises(ResourceError, match="schema 0999, this edgekit knows 0002") as caught:
        again(store)
    assert caught.value.hint == "update edgekit"


def test_a_file_of_a_newer_edgekit_is_refused_by_its_own_number_too(tmp_path):
    Store(tmp_path / "fleet.sqlite").close()
    other = sqlite3.connect(tmp_path / "fleet.sqlite")
    other.execute("PRAGMA user_version=9")
    other.close()
    with pytest.raises(ResourceError, match="schema 9"):
        Store(tmp_path / "fleet.sqlite")


def test_a_damaged_row_is_named_and_not_believed(store):
    put(store, "INSERT INTO devices VALUES ('home', 'a', 1, :state)", state=b'{"id":"a","profile":7}')
    put(store, "INSERT INTO rollouts VALUES ('home', 1, 'r', :state)", state=b"text")
    with pytest.raises(ResourceError, match="damaged DeviceState"):
        store.devices()
    with pytest.raises(ResourceError, match="damaged Rollout"):
        store.rollouts()


def test_a_writer_that_never_lets_go_is_an_error_and_not_a_hang(store):
    other = again(store)
    waits_at_most(store, 50)
    with other.transaction(), pytest.raises(ResourceError, match="locked"):
        store.start(PLAN, 1.0)
    other.close()
    assert store.start(PLAN, 1.0).status == "running"


@pytest.mark.attack("poison pill")
def test_a_text_of_a_device_that_the_database_cannot_hold_is_written_without_it(store):
    store.note("pi-1", "failed: \0 no", 1.0)
    assert [event.text for event in store.events()] == ["failed: \N{REPLACEMENT CHARACTER} no"]


def test_news_are_what_was_written_since_and_nothing_twice(store):
    assert store.news(0) == (0, {})
    store.save_devices([DeviceState(id="a"), DeviceState(id="b")])
    stamp, first = store.news(0)
    assert set(first) == {"a", "b"}
    other = again(store)
    mine = other.save_devices([DeviceState(id="b", profile="pi")])
    assert store.news(stamp) == (mine, {"b": DeviceState(id="b", profile="pi")})
    assert store.news(mine) == (mine, {})
    other.close()


def test_many_reports_are_kept_as_each_alone_would_be(store):
    store.remember("a", b"one", 1.0)
    told = store.remember_all([("a", b"one"), ("a", b"two"), ("b", b"one"), ("a", b"two"), ("b", b"")], 2.0)
    assert told == [False, True, True, False, True]
    assert (store.reports("a"), store.reports("b")) == ([b"one", b"two"], [b"one", b""])


def _write_for_ever(place, ready):
    store = Store(place)
    rollout = store.start(PLAN, 0.0)
    for number in range(1_000_000):
        name = f"pi-{number}"

        def more(old, name=name):
            assigned = {**old.assigned, name: Assignment(wave=0, profile="pi")}
            return msgspec.structs.replace(old, assigned=assigned)

        with store.transaction():
            store.change(rollout.id, more, 0.0)
            store.save_devices([DeviceState(id=name, deployment=rollout.id, attempt=1)])
        ready.send(number)


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011, 0.027])
def test_a_kill_at_any_moment_leaves_whole_transactions_only(place, delay):
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    writer = context.Process(target=_write_for_ever, args=(place, theirs))
    writer.start()
    while mine.recv() < 5:
        pass
    time.sleep(delay)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    told = 5
    while mine.poll():
        told = mine.recv()
    store = Store(place)
    devices, assigned = store.devices(), store.rollouts()[0].assigned
    store.close()
    assert set(devices) == set(assigned)
    assert {f"pi-{n}" for n in range(told + 1)} <= set(devices)


def test_a_setting_is_changed_where_it_stands_and_taken_away_by_nothing(store):
    assert store.change_setting("tags/pi-1", lambda old: old + "a") == "a"
    assert store.change_setting("tags/pi-10", lambda _: "z") == "z"
    assert store.change_setting("tags/pi-1", lambda old: old + "b") == "ab"
    assert store.settings("tags/") == {"pi-1": "ab", "pi-10": "z"}
    store.change_setting("tags/pi-1", lambda _: "")
    assert store.settings("tags/") == {"pi-10": "z"}
    assert store.name == "home"
