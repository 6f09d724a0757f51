"""A disk with a write cache that a power cut empties, spoken to over NBD.

What was written and not yet flushed is lost at the cut, or reaches the disk in part: out of order, as a real one may do
it, in physical sectors of 4 KiB, which flash and hard disks write as one (a smaller one, torn, would break ext4's own
superblock, and no program can help that). Flush and FUA are obeyed. Follows the NBD protocol (fixed newstyle, simple
replies) as far as QEMU needs it. Knows nothing of file systems.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

SECTOR = 4096
OPTION_MAGIC, REPLY_MAGIC = 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, ANSWER_MAGIC = 0x25609513, 0x67446698
EXPORT_NAME, ABORT, INFO, GO = 1, 2, 6, 7
ACK, EXPORT, UNSUPPORTED = 1, 3, (1 << 31) + 1
FLAGS = 1 | 4 | 8
"""The server tells its flags, flushes, and knows FUA."""
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
FUA, INVALID = 1, 22


class Disk:
    """Serves one machine at a time on a socket; ``cut`` returns what is on the disk when the power is gone."""

    def __init__(self, content: bytes, path: Path) -> None:
        self._kept, self._seen = bytearray(content), bytearray(content)
        self._pending: list[tuple[int, bytes]] = []
        self.unflushed = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut(self, share: float, chance: np.random.Generator) -> bytes:
        """Return the disk after its machine died; of what was not flushed a ``share`` of the sectors got there."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "the machine still runs"
        self.unflushed = len(self._pending)
        for offset, data in self._pending:
            first, end = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
            for number in np.flatnonzero(chance.random(end - first) < share):
                low = max(offset, (first + int(number)) * SECTOR)
                high = min(offset + len(data), (first + int(number) + 1) * SECTOR)
                self._kept[low:high] = data[low - offset : high - offset]
        return bytes(self._kept)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self._listener.close()
        with connection, contextlib.suppress(ConnectionError):
            if self._greet(connection):
                while self._answer(connection):
                    pass

    def _greet(self, connection: socket.socket) -> bool:
        """Agree on the one disk there is."""
        connection.sendall(b"NBDMAGIC" + struct.pack(">QH", OPTION_MAGIC, 1 | 2))
        _take(connection, 4)
        while True:
            _, option, length = struct.unpack(">QII", _take(connection, 16))
            _take(connection, length)
            size = struct.pack(">QH", len(self._kept), FLAGS)
            if option == EXPORT_NAME:
                connection.sendall(size)
                return True
            if option in (INFO, GO):
                _reply(connection, option, EXPORT, struct.pack(">H", 0) + size)
                _reply(connection, option, ACK)
            else:
                _reply(connection, option, ACK if option == ABORT else UNSUPPORTED)
            if option in (GO, ABORT):
                return option == GO

    def _answer(self, connection: socket.socket) -> bool:
        _, flags, kind, handle, offset, length = struct.unpack(">IHHQQI", _take(connection, 28))
        data, error = b"", 0
        if kind == READ:
            data = bytes(self._seen[offset : offset + length])
        elif kind == WRITE:
            self._write(offset, _take(connection, length), at_once=bool(flags & FUA))
        elif kind == FLUSH:
            self._flush()
        elif kind == DISCONNECT:
            return False
        else:
            error = INVALID
        connection.sendall(struct.pack(">IIQ", ANSWER_MAGIC, error, handle) + data)
        return True

    def _write(self, offset: int, data: bytes, *, at_once: bool) -> None:
        self._seen[offset : offset + len(data)] = data
        if at_once:
            self._kept[offset : offset + len(data)] = data
        else:
            self._pending.append((offset, data))

    def _flush(self) -> None:
        for offset, data in self._pending:
            self._kept[offset : offset + len(data)] = data
        self._pending.clear()


def _reply(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    connection.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data)


def _take(connection: socket.socket, length: int) -> bytes:
    taken = bytearray()
    while len(taken) < length:
        piece = connection.recv(length - len(taken))
        if not piece:
            raise ConnectionError("the machine is gone")
        taken += piece
    return bytes(taken)
