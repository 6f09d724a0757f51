"""Applies the revisions that a database lacks, by Alembic, inside the caller's transaction. Knows no table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.plugins import extra

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory
    from sqlalchemy import Connection


def scripts() -> ScriptDirectory:
    """Return the revisions there are."""
    with extra("fleet"):
        from alembic.script import ScriptDirectory
    return ScriptDirectory(str(Path(__file__).parent))


def run(connection: Connection, found: str, newest: str) -> None:
    """Bring a database from a revision (empty: it has no tables) to another one."""
    with extra("fleet"):
        from alembic.operations import Operations
        from alembic.runtime.migration import MigrationContext

    folder = scripts()

    def steps(revision: Any, _context: object) -> Any:  # noqa: ANN401  # Alembic's own types are private
        return folder._upgrade_revs(newest, revision)  # noqa: SLF001  # what its own upgrade command calls

    context = MigrationContext.configure(connection, opts={"fn": steps, "script": folder})
    if found:
        context.stamp(folder, found)
    with Operations.context(context):
        context.run_migrations()
