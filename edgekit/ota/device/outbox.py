"""Reports that wait for the broker: bounded, in order, on the disk as soon as they cannot be sent at once.

One file, which grows by whole records and is written anew when most of it is past; what a power cut tore off its end is
cut away. What is sent at once never touches the disk, for flash wears out. Knows bytes, no broker and no message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.durable import write_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

MAX_COUNT = 1000
MAX_BYTES = 256 << 10
"""So many messages, and so many bytes of them, wait at most: ten days of a health every quarter of an hour."""
SLACK_BYTES = 64 << 10
"""The file may hold so many bytes that are past before it is written anew."""
_HEAD = struct.Struct("<IIcQ")  # checksum of what follows; length of the payload; kind; number
_WORD, _NEWS, _SENT, _DROPPED = b"W", b"N", b"S", b"D"


@dataclass(frozen=True)
class Waiting:
    """A message that the broker has not taken. A final word outlives all telemetry; ``number`` gives the order."""

    number: int
    payload: bytes
    is_final: bool


class Outbox:
    """What waits, oldest first; safe from several threads. ``dropped`` counts what had to go for good, over restarts.

    A disk that does not write costs durability, never a message that memory still holds, and never an error.
    """

    def __init__(self, path: Path, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES) -> None:
        self.dropped = 0
        self._path = path
        self._bounds = (max_count, max_bytes)
        self._lock = threading.RLock()
        self._waiting: dict[int, Waiting] = {}
        self._on_disk: set[int] = set()
        self._bytes = 0
        self._next = 1
        self._file_bytes = 0  # -1: its end is not to be trusted
        with self._lock:
            for left in path.parent.glob(f".{path.name}.*"):  # by kills, while it was written anew
                with contextlib.suppress(OSError):
                    left.unlink()
            self._read()
            self._make_room()

    def __len__(self) -> int:
        """Return how many messages wait."""
        return len(self._waiting)

    def put(self, payload: bytes, *, is_final: bool) -> None:
        """Add a message at the end; the oldest telemetry goes where there is no room. A final word is saved at once."""
        with self._lock:
            one = Waiting(self._next, payload, is_final)
            self._next += 1
            self._waiting[one.number] = one
            self._bytes += len(payload)
            self._make_room()
            if is_final:
                self.save()

    def after(self, number: int) -> Waiting | None:
        """Return the oldest message that came later than the one of that number; 0: the oldest of all."""
        with self._lock:
            return next((one for key, one in self._waiting.items() if key > number), None)

    def remove(self, number: int) -> None:
        """Forget a message that the broker has. A power cut may bring it back: everything is sent at least once."""
        with self._lock:
            self._forget(number)
            if number in self._on_disk:
                self._on_disk.discard(number)
                self._append([_record(_SENT, number)], sync=False)

    def save(self) -> None:
        """Bring everything that waits onto the disk, in one write."""
        with self._lock:
            new = [one for key, one in self._waiting.items() if key not in self._on_disk]
            if new:
                self._append([*map(_of, new), _record(_DROPPED, self.dropped)], sync=True)
                if self._file_bytes >= 0:
                    self._on_disk.update(one.number for one in new)

    def _make_room(self) -> None:
        """Drop the oldest telemetry, and where there is none the oldest word."""
        count, size = self._bounds
        while len(self._waiting) > count or self._bytes > size:
            news = (one for one in self._waiting.values() if not one.is_final)
            oldest = next(news, None) or next(iter(self._waiting.values()))
            self._forget(oldest.number)
            self.dropped += 1
            if oldest.number in self._on_disk:
                self._on_disk.discard(oldest.number)
                self._append([_record(_SENT, oldest.number), _record(_DROPPED, self.dropped)], sync=False)

    def _forget(self, number: int) -> None:
        gone = self._waiting.pop(number, None)
        self._bytes -= len(gone.payload) if gone else 0

    def _append(self, records: list[bytes], *, sync: bool) -> None:
        data = b"".join(records)
        if self._file_bytes < 0 or self._file_bytes + len(data) > 2 * self._bytes + SLACK_BYTES:
            self._write_anew()
            return
        try:
            with self._path.open("ab") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            self._file_bytes += len(data)
        except OSError as error:
            self._file_bytes = -1
            log.warning("%s cannot be written, reports wait in memory: %s", self._path, error)

    def _write_anew(self) -> None:
        data = b"".join([_record(_DROPPED, self.dropped), *map(_of, self._waiting.values())])
        try:
            write_file(self._path, data, 0o600)
            self._file_bytes, self._on_disk = len(data), set(self._waiting)
        except OSError as error:
            self._file_bytes = -1
            log.warning("%s cannot be written, reports wait in memory: %s", self._path, error)

    def _read(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s cannot be read, what waited there is lost: %s", self._path, error)
            self._file_bytes = -1
            return
        end = 0
        for kind, number, payload in _records(data):
            end += _HEAD.size + len(payload)
            self._take(kind, number, payload)
        self._file_bytes = end if end == len(data) else -1  # a torn end: written anew before anything is added
        self._on_disk = set(self._waiting)

    def _take(self, kind: bytes, number: int, payload: bytes) -> None:
        if kind == _DROPPED:
            self.dropped = number
        elif kind == _SENT:
            self._forget(number)
        else:
            self._forget(number)
            self._waiting[number] = Waiting(number, payload, kind == _WORD)
            self._bytes += len(payload)
            self._next = max(self._next, number + 1)


def _of(one: Waiting) -> bytes:
    return _record(_WORD if one.is_final else _NEWS, one.number, one.payload)


def _record(kind: bytes, number: int, payload: bytes = b"") -> bytes:
    head = _HEAD.pack(0, len(payload), kind, number)[4:]
    return struct.pack("<I", zlib.crc32(head + payload)) + head + payload


def _records(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield the whole records at the beginning; stop at the first that is none."""
    at = 0
    while at + _HEAD.size <= len(data):
        told, length, kind, number = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if end > len(data) or zlib.crc32(data[at + 4 : end]) != told or kind not in (_WORD, _NEWS, _SENT, _DROPPED):
            return
        yield kind, number, data[at + _HEAD.size : end]
        at = end
