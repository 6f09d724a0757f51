"""The tables of the newest revision in `migrations`, for queries. Every row belongs to a fleet. Opens no database."""

from __future__ import annotations

from edgekit.plugins import extra

with extra("fleet"):
    import sqlalchemy as sa
    from sqlalchemy.dialects import postgresql, sqlite

METADATA = sa.MetaData()
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""Sorted by code points in both databases."""


def _table(name: str, *columns: sa.schema.SchemaItem, with_rowid: bool = False) -> sa.Table:
    fleet = sa.Column("fleet", _TEXT, sa.ForeignKey("fleets.name"), primary_key=True)
    return sa.Table(name, METADATA, fleet, *columns, sqlite_with_rowid=with_rowid)


def _key(name: str) -> sa.Column[str]:
    return sa.Column(name, _TEXT, primary_key=True)


def _text(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _serial() -> sa.Column[int]:
    return sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def _time(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double, nullable=False)


def _bytes(name: str) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary, nullable=False)


FLEETS = sa.Table("fleets", METADATA, _key("name"), sqlite_with_rowid=False)
SETTINGS = _table("settings", _key("key"), *_text("value"))
DEVICES = _table("devices", _key("id"), _number("stamp"), _bytes("state"))
sa.Index("devices_by_stamp", DEVICES.c.fleet, DEVICES.c.stamp)
ROLLOUTS = _table(
    "rollouts",
    _serial(),
    sa.Column("id", _TEXT, nullable=False),
    _bytes("state"),
    sa.UniqueConstraint("fleet", "id", name="rollouts_by_id"),
    with_rowid=True,
)
REPORTS = _table(
    "reports",
    _key("device"),
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    _time("at"),
    _bytes("payload"),
)
EVENTS = _table("events", _serial(), _time("at"), *_text("subject", "text"))
LEASES = _table("leases", _key("name"), *_text("holder"), _number("epoch"), _time("until"), with_rowid=True)
AUDIT = _table(
    "audit", _serial(), _time("at"), *_text("who", "action", "subject", "details", "previous", "hash"), with_rowid=True
)
AUDIT_HEADS = _table("audit_heads", _number("seq"), *_text("hash"), with_rowid=True)


def replacing(table: sa.Table, kind: str) -> sa.Insert:
    """Return the statement that writes a row, in place of the one with the same key if there is one."""
    insert = sqlite.insert(table) if kind == "sqlite" else postgresql.insert(table)
    keys = [column.name for column in table.primary_key]
    values = {column.name: insert.excluded[column.name] for column in table.c if column.name not in keys}
    if not values:
        return insert.on_conflict_do_nothing(index_elements=keys)
    return insert.on_conflict_do_update(index_elements=keys, set_=values)
