"""Many fleets in one database, each row with its fleet; leases of workers, and the audit log that only grows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_BEFORE = ("settings", "devices", "rollouts", "reports", "events")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_COPY = (
    "INSERT INTO devices (fleet, id, stamp, state) SELECT f.name, d.id, 1, d.state FROM fleets f, old_devices d",
    "INSERT INTO rollouts (fleet, seq, id, state) SELECT f.name, r.seq, r.id, r.state FROM fleets f, old_rollouts r",
    (
        "INSERT INTO reports (fleet, device, digest, at, payload) "
        "SELECT f.name, r.device, r.digest, r.at, r.payload FROM fleets f, old_reports r"
    ),
    (
        "INSERT INTO events (fleet, seq, at, subject, text) "
        "SELECT f.name, e.seq, e.at, e.subject, e.text FROM fleets f, old_events e"
    ),
    (
        "INSERT INTO settings (fleet, key, value) "
        "SELECT f.name, s.key, s.value FROM fleets f, old_settings s WHERE s.key <> 'name'"
    ),
)
_REFUSE_SQLITE = """
CREATE TRIGGER audit_{when} BEFORE {when} ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END
"""
_REFUSE_POSTGRESQL = (
    (
        "CREATE FUNCTION audit_only_grows() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log only grows'; END $$"
    ),
    "CREATE TRIGGER audit_rows BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_only_grows()",
    "CREATE TRIGGER audit_whole BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_only_grows()",
)


def upgrade() -> None:
    """Move every row below its fleet, and add what several workers and an audit need."""
    for name in _BEFORE:
        op.rename_table(name, f"old_{name}")
    op.create_table("fleets", sa.Column("name", _TEXT, primary_key=True), sqlite_with_rowid=False)
    _make_moved()
    _make_new()
    op.execute("INSERT INTO fleets (name) SELECT value FROM old_settings WHERE key = 'name'")
    for statement in _COPY:
        op.execute(statement)
    for name in _BEFORE:
        op.drop_table(f"old_{name}")
    if op.get_context().dialect.name == "sqlite":
        for when in ("update", "delete"):
            op.execute(_REFUSE_SQLITE.format(when=when))
        op.execute("PRAGMA user_version=2")  # the edgekit of before looks there, and refuses
    else:
        for statement in _REFUSE_POSTGRESQL:
            op.execute(statement)


def _fleet() -> sa.Column[str]:
    return sa.Column("fleet", _TEXT, sa.ForeignKey("fleets.name"), primary_key=True)


def _make_moved() -> None:
    bare = {"sqlite_with_rowid": False}
    key, value = sa.Column("key", _TEXT, primary_key=True), sa.Column("value", sa.Text, nullable=False)
    op.create_table("settings", _fleet(), key, value, **bare)
    op.create_table(
        "devices",
        _fleet(),
        sa.Column("id", _TEXT, primary_key=True),
        sa.Column("stamp", sa.BigInteger, nullable=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
        **bare,
    )
    op.create_index("devices_by_stamp", "devices", ["fleet", "stamp"])
    op.create_table(
        "rollouts",
        _fleet(),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", _TEXT, nullable=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("fleet", "id", name="rollouts_by_id"),
    )
    op.create_table(
        "reports",
        _fleet(),
        sa.Column("device", _TEXT, primary_key=True),
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        **bare,
    )
    op.create_table(
        "events",
        _fleet(),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        **bare,
    )


def _make_new() -> None:
    op.create_table(
        "leases",
        _fleet(),
        sa.Column("name", _TEXT, primary_key=True),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("until", sa.Double, nullable=False),
    )
    op.create_table(
        "audit",
        _fleet(),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Double, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("who", "action", "subject", "details")),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("previous", "hash")),
    )
    op.create_table(
        "audit_heads",
        _fleet(),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
    )
