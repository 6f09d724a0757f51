"""The fleet's memory, in SQLite or PostgreSQL: a kill leaves the last whole transaction. Decides nothing.

Bound to one fleet: no row of another is read or written. Devices are written by the service alone; rollouts also by
the command line, so each change of one is read, made and written inside one transaction. What an operator changes goes
into the audit log with it.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from edgekit.errors import ResourceError, UnknownName, UsageError
from edgekit.ota.messages import Desired, Identifier
from edgekit.ota.server import queries
from edgekit.ota.server.audit import EMPTY, Deed, Entry, Head, follow
from edgekit.ota.server.database import Database
from edgekit.ota.server.fleet import DeviceState
from edgekit.ota.server.plan import told
from edgekit.ota.server.rollout import Rollout, abort, begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import sqlalchemy as sa

    from edgekit.ota.server.plan import Plan

T = TypeVar("T")
REMEMBERED_REPORTS = 1000
REMEMBERED_EVENTS = 100_000
"""So much is kept of what devices say, for a device that floods must not fill the server's disk."""
_ACTIONS = {"paused": "pause", "running": "resume", "aborted": "abort"}


class Event(NamedTuple):
    """A line of the fleet's diary: when, about which rollout or device, what."""

    at: float
    subject: str
    text: str


class Lease(NamedTuple):
    """What somebody has until some time, and the number that grows with each holder."""

    holder: str
    epoch: int
    until: float


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Devices that may hear what the group is to run, and that wish; for what no rollout has reached yet."""

    members: tuple[Identifier, ...] = ()
    wish: Desired | None = None


class Store:
    """A fleet in an open database; safe from several threads and several processes."""

    def __init__(
        self, place: Path | str, name: str = "fleet", *, who: str = "", clock: Callable[[], float] | None = None
    ) -> None:
        """Open a file of SQLite or a URL of PostgreSQL, and make the fleet if it is not there.

        A file has one fleet, whose name was given when it was made. ``who`` is the operator in whose name changes are
        made, for the audit log; empty for the service itself. ``clock`` replaces the database's own.

        Raises:
            UsageError: a URL that is none of SQLite or PostgreSQL.
            ResourceError: it is no database of edgekit, damaged, cannot be reached, or written by a newer edgekit.
        """
        self.database = Database(place, clock)
        self.path = Path(place) if isinstance(place, Path) or "://" not in place else None
        self.who = who
        self._sql = queries.of(self.database.kind)
        self._notes: list[dict[str, Any]] = []
        try:
            self._name = self._settle(name)
        except BaseException:
            self.database.close()
            raise
        self.database.bind(self._name)

    @property
    def name(self) -> str:
        """The fleet's name in topics; given once, when the database was made."""
        return self._name

    def close(self) -> None:
        """Close the database; later calls are errors."""
        self.database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes inside the block visible at once, or none; other writers wait."""
        with self.database.lock():
            is_outermost = not self.database.is_in_transaction
            try:
                with self.database.transaction(self._write_notes):
                    yield
            except BaseException:
                if is_outermost:
                    self._notes.clear()
                raise

    def now(self) -> float:
        """Return the time that all who share the database agree on."""
        return self.database.now()

    def devices(self) -> dict[str, DeviceState]:
        """Read every device, by its name."""
        return {str(row.id): self._parse(row.state, DeviceState) for row in self._rows(self._sql.devices)}

    def news(self, since: int) -> tuple[int, dict[str, DeviceState]]:
        """Read the devices that were written after a stamp, and the stamp to ask with next time; 0: all."""
        rows = self._rows(self._sql.news, since=since)
        return max([since, *(row.stamp for row in rows)]), {
            str(row.id): self._parse(row.state, DeviceState) for row in rows
        }

    def save_devices(self, states: Iterable[DeviceState]) -> int:
        """Write the devices that changed; returns their stamp, which is above all before."""
        states = list(states)
        with self.transaction():
            stamp = int(self._rows(self._sql.stamp)[0][0]) + (1 if states else 0)
            self._run(
                self._sql.save_device,
                [{"id": one.id, "stamp": stamp, "state": msgspec.json.encode(one)} for one in states],
            )
        return stamp

    def remember(self, device: str, payload: bytes, now: float) -> bool:
        """Keep a report, the last thousand of a device; false when the same bytes came from that device before."""
        return self.remember_all([(device, payload)], now)[0]

    def remember_all(self, reports: Sequence[tuple[str, bytes]], now: float) -> list[bool]:
        """Keep reports of devices as `remember` does each, in few statements; says of each whether it is new."""
        keys = [(device, hashlib.sha256(payload).digest()) for device, payload in reports]
        if not keys:
            return []
        with self.transaction():
            found = self._rows(self._sql.known_reports, keys=list(set(keys)))
            known = {(str(row.device), bytes(row.digest)) for row in found}
            is_new, rows = [], []
            for key, (device, payload) in zip(keys, reports, strict=True):
                is_new.append(key not in known)
                if key not in known:
                    known.add(key)
                    rows.append({"device": device, "digest": key[1], "at": now, "payload": payload})
            self._run(self._sql.add_report, rows)
            talkers = sorted({str(row["device"]) for row in rows})
            self._run(self._sql.forget_reports, [{"of": device, "most": REMEMBERED_REPORTS} for device in talkers])
        return is_new

    def reports(self, device: str) -> list[bytes]:
        """Read the reports of one device, oldest first."""
        return [bytes(row.payload) for row in self._rows(self._sql.reports, of=device)]

    def rollouts(self) -> list[Rollout]:
        """Read every rollout in the order they were started."""
        return [self._parse(row.state, Rollout) for row in self._rows(self._sql.rollouts)]

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
            self._run(self._sql.add_rollout, {"id": name, "state": msgspec.json.encode(rollout)})
            verb = "proposed" if rollout.status == "proposed" else "started"
            self.note(name, f"{verb}, waves {told(plan)}", now)
            self.audit(
                "rollout.propose" if rollout.status == "proposed" else "rollout.start",
                name,
                {"plan": msgspec.to_builtins(plan)},
                now,
            )
        return rollout

    def change(self, name: str, how: Callable[[Rollout], Rollout], now: float) -> Rollout:
        """Read a rollout, change it and write it, in one transaction; a change of status goes into the diary."""
        with self.transaction():
            old = self.rollout(name)
            new = how(old)
            if new != old:
                self._run(self._sql.change_rollout, {"of": name, "now": msgspec.json.encode(new)})
            if new.status != old.status:
                self.note(name, f"{new.status}{': ' if new.reason else ''}{new.reason}", now)
            if new != old:
                action = _ACTIONS.get(new.status, "change") if new.status != old.status else "change"
                details = {"before": old.status, "after": new.status, "reason": new.reason}
                self.audit(f"rollout.{action}", name, details, now)
        return new

    def groups(self) -> dict[str, Group]:
        """Read every group, by its name."""
        rows = self._rows(self._sql.groups)
        return {str(row.key).removeprefix("group/"): self._parse(str(row.value).encode(), Group) for row in rows}

    def change_group(self, name: str, how: Callable[[Group], Group]) -> Group:
        """Read a group, or begin one, change it and write it, in one transaction."""
        with self.transaction():
            old = self.groups().get(name, Group())
            new = how(old)
            self._run(self._sql.set, {"key": f"group/{name}", "value": msgspec.json.encode(new).decode()})
            if new != old:
                self.audit(
                    "group.change", name, {"before": msgspec.to_builtins(old), "after": msgspec.to_builtins(new)}
                )
        return new

    def leases(self) -> dict[str, Lease]:
        """Read who has what, by its name."""
        return {str(row.name): Lease(row.holder, row.epoch, row.until) for row in self._rows(self._sql.leases)}

    def lease(self, name: str, holder: str, epoch: int, until: float) -> None:
        """Write who has something; who may have it is `Post`'s business."""
        self._run(self._sql.set_lease, {"name": name, "holder": holder, "epoch": epoch, "until": until})

    def release(self, name: str) -> None:
        """Forget who had something."""
        self._run(self._sql.drop_lease, {"of": name})

    def settings(self, prefix: str) -> dict[str, str]:
        """Read the settings whose keys begin with ``prefix``, by what follows it; as ``tags/`` by device."""
        rows = self._rows(self._sql.settings, prefix=prefix, length=len(prefix))
        return {str(row.key).removeprefix(prefix): str(row.value) for row in rows}

    def change_setting(self, key: str, how: Callable[[str], str]) -> str:
        """Read a setting (empty: there is none), change it and write it, in one transaction."""
        with self.transaction():
            old = self.settings(key).get("", "")
            new = how(old)
            self._run(self._sql.unset, {"of": key})
            if new:
                self._run(self._sql.set, {"key": key, "value": new})
            if new != old:
                self.audit("setting.change", key, {"before": old, "after": new})
        return new

    def note(self, subject: str, text: str, now: float) -> None:
        """Write a line into the diary."""
        with self.transaction():
            # PostgreSQL keeps no NUL in texts, and a device may write one: it must not stop all others.
            self._notes.append({"at": now, "subject": subject, "text": text.replace("\0", "\N{REPLACEMENT CHARACTER}")})

    def events(self, subject: str | None = None, limit: int = 100) -> list[Event]:
        """Read the last lines of the diary, oldest first."""
        with self.database.lock():
            self._write_notes()
            query = self._sql.events if subject is None else self._sql.events_of
            rows = self._rows(query, limit=limit, **({} if subject is None else {"of": subject}))
        return [Event(row.at, row.subject, row.text) for row in reversed(rows)]

    def audit(self, action: str, subject: str, details: dict[str, Any] | None = None, now: float | None = None) -> None:
        """Write into the audit log what the operator did; nothing where the service itself did it."""
        if not self.who:
            return
        with self.transaction():
            rows = self._rows(self._sql.audit_head)
            head = Head(rows[0].seq, rows[0].hash) if rows else EMPTY
            at = self.now() if now is None else now
            entry = follow(self._name, head, Deed(at, self.who, action, subject, details or {}))
            self._run(self._sql.add_audit, {**msgspec.structs.asdict(entry)})
            self._run(self._sql.set_audit_head, {"seq": entry.seq, "hash": entry.hash})

    def audited(self) -> tuple[list[Entry], Head]:
        """Read the audit log, oldest first, and the head that is kept beside it."""
        with self.database.lock():
            entries = [Entry(**row._mapping) for row in self._rows(self._sql.audit)]  # noqa: SLF001  # public, for all its underscore
            rows = self._rows(self._sql.audit_head)
        return entries, Head(rows[0].seq, rows[0].hash) if rows else EMPTY

    def _settle(self, name: str) -> str:
        """Return the fleet's name: the file's own, or the one of many that was asked for; make it if it is new."""
        with self.database.transaction():
            known = [str(row[0]) for row in self.database.rows(self._sql.fleets)]
            if self.database.kind == "sqlite" and known:
                return known[0]
            if name not in known:
                self.database.run(self._sql.add_fleet, {"name": name})
        return name

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

    def _write_notes(self) -> None:
        """Write the lines of this transaction at once, and forget as many of the oldest as are too many."""
        notes, self._notes = self._notes, []
        if not notes:
            return
        last = int(self._rows(self._sql.last_event)[0][0])
        self._run(self._sql.add_event, [{"seq": last + number, **note} for number, note in enumerate(notes, 1)])
        self._run(self._sql.forget_events, {"until": last + len(notes) - REMEMBERED_EVENTS})

    def _rows(self, statement: sa.Executable, **values: object) -> Sequence[sa.Row[Any]]:
        return self.database.rows(statement, {"fleet": self._name, **values})

    def _run(self, statement: sa.Executable, values: dict[str, Any] | list[dict[str, Any]]) -> None:
        mine = {"fleet": self._name}
        many = [{**mine, **one} for one in values] if isinstance(values, list) else {**mine, **values}
        self.database.run(statement, many)

    def _parse(self, data: object, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data if isinstance(data, bytes) else b"", type=kind)
        except (msgspec.DecodeError, UsageError, UnicodeDecodeError) as error:
            told = f"{self.database.label} holds a damaged {kind.__name__}: {error}"
            raise ResourceError(told, "restore a backup") from error
