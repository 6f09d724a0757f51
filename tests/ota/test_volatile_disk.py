"""The disk of `benchmarks/power.py` forgets at a cut exactly what was not flushed, sector by sector."""

import socket
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _disk

SIZE, SECTOR = 1 << 20, _disk.SECTOR
OLD, NEW = b"\0" * SECTOR, b"\1" * SECTOR


class Machine:
    """The other end of the socket, as far as QEMU speaks it."""

    def __init__(self, path):
        self.disk = _disk.Disk(bytes(SIZE), path)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        assert self._take(18)[:8] == b"NBDMAGIC"
        self._socket.sendall(struct.pack(">IQII", 3, _disk.OPTION_MAGIC, 8, 0))  # structured replies: refused
        assert struct.unpack(">QIII", self._take(20))[2] == _disk.UNSUPPORTED
        self._socket.sendall(struct.pack(">QII", _disk.OPTION_MAGIC, _disk.GO, 6) + struct.pack(">IH", 0, 0))
        _, _, kind, length = struct.unpack(">QIII", self._take(20))
        assert (kind, struct.unpack(">HQH", self._take(length))[1]) == (_disk.EXPORT, SIZE)
        assert struct.unpack(">QIII", self._take(20))[2] == _disk.ACK

    def ask(self, kind, offset=0, data=b"", *, length=0, flags=0):
        head = struct.pack(">IHHQQI", _disk.REQUEST_MAGIC, flags, kind, 7, offset, length or len(data))
        self._socket.sendall(head + data)
        magic, error, handle = struct.unpack(">IIQ", self._take(16))
        assert (magic, handle) == (_disk.ANSWER_MAGIC, 7)
        return error or self._take(length)

    def cut(self, share):
        self._socket.close()
        left = self.disk.cut(share, np.random.default_rng(1))
        return [left[start : start + SECTOR] for start in range(0, SIZE, SECTOR)]

    def _take(self, length):
        return _disk._take(self._socket, length)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "disk")


def test_what_was_flushed_or_forced_stays_and_the_rest_is_lost(machine):
    machine.ask(_disk.WRITE, 0, NEW)
    machine.ask(_disk.FLUSH)
    machine.ask(_disk.WRITE, SECTOR, NEW)
    machine.ask(_disk.WRITE, 2 * SECTOR, NEW, flags=_disk.FUA)
    assert machine.ask(_disk.READ, SECTOR, length=SECTOR) == NEW, "the machine reads what it wrote"
    assert machine.cut(0.0)[:4] == [NEW, OLD, NEW, OLD]
    assert machine.disk.unflushed == 1


def test_a_cache_that_is_kept_loses_nothing(machine):
    machine.ask(_disk.WRITE, SECTOR, NEW)
    assert machine.cut(1.0)[:3] == [OLD, NEW, OLD]


def test_a_write_may_reach_the_disk_in_part(machine):
    machine.ask(_disk.WRITE, 0, NEW * 100)
    kept = machine.cut(0.5).count(NEW)
    assert 20 < kept < 80


def test_less_than_a_sector_is_written_whole_or_not_wherever_it_begins(machine):
    piece = b"\1" * 1024
    for number in range(40):
        machine.ask(_disk.WRITE, number * SECTOR + 1024, piece)
    left = machine.cut(0.5)
    assert {one[1024:2048] for one in left[:40]} == {piece, bytes(1024)}
    assert all(one[:1024] + one[2048:] == bytes(SECTOR - 1024) for one in left)


def test_what_it_does_not_know_it_refuses(machine):
    assert machine.ask(4) == _disk.INVALID
