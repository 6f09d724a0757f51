"""The audit log: every deed of an operator is in it, no line can be changed, and whoever changes one is found out."""

import json
import sqlite3

import msgspec
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from fakes.fleets import tiny_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.cli import cli
from edgekit.errors import ResourceError
from edgekit.ota.server.audit import EMPTY, Deed, Entry, Head, faults, follow
from edgekit.ota.server.rollout import Plan, abort, pause, resume
from edgekit.ota.server.store import Group, Store

PLAN = Plan(model="cat", version=2, profiles=("pi",))
TEXT = st.text(max_size=8)
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
DEEDS = st.lists(
    st.builds(
        Deed,
        at=st.floats(0, 1e10, allow_nan=False),
        who=TEXT,
        action=TEXT,
        subject=TEXT,
        details=st.dictionaries(TEXT, st.integers() | TEXT, max_size=2),
    ),
    min_size=1,
    max_size=6,
)


def written(deeds, fleet="home"):
    entries, head = [], EMPTY
    for deed in deeds:
        entries.append(follow(fleet, head, deed))
        head = Head(entries[-1].seq, entries[-1].hash)
    return entries, head


@PATIENT
@given(DEEDS)
def test_a_log_as_it_was_written_has_no_fault(deeds):
    entries, head = written(deeds)
    assert faults("home", entries, head) == []
    for known in [EMPTY, *(Head(one.seq, one.hash) for one in entries)]:
        assert faults("home", entries, head, known) == []


@given(DEEDS, st.data())
@settings(PATIENT, max_examples=300)
def test_any_line_that_is_changed_is_noticed(deeds, data):
    entries, head = written(deeds)
    at = data.draw(st.integers(0, len(entries) - 1))
    field = data.draw(st.sampled_from(Entry.__struct_fields__))
    old = getattr(entries[at], field)
    kind = {int: st.integers(0, 10), float: st.floats(0, 1e10, allow_nan=False), str: TEXT}[type(old)]
    new = data.draw(kind.filter(lambda value: value != old))
    entries[at] = msgspec.structs.replace(entries[at], **{field: new})
    assert faults("home", entries, head) != []


@given(DEEDS, st.data())
@settings(PATIENT, max_examples=300)
def test_any_line_that_is_taken_out_moved_doubled_or_cut_off_is_noticed(deeds, data):
    entries, head = written(deeds)
    chosen = data.draw(
        st.lists(st.integers(0, len(entries) - 1), max_size=8).filter(lambda some: some != list(range(len(entries))))
    )
    assert faults("home", [entries[one] for one in chosen], head) != []


@PATIENT
@given(DEEDS, DEEDS)
def test_a_whole_log_that_was_written_anew_is_noticed_by_who_kept_a_head(deeds, others):
    head, (forged, theirs) = written(deeds)[1], written(others)
    if head != theirs and head not in [Head(one.seq, one.hash) for one in forged]:
        assert faults("home", forged, theirs) == [], "by itself it is a good one"
        assert faults("home", forged, theirs, head) != []


@PATIENT
@given(DEEDS)
def test_the_log_of_another_fleet_does_not_pass_for_this_ones(deeds):
    entries, head = written(deeds, "theirs")
    assert faults("home", entries, head) != []


@pytest.fixture
def store(place):
    store = Store(place, "home", who="ada", clock=lambda: 50.0)
    yield store
    store.close()


def deeds(store):
    return [(e.who, e.action, e.subject) for e in store.audited()[0]]


def test_what_an_operator_changes_is_in_the_log_and_what_the_service_changes_is_not(store, place):
    store.start(PLAN, 1.0)
    for how in (pause, resume, abort):
        store.change("cat-v2", how, 2.0)
    store.change("cat-v2", abort, 3.0)  # changes nothing
    store.change_group("shop", lambda _: Group(members=("pi-1",)))
    service = Store(place, "home")
    service.start(msgspec.structs.replace(PLAN, version=3), 4.0)
    service.close()
    assert deeds(store) == [
        ("ada", "rollout.start", "cat-v2"),
        ("ada", "rollout.pause", "cat-v2"),
        ("ada", "rollout.resume", "cat-v2"),
        ("ada", "rollout.abort", "cat-v2"),
        ("ada", "group.change", "shop"),
    ]
    assert faults("home", *store.audited()) == []
    assert json.loads(store.audited()[0][-1].details)["after"] == {"members": ["pi-1"], "wish": None}


def test_a_change_that_fails_is_not_in_the_log(store):
    def fail(rollout):
        raise KeyError

    store.start(PLAN, 1.0)
    with pytest.raises(KeyError):
        store.change("cat-v2", fail, 2.0)

    def half():
        with store.transaction():
            store.audit("publish", "cat v2")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert [action for _, action, _ in deeds(store)] == ["rollout.start"]


@pytest.mark.parametrize("statement", ["UPDATE audit SET who='eve'", "DELETE FROM audit", "TRUNCATE audit"])
def test_the_database_itself_refuses_to_change_the_log(store, statement):
    if statement.startswith("TRUNCATE") and store.database.kind == "sqlite":
        pytest.skip("SQLite has no TRUNCATE")
    store.start(PLAN, 1.0)
    with pytest.raises(ResourceError, match="only grows"):
        store.database.run(sa.text(statement), {"fleet": "home"})
    assert deeds(store) == [("ada", "rollout.start", "cat-v2")]


@pytest.mark.parametrize("who", ["a\0b", "<b>", "ada\nfaults", "'; DROP TABLE audit; --"])
def test_any_name_can_stand_in_the_log(place, who):
    store = Store(place, "home", who=who)
    store.audit("publish", "x\0y", {"text": "\0"})
    assert faults("home", *store.audited()) == []
    store.close()


def ota(*arguments, code=0):
    done = CliRunner().invoke(cli, ["ota", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def fleet(tmp_path):
    tiny_bundle(tmp_path / "bundle")
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--name", "home", "--by", "ada")
    ota("publish", fleet, tmp_path / "bundle", "--by", "ada")
    ota("provision", fleet, "pi-1", "--profile", "pi", "-o", tmp_path / "pi-1", "--group", "lab", "--by", "bob")
    ota("rollout", "start", fleet, "digits", "--by", "eve")
    ota("rollout", "abort", fleet, "digits-v1", "--by", "ada")
    ota("revoke", fleet, "pi-1", "--device", "--by", "ada")
    return fleet


def test_commands_of_operators_are_listed_with_who_gave_them(fleet):
    entries = json.loads(ota("audit", "list", fleet, "--json"))["entries"]
    assert [(e["who"], e["action"], e["subject"]) for e in entries] == [
        ("ada", "init", "home"),
        ("ada", "publish", "digits v1"),
        ("bob", "provision", "pi-1"),
        ("bob", "group.change", "lab"),
        ("eve", "rollout.start", "digits-v1"),
        ("ada", "rollout.abort", "digits-v1"),
        ("ada", "revoke.device", "pi-1"),
    ]
    assert "eve" in ota("audit", "list", fleet)


def test_a_log_with_a_changed_line_is_refused_and_a_shortened_one_by_the_head_that_was_kept(fleet):
    head = json.loads(ota("audit", "verify", fleet, "--json"))["head"]
    assert head.startswith("7:")
    assert "7 lines" in ota("audit", "verify", fleet, "--head", head)
    db = sqlite3.connect(fleet / "fleet.sqlite", isolation_level=None)
    for trigger in ("audit_update", "audit_delete"):  # whoever owns the file can do so
        db.execute(f"DROP TRIGGER {trigger}")
    db.execute("UPDATE audit SET who='ada' WHERE who='eve'")
    assert "line 5 was changed" in ota("audit", "verify", fleet, code=10)
    db.execute("UPDATE audit SET who='eve' WHERE seq=5")
    ota("audit", "verify", fleet)
    db.execute("DELETE FROM audit WHERE seq=7")
    assert "ends with line 6" in ota("audit", "verify", fleet, code=10)
    db.execute("UPDATE audit_heads SET seq=6, hash=(SELECT hash FROM audit WHERE seq=6)")
    ota("audit", "verify", fleet)
    assert "line 7 is not the one" in ota("audit", "verify", fleet, "--head", head, code=10)
    assert "is no head" in ota("audit", "verify", fleet, "--head", "7", code=2)
