"""The fleet's memory: one SQLite file that a kill leaves at the last whole transaction. Decides nothing.

Devices are written by the service alone; rollouts also by the command line, so each change of one is read,
made and written inside one transaction.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from edgekit.errors import ResourceError, UnknownName, UsageError
from edgekit.ota.messages import Desired, Identifier
from edgekit.ota.server.fleet import DeviceState
from edgekit.ota.server.plan import told
from edgekit.ota.server.rollout import Rollout, abort, begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from edgekit.ota.server.plan import Plan

T = TypeVar("T")
VERSION = 1
REMEMBERED_REPORTS = 1000
REMEMBERED_EVENTS = 100_000
"""So much is kept of what devices say, for a device that floods must not fill the server's disk."""
_FORGET_REPORTS = """
DELETE FROM reports WHERE device = ?1
AND digest IN (SELECT digest FROM reports WHERE device = ?1 ORDER BY at DESC LIMIT -1 OFFSET ?2)
"""
_SCHEMA = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE devices  (id TEXT PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE rollouts (seq INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, state BLOB NOT NULL);
CREATE TABLE reports  (device TEXT, digest BLOB, at REAL NOT NULL, payload BLOB NOT NULL,
                       PRIMARY KEY (device, digest)) WITHOUT ROWID;
CREATE TABLE events   (seq INTEGER PRIMARY KEY, at REAL NOT NULL, subject TEXT NOT NULL, text TEXT NOT NULL);
"""


class Event(NamedTuple):
    """A line of the fleet's diary: when, about which rollout or device, what."""

    at: float
    subject: str
    text: str


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices that may hear what the group is to run, and that wish; for what no rollout has reached yet."""

    members: tuple[Identifier, ...] = ()
    wish: Desired | None = None


class Store:
    """An open database; safe from several threads and several processes."""

    def __init__(self, path: Path, name: str = "fleet") -> None:
        """Open the database, or make it for a fleet of that name.

        Raises:
            ResourceError: the file is no database of edgekit, damaged, or written by a newer edgekit.
        """
        self.path = path
        self._lock = threading.RLock()
        with self._translated():
            self._db = sqlite3.connect(path, timeout=15, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._migrate(name)

    @property
    def name(self) -> str:
        """The fleet's name in topics; given once, when the database was made."""
        return str(self._rows("SELECT value FROM settings WHERE key='name'")[0][0])

    def close(self) -> None:
        """Close the file; later calls are errors."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes inside the block visible at once, or none; other writers wait."""
        with self._lock, self._translated():
            outermost = not self._db.in_transaction
            if outermost:
                self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                if outermost:
                    self._db.execute("COMMIT")
            except BaseException:
                if outermost:
                    self._db.rollback()
                raise

    def devices(self) -> dict[str, DeviceState]:
        """Read every device, by its name."""
        rows = self._rows("SELECT id, state FROM devices ORDER BY id")
        return {str(name): self._parse(state, DeviceState) for name, state in rows}

    def save_devices(self, states: Iterable[DeviceState]) -> None:
        """Write the devices that changed."""
        rows = [(s.id, msgspec.json.encode(s)) for s in states]
        with self.transaction():
            self._db.executemany("INSERT OR REPLACE INTO devices VALUES (?, ?)", rows)

    def remember(self, device: str, payload: bytes, now: float) -> bool:
        """Keep a report, the last thousand of a device; false when the same bytes came from that device before."""
        key = hashlib.sha256(payload).digest()
        with self.transaction():
            row = (device, key, now, payload)
            is_new = self._db.execute("INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?)", row).rowcount == 1
            if is_new:
                self._db.execute(_FORGET_REPORTS, (device, REMEMBERED_REPORTS))
        return is_new

    def reports(self, device: str) -> list[bytes]:
        """Read the reports of one device, oldest first."""
        return [bytes(row[0]) for row in self._rows("SELECT payload FROM reports WHERE device=? ORDER BY at", device)]

    def rollouts(self) -> list[Rollout]:
        """Read every rollout in the order they were started."""
        return [self._parse(row[0], Rollout) for row in self._rows("SELECT state FROM rollouts ORDER BY seq")]

    def rollout(self, name: str) -> Rollout:
        """Read one rollout.

        Raises:
            UnknownName: there is none of that name.
        """
        known = {r.id: r for r in self.rollouts()}
        if name not in known:
            raise UnknownName("rollout", name, known)
        return known[name]

    def start(self, plan: Plan, now: float, how: Callable[[Rollout], Rollout] = lambda new: new) -> Rollout:
        """Begin a rollout; running ones of the same model end, because its newest release is what they should run.

        ``how`` changes it before it is written: one that is proposed ends no other until it is approved (`supersede`).

        Raises:
            UsageError: a rollout of the same release is still under way, or devices run a newer version already.
        """
        with self.transaction():
            taken = {r.id for r in self.rollouts()}
            first = f"{plan.model[:40]}-v{plan.version}"
            name = next(n for i in range(1, len(taken) + 2) if (n := first if i == 1 else f"{first}-{i}") not in taken)
            self._refuse_going_back(plan)
            rollout = how(begin(name, plan, self.rollouts(), self.settings("released/")))
            if rollout.status != "proposed":
                self.supersede(plan, name, now)
            self._db.execute("INSERT INTO rollouts (id, state) VALUES (?, ?)", (name, msgspec.json.encode(rollout)))
            self.note(name, f"{'proposed' if rollout.status == 'proposed' else 'started'}, waves {told(plan)}", now)
        return rollout

    def change(self, name: str, how: Callable[[Rollout], Rollout], now: float) -> Rollout:
        """Read a rollout, change it and write it, in one transaction; a change of status goes into the diary."""
        with self.transaction():
            old = self.rollout(name)
            new = how(old)
            if new != old:
                data = msgspec.json.encode(new)
                self._db.execute("UPDATE rollouts SET state=? WHERE id=?", (data, name))
            if new.status != old.status:
                self.note(name, f"{new.status}{': ' if new.reason else ''}{new.reason}", now)
        return new

    def groups(self) -> dict[str, Group]:
        """Read every group, by its name."""
        rows = self._rows("SELECT key, value FROM settings WHERE key LIKE 'group/%' ORDER BY key")
        return {str(key).removeprefix("group/"): self._parse(str(value).encode(), Group) for key, value in rows}

    def change_group(self, name: str, how: Callable[[Group], Group]) -> Group:
        """Read a group, or begin one, change it and write it, in one transaction."""
        with self.transaction():
            new = how(self.groups().get(name, Group()))
            row = (f"group/{name}", msgspec.json.encode(new).decode())
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", row)
        return new

    def settings(self, prefix: str) -> dict[str, str]:
        """Read the settings whose keys begin with ``prefix``, by what follows it; as ``tags/`` by device."""
        rows = self._rows("SELECT key, value FROM settings WHERE substr(key, 1, length(?1)) = ?1 ORDER BY key", prefix)
        return {str(key).removeprefix(prefix): str(value) for key, value in rows}

    def change_setting(self, key: str, how: Callable[[str], str]) -> str:
        """Read a setting (empty: there is none), change it and write it, in one transaction."""
        with self.transaction():
            new = how(self.settings(key).get("", ""))
            self._db.execute("DELETE FROM settings WHERE key=?", (key,))
            if new:
                self._db.execute("INSERT INTO settings VALUES (?, ?)", (key, new))
        return new

    def note(self, subject: str, text: str, now: float) -> None:
        """Write a line into the diary."""
        with self.transaction():
            self._db.execute("INSERT INTO events (at, subject, text) VALUES (?, ?, ?)", (now, subject, text))
            self._db.execute("DELETE FROM events WHERE seq <= last_insert_rowid() - ?", (REMEMBERED_EVENTS,))

    def events(self, subject: str | None = None, limit: int = 100) -> list[Event]:
        """Read the last lines of the diary, oldest first."""
        query = "SELECT at, subject, text FROM events WHERE ?1 IS NULL OR subject=?1 ORDER BY seq DESC LIMIT ?2"
        return [Event(*row) for row in reversed(self._rows(query, subject, limit))]

    def _refuse_going_back(self, plan: Plan) -> None:
        ahead = [
            d for d in self.devices().values()
            if d.model == plan.model and d.profile in plan.profiles and d.version > plan.version
        ]  # fmt: skip
        if ahead:
            raise UsageError(
                f"{len(ahead)} devices run a newer {plan.model} than version {plan.version} "
                f"({ahead[0].id} runs {ahead[0].version}), and no device ever goes back",
                "publish the old bundle as a new version: edgekit ota publish FLEET BUNDLE",
            )

    def supersede(self, plan: Plan, name: str, now: float) -> None:
        """End the other rollouts of a model that are under way.

        Raises:
            UsageError: one of them is of the same release.
        """
        for old in self.rollouts():
            if (
                old.id == name
                or old.status == "proposed"
                or old.plan.model != plan.model
                or old.status in ("done", "aborted")
            ):
                continue
            if old.plan.version == plan.version and old.status != "halted":
                raise UsageError(
                    f"rollout {old.id} of the same release is {old.status}", "abort it first, or resume it"
                )
            self.change(old.id, lambda r: abort(r, f"superseded by {name}"), now)

    def _migrate(self, name: str) -> None:
        with self.transaction():
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0 and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO settings VALUES ('name', ?)", (name,))
                self._db.execute(f"PRAGMA user_version={VERSION}")
            elif found != VERSION:
                raise ResourceError(f"{self.path} has schema {found}, this edgekit knows {VERSION}", "update edgekit")

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock, self._translated():
            return self._db.execute(query, values).fetchall()

    def _parse(self, data: object, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data if isinstance(data, bytes) else b"", type=kind)
        except (msgspec.DecodeError, UsageError, UnicodeDecodeError) as error:
            raise ResourceError(f"{self.path} holds a damaged {kind.__name__}: {error}", "restore a backup") from error

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "stop other writers" if "locked" in str(error) else "check the disk, or restore a backup"
            raise ResourceError(f"{self.path}: {error}", hint) from error
