"""One connection to SQLite or PostgreSQL: whole transactions one after the other, errors as ours. Knows no table.

In both databases a transaction has its fleet to itself from its first statement on: SQLite lets one writer in,
PostgreSQL is asked for a lock of that name. So what was read inside one is still true when it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import ResourceError, UsageError
from edgekit.plugins import extra

with extra("fleet"):
    import sqlalchemy as sa
    from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

NEWEST = "0002"
BUSY_SECONDS = 15
"""So long one waits for another's transaction; and so long PostgreSQL waits for one that sleeps within its own."""
CONNECT_SECONDS = 10
_USER_VERSION = 2  # SQLite's own number, which is all that an edgekit without revisions looks at
_POSTGRESQL = (
    f"-c lock_timeout={BUSY_SECONDS}s -c idle_in_transaction_session_timeout={BUSY_SECONDS}s "
    "-c synchronous_commit=on -c default_transaction_isolation=read\\ committed"
)


class Database:
    """An open database; safe from several threads and several processes. ``clock`` replaces the database's own."""

    def __init__(self, place: Path | str, clock: Callable[[], float] | None = None) -> None:
        """Open it, and bring its tables to the newest revision.

        Raises:
            UsageError: the address is none of SQLite or PostgreSQL.
            ResourceError: it cannot be reached, is no database, or was written by a newer edgekit.
        """
        url = _address(place)
        self.kind = url.get_backend_name()
        self.label = url.database or "memory" if self.kind == "sqlite" else url.render_as_string(hide_password=True)
        self._clock = clock
        self._lock = threading.RLock()
        self._depth = 0
        self._is_lost = False  # the connection, and with it the transaction that it was in
        self._begin = "BEGIN IMMEDIATE"
        with self.translated():
            self._engine = sa.create_engine(
                url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool, connect_args=_arguments(self.kind)
            )
            if self.kind == "sqlite":
                sa.event.listen(self._engine, "connect", _prepare_sqlite)
            self._connection = self._engine.connect()
            try:
                self._bind("")
                self._migrate()
            except BaseException:
                self._connection.close()
                raise

    def bind(self, fleet: str) -> None:
        """Let transactions from now on be one after the other among those of this fleet alone."""
        self._bind(fleet)

    def close(self) -> None:
        """Close the connection; later calls are errors."""
        with self._lock:
            self._connection.close()
            self._engine.dispose()

    @contextmanager
    def transaction(self, before_commit: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Make all changes inside the block visible at once, or none; inside another it is part of that one."""
        with self._lock, self.translated():
            if self._depth:
                yield
                return
            self._depth = 1
            try:
                self._connection.exec_driver_sql(self._begin)
                yield
                before_commit()
                self._require_connection()
                self._connection.exec_driver_sql("COMMIT")
            except BaseException:
                with contextlib.suppress(SQLAlchemyError):  # there is none where the connection or COMMIT failed
                    self._connection.exec_driver_sql("ROLLBACK")
                raise
            finally:
                self._depth, self._is_lost = 0, False

    @property
    def is_in_transaction(self) -> bool:
        """Say whether the calling thread, which holds the lock then, is inside a transaction."""
        return bool(self._depth)

    def rows(self, statement: sa.Executable, values: Mapping[str, Any] | None = None) -> Sequence[sa.Row[Any]]:
        """Read."""
        with self._lock, self.translated():
            self._require_connection()
            return self._connection.execute(statement, values or {}).fetchall()

    def run(self, statement: sa.Executable, values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Write, once or for each of a list of values."""
        if values:
            with self._lock, self.translated():
                self._require_connection()
                self._connection.execute(statement, values)

    def lock(self) -> threading.RLock:
        """Return the lock that whoever uses the connection holds."""
        return self._lock

    def now(self) -> float:
        """Return the time that all who share this database agree on: PostgreSQL's own."""
        if self._clock is not None:
            return self._clock()
        if self.kind == "sqlite":
            return time.time()
        return float(self.rows(sa.text("SELECT extract(epoch FROM clock_timestamp())"))[0][0])

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the database's errors into ours, and let a connection that broke be made anew by the next call."""
        try:
            yield
        except DBAPIError as error:
            if hasattr(self, "_connection") and error.connection_invalidated:
                self._is_lost = bool(self._depth)
                with contextlib.suppress(SQLAlchemyError):
                    self._connection.rollback()
            raise self._error(error) from error
        except SQLAlchemyError as error:
            raise ResourceError(f"{self.label}: {error}", "check the database, or restore a backup") from error

    def _require_connection(self) -> None:
        """Refuse to go on, on a new connection, in the middle of a transaction that the old one took away."""
        if self._is_lost:
            raise ResourceError(f"{self.label}: the connection was lost within a transaction", "do all of it again")

    def _error(self, error: DBAPIError) -> ResourceError:
        told = " ".join(str(error.orig).split())
        if "locked" in told or "lock timeout" in told:
            return ResourceError(f"{self.label} is locked by another writer: {told}", "stop other writers")
        if self.kind == "sqlite":
            return ResourceError(f"{self.label}: {told}", "check the disk, or restore a backup")
        return ResourceError(f"{self.label}: {told}", "see that PostgreSQL runs, and that its name and password fit")

    def _bind(self, fleet: str) -> None:
        if self.kind != "sqlite":
            number = int.from_bytes(hashlib.sha256(f"edgekit/{fleet}".encode()).digest()[:8], "big", signed=True)
            self._begin = f"BEGIN; SELECT pg_advisory_xact_lock({number})"

    def _migrate(self) -> None:
        found = self._revision()
        if found == NEWEST:
            return
        from edgekit.ota.server.migrations import upgrade  # Alembic takes a while to import

        with self.transaction():
            found = self._revision()  # another may have been quicker
            if found != NEWEST:
                upgrade.run(self._connection, found, NEWEST)

    def _revision(self) -> str:
        """Return the revision of the tables; empty where there are none."""
        tables = set(sa.inspect(self._connection).get_table_names())
        if self.kind == "sqlite":
            number = int(self._connection.exec_driver_sql("PRAGMA user_version").scalar_one())
            if number > _USER_VERSION or (tables and not number):
                raise self._unknown(f"schema {number}", f"{_USER_VERSION}")
        if "alembic_version" in tables:
            found = str(self._connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one())
            if found > NEWEST:
                raise self._unknown(f"schema {found}", NEWEST)
            return found
        if self.kind == "sqlite" and tables:
            return "0001"
        if "devices" in tables or "fleets" in tables:
            raise self._unknown("tables of somebody else", NEWEST)
        return ""

    def _unknown(self, what: str, known: str) -> ResourceError:
        return ResourceError(f"{self.label} has {what}, this edgekit knows {known}", "update edgekit")


def _address(place: Path | str) -> sa.URL:
    if isinstance(place, Path) or "://" not in place:
        return sa.URL.create("sqlite", database=str(place))
    try:
        url = sa.make_url(place)
    except ArgumentError as error:
        raise _no_address("it cannot be read") from error
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise _no_address(f"{url.drivername} is not known")
    return url


def _no_address(why: str) -> UsageError:
    # Not the address itself: a password may stand in it.
    return UsageError(f"this is no database's address: {why}", "write postgresql+psycopg://USER@HOST:5432/NAME")


def without_password(place: str) -> str:
    """Return the address of a database as it may be written down.

    Raises:
        UsageError: it is none.
    """
    url = _address(place)
    query = {name: value for name, value in url.query.items() if "pass" not in name.lower()}
    where = {name: getattr(url, name) for name in ("username", "host", "port", "database")}
    return sa.URL.create(url.drivername, **where, query=query).render_as_string(hide_password=False)


def _arguments(kind: str) -> dict[str, Any]:
    if kind == "sqlite":
        return {"timeout": BUSY_SECONDS, "check_same_thread": False}
    return {"connect_timeout": CONNECT_SECONDS, "options": _POSTGRESQL, "application_name": "edgekit"}


def _prepare_sqlite(connection: Any, _record: object) -> None:  # noqa: ANN401  # sqlite3's own, handed through by SQLAlchemy
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
