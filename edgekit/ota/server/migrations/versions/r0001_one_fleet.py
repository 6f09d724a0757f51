"""One fleet a database, in SQLite alone: the schema that files carry whose ``user_version`` is 1."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables of before."""
    bare = {"sqlite_with_rowid": False}
    op.create_table(
        "settings", sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False), **bare
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("state", sa.LargeBinary, nullable=False),
        **bare,
    )
    op.create_table(
        "rollouts",
        sa.Column("seq", _SERIAL, primary_key=True),
        sa.Column("id", sa.Text, unique=True, nullable=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "reports",
        sa.Column("device", sa.Text, primary_key=True),
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        **bare,
    )
    op.create_table(
        "events",
        sa.Column("seq", _SERIAL, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
    )
