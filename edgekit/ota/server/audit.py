"""Who did what to a fleet, each line bound to all before it by a hash. Does no I/O and reads no clock.

A line that was changed, taken out or moved no longer fits the next one's hash; lines that were cut off the end no
longer fit the head. Whoever can write the database can write a whole new chain: so keep a head elsewhere.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

START = "0" * 64


class Deed(NamedTuple):
    """What an operator did: when, who, what, to which rollout, group, device, key …, and how."""

    at: float
    who: str
    action: str
    subject: str
    details: dict[str, Any]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of the log. ``details`` is JSON; ``previous`` the hash of the line before."""

    seq: int
    at: float
    who: str
    action: str
    subject: str
    details: str
    previous: str
    hash: str


class Head(NamedTuple):
    """The last line: its number and its hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        """Return the head as one word, to be kept elsewhere."""
        return f"{self.seq}:{self.hash}"


EMPTY = Head(0, START)


def follow(fleet: str, head: Head, deed: Deed) -> Entry:
    """Return the line that comes after ``head`` in the log of a fleet."""
    details = msgspec.json.encode(deed.details, order="sorted").decode()
    clean = {name: getattr(deed, name).replace("\0", "\N{REPLACEMENT CHARACTER}") for name in Deed._fields[1:4]}
    entry = Entry(seq=head.seq + 1, at=float(deed.at), **clean, details=details, previous=head.hash, hash="")
    return msgspec.structs.replace(entry, hash=digest(fleet, entry))


def digest(fleet: str, entry: Entry) -> str:
    """Return the hash of a line: over the fleet, every field but the hash, and so over all lines before."""
    fields = [getattr(entry, name) for name in entry.__struct_fields__ if name != "hash"]
    return hashlib.sha256(msgspec.json.encode([fleet, *fields])).hexdigest()


def faults(fleet: str, entries: Sequence[Entry], head: Head, known: Head | None = None) -> list[str]:
    """Say what does not fit in a log; nothing where all is as it was written.

    ``head`` is the one that lies beside the log, ``known`` one that was kept elsewhere, of now or of earlier.
    """
    found = []
    before = EMPTY
    for entry in entries:
        if entry.seq != before.seq + 1:
            found.append(f"line {before.seq + 1} is missing: line {entry.seq} comes next")
        if entry.previous != before.hash:
            found.append(f"line {entry.seq} does not follow the line before it")
        if digest(fleet, entry) != entry.hash:
            found.append(f"line {entry.seq} was changed")
        before = Head(entry.seq, entry.hash)
    if before != head:
        found.append(f"the log ends with line {before.seq}, its head says {head.seq}: lines were cut off or added")
    if known is not None and known not in {EMPTY, *(Head(entry.seq, entry.hash) for entry in entries)}:
        found.append(f"line {known.seq} is not the one whose head was kept: the log was written anew, or cut off")
    return found
