"""Every statement of `Store`, made once. Each names its fleet; none is put together from what somebody wrote.

Bound parameters are named as columns where they are written into one, and ``of``, ``since`` … where they only choose.
"""

from __future__ import annotations

import functools
from typing import Any

from edgekit.ota.server.tables import (
    AUDIT,
    AUDIT_HEADS,
    DEVICES,
    EVENTS,
    FLEETS,
    LEASES,
    REPORTS,
    ROLLOUTS,
    SETTINGS,
    replacing,
)
from edgekit.plugins import extra

with extra("fleet"):
    import sqlalchemy as sa

Select = sa.Select[Any]
_FLEET: sa.BindParameter[str] = sa.bindparam("fleet")
_OF: sa.BindParameter[str] = sa.bindparam("of")


class Queries:
    """The statements, by what they do, in the words of one database."""

    def __init__(self, kind: str) -> None:
        self.save_device = replacing(DEVICES, kind)
        self.set = replacing(SETTINGS, kind)
        self.set_audit_head = replacing(AUDIT_HEADS, kind)
        self.set_lease = replacing(LEASES, kind)

    fleets: Select = sa.select(FLEETS.c.name).order_by(FLEETS.c.name)
    add_fleet: sa.Insert = sa.insert(FLEETS)
    devices: Select = sa.select(DEVICES.c.id, DEVICES.c.state).where(DEVICES.c.fleet == _FLEET).order_by(DEVICES.c.id)
    news: Select = sa.select(DEVICES.c.id, DEVICES.c.state, DEVICES.c.stamp).where(
        DEVICES.c.fleet == _FLEET, DEVICES.c.stamp > sa.bindparam("since")
    )
    stamp: Select = sa.select(sa.func.coalesce(sa.func.max(DEVICES.c.stamp), 0)).where(DEVICES.c.fleet == _FLEET)
    known_reports: Select = sa.select(REPORTS.c.device, REPORTS.c.digest).where(
        REPORTS.c.fleet == _FLEET,
        sa.tuple_(REPORTS.c.device, REPORTS.c.digest).in_(sa.bindparam("keys", expanding=True)),
    )
    add_report: sa.Insert = sa.insert(REPORTS)
    forget_reports: sa.Delete = sa.delete(REPORTS).where(
        REPORTS.c.fleet == _FLEET,
        REPORTS.c.device == _OF,
        REPORTS.c.digest.in_(
            sa.select(REPORTS.c.digest)
            .where(REPORTS.c.fleet == _FLEET, REPORTS.c.device == _OF)
            .order_by(REPORTS.c.at.desc())
            .offset(sa.bindparam("most"))
        ),
    )
    reports: Select = (
        sa.select(REPORTS.c.payload).where(REPORTS.c.fleet == _FLEET, REPORTS.c.device == _OF).order_by(REPORTS.c.at)
    )
    rollouts: Select = sa.select(ROLLOUTS.c.state).where(ROLLOUTS.c.fleet == _FLEET).order_by(ROLLOUTS.c.seq)
    add_rollout: sa.Insert = sa.insert(ROLLOUTS).from_select(
        ["fleet", "seq", "id", "state"],
        sa.select(
            sa.cast(_FLEET, sa.Text),
            sa.func.coalesce(sa.func.max(ROLLOUTS.c.seq), 0) + 1,
            sa.cast(sa.bindparam("id"), sa.Text),
            sa.cast(sa.bindparam("state"), sa.LargeBinary),
        ).where(ROLLOUTS.c.fleet == _FLEET),
    )
    # SQLAlchemy's own update takes no parameter that is called as a column.
    change_rollout: sa.TextClause = sa.text("UPDATE rollouts SET state=:now WHERE fleet=:fleet AND id=:of")
    groups: Select = (
        sa.select(SETTINGS.c.key, SETTINGS.c.value)
        .where(SETTINGS.c.fleet == _FLEET, SETTINGS.c.key.like("group/%"))
        .order_by(SETTINGS.c.key)
    )
    settings: Select = (
        sa.select(SETTINGS.c.key, SETTINGS.c.value)
        .where(
            SETTINGS.c.fleet == _FLEET,
            sa.func.substr(SETTINGS.c.key, 1, sa.bindparam("length")) == sa.bindparam("prefix"),
        )
        .order_by(SETTINGS.c.key)
    )
    unset: sa.Delete = sa.delete(SETTINGS).where(SETTINGS.c.fleet == _FLEET, SETTINGS.c.key == _OF)
    last_event: Select = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.seq), 0)).where(EVENTS.c.fleet == _FLEET)
    add_event: sa.Insert = sa.insert(EVENTS)
    forget_events: sa.Delete = sa.delete(EVENTS).where(EVENTS.c.fleet == _FLEET, EVENTS.c.seq <= sa.bindparam("until"))
    events: Select = (
        sa.select(EVENTS.c.at, EVENTS.c.subject, EVENTS.c.text)
        .where(EVENTS.c.fleet == _FLEET)
        .order_by(EVENTS.c.seq.desc())
        .limit(sa.bindparam("limit"))
    )
    events_of: Select = (
        sa.select(EVENTS.c.at, EVENTS.c.subject, EVENTS.c.text)
        .where(EVENTS.c.fleet == _FLEET, EVENTS.c.subject == _OF)
        .order_by(EVENTS.c.seq.desc())
        .limit(sa.bindparam("limit"))
    )
    leases: Select = sa.select(LEASES.c.name, LEASES.c.holder, LEASES.c.epoch, LEASES.c.until).where(
        LEASES.c.fleet == _FLEET
    )
    drop_lease: sa.Delete = sa.delete(LEASES).where(LEASES.c.fleet == _FLEET, LEASES.c.name == _OF)
    audit: Select = (
        sa.select(*(column for column in AUDIT.c if column.name != "fleet"))
        .where(AUDIT.c.fleet == _FLEET)
        .order_by(AUDIT.c.seq)
    )
    audit_head: Select = sa.select(AUDIT_HEADS.c.seq, AUDIT_HEADS.c.hash).where(AUDIT_HEADS.c.fleet == _FLEET)
    add_audit: sa.Insert = sa.insert(AUDIT)


@functools.cache
def of(kind: str) -> Queries:
    """Return the statements for a kind of database."""
    return Queries(kind)
