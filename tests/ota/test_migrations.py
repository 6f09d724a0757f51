"""Databases of every edgekit there was: opened, brought up to date in place, and then what the code expects."""

import contextlib
import shutil
import sqlite3
from pathlib import Path

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from edgekit.errors import ResourceError, UsageError
from edgekit.ota.messages import Desired
from edgekit.ota.server import database
from edgekit.ota.server.fleet import DeviceState
from edgekit.ota.server.migrations import upgrade
from edgekit.ota.server.rollout import Plan, resume
from edgekit.ota.server.store import Group, Store
from edgekit.ota.server.tables import METADATA

BEFORE = Path(__file__).parent / "formats" / "fleet-v1.sqlite"
"""Written by the last edgekit without revisions."""


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copy(BEFORE, tmp_path / "fleet.sqlite"))


def test_a_file_of_the_edgekit_before_is_read_as_it_was_written(old):
    store = Store(old)
    assert store.name == "home"
    assert (store.devices()["pi-1"].version, store.devices()["pi-1"].groups) == (1, {"shop": 7})
    assert store.devices()["pi-2"].measured == {"p95_ms": 1.5}
    assert [(r.id, r.status, list(r.assigned)) for r in store.rollouts()] == [
        ("cat-v2", "running", ["pi-1"]),
        ("dog-v1", "paused", []),
    ]
    assert (store.reports("pi-1"), store.reports("pi-2")) == ([b'{"one":1}', b'{"two":2}'], [b'{"one":1}'])
    wish = Desired(deployment="g-shop-1", release="models/cat/pi/1.json", version=1, revision=7)
    assert store.groups() == {"shop": Group(members=("pi-1",), wish=wish)}
    assert [e.text for e in store.events()][-1] == "said something"
    store.close()


def test_what_was_brought_up_to_date_goes_on(old):
    store = Store(old)
    assert not store.remember("pi-1", b'{"one":1}', 20.0)
    store.change("dog-v1", resume, 20.0)
    assert store.start(msgspec.structs.replace(store.rollout("cat-v2").plan, version=3), 21.0).id == "cat-v3"
    assert [(r.id, r.status) for r in store.rollouts()] == [
        ("cat-v2", "aborted"),
        ("dog-v1", "running"),
        ("cat-v3", "running"),
    ]
    assert store.news(0)[1] == store.devices()
    store.close()


def test_the_edgekit_before_refuses_a_file_that_was_brought_up_to_date(old):
    Store(old).close()
    assert sqlite3.connect(old).execute("PRAGMA user_version").fetchone() == (2,)


def test_the_revisions_add_up_to_the_tables_that_the_code_expects(place):
    store = Store(place)
    context = MigrationContext.configure(store.database._connection)
    assert compare_metadata(context, METADATA) == []
    store.close()


def test_the_newest_revision_is_the_one_the_code_asks_for():
    assert upgrade.scripts().get_current_head() == database.NEWEST


def test_opening_what_is_up_to_date_does_not_import_alembic(place, monkeypatch):
    Store(place).close()
    monkeypatch.setattr(upgrade, "run", None)
    Store(place).close()


def test_tables_of_somebody_else_are_left_alone(tmp_path, postgresql):
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE devices (x)")
    other.close()
    with pytest.raises(ResourceError, match="schema 0"):
        Store(tmp_path / "other.sqlite")
    url = postgresql.create()
    postgresql.ask("edgekit", "CREATE TABLE devices (x int)")
    with pytest.raises(ResourceError, match="tables of somebody else"):
        Store(url)


@pytest.mark.parametrize("url", ["mysql://root:secret@db/x", "postgresql+asyncpg://root:secret@db/x", "://secret"])
def test_another_kind_of_database_is_refused_without_telling_its_password(url):
    with pytest.raises(UsageError) as caught:
        Store(url)
    assert "secret" not in caught.value.message + caught.value.hint
    assert "postgresql+psycopg://" in caught.value.hint


def test_a_postgresql_that_is_not_there_is_named_without_its_password():
    with pytest.raises(ResourceError, match=r"edgekit:\*\*\*@127\.0\.0\.1:1/x") as caught:
        Store("postgresql://edgekit:secret@127.0.0.1:1/x")
    assert "secret" not in caught.value.message


def test_a_connection_that_the_server_cut_is_made_anew(postgresql):
    url = postgresql.create()
    store = Store(url, "home")
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname='edgekit' AND pid<>pg_backend_pid()"
    postgresql.ask("postgres", kill)
    with pytest.raises(ResourceError):
        store.note("a", "lost", 1.0)
    store.note("a", "kept", 2.0)

    def half():
        with store.transaction():
            store.note("a", "half", 3.0)
            postgresql.ask("postgres", kill)
            store.devices()

    with pytest.raises(ResourceError):
        half()

    def stubborn():
        with store.transaction():
            with contextlib.suppress(ResourceError):
                half()
            store.save_devices([DeviceState(id="a")])  # on a new connection this would be no transaction

    with pytest.raises(ResourceError, match="lost within a transaction"):
        stubborn()
    assert [e.text for e in store.events()] == ["kept"]
    assert store.devices() == {}
    store.close()


def test_two_fleets_in_one_postgresql_see_nothing_of_each_other(postgresql):
    url = postgresql.create()
    mine, theirs = Store(url, "mine", who="me"), Store(url, "theirs", who="them")
    plan = Plan(model="cat", version=2, profiles=("pi",))
    mine.save_devices([DeviceState(id="pi-1", profile="pi")])
    mine.remember("pi-1", b"x", 1.0)
    mine.start(plan, 1.0)
    mine.change_group("shop", lambda _: Group(members=("pi-1",)))
    mine.lease("lead", "me", 1, 1e12)
    mine.note("pi-1", "mine alone", 1.0)
    empty = ({}, [], [], [], {}, {}, 0)

    def all_of(store):
        return (
            store.devices(), store.rollouts(), store.reports("pi-1"), store.events(), store.groups(), store.leases(),
            len(store.audited()[0]),
        )  # fmt: skip

    assert all_of(theirs) == empty
    before = all_of(mine)
    assert all(before)
    assert theirs.remember("pi-1", b"x", 1.0)
    theirs.start(plan, 5.0)
    theirs.save_devices([DeviceState(id="pi-1", profile="phone")])
    theirs.change("cat-v2", lambda r: msgspec.structs.replace(r, status="aborted"), 6.0)
    theirs.change_group("shop", lambda _: Group())
    theirs.release("lead")
    theirs.note("pi-1", "theirs", 1.0)
    assert all_of(mine) == before
    mine.close()
    theirs.close()
