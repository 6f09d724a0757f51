"""Some kills of `benchmarks/crash.py`: by strace, before any system call that changes the disk, not only Python's."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _tracing
import _updates
import crash

pytestmark = pytest.mark.skipif(bool(_tracing.lacking()), reason=_tracing.lacking() or "strace is here")


@pytest.mark.slow
@pytest.mark.parametrize("prepare", _updates.KINDS, ids=lambda prepare: prepare.__name__)
def test_an_update_killed_before_a_system_call_leaves_a_whole_bundle_and_completes(prepare, tmp_path):
    rows = crash.matrix(prepare(tmp_path, 1 << 20), tmp_path, sample=5, twice=1)
    assert [row.what for row in rows if not row.holds] == []
    assert len(rows) == 3


def test_every_call_that_changes_a_folder_is_seen_and_one_of_another_process_too(tmp_path):
    folder = tmp_path / "folder"

    def work():
        folder.mkdir()
        (folder / "a").write_bytes(b"1")
        (folder / "a").rename(folder / "b")
        return subprocess.run(["touch", str(folder / "c")], check=True).returncode

    trace = _tracing.watch(work, folder, tmp_path / "log")
    assert [(call.name, call.paths) for call in trace.changes] == [
        ("mkdir", ("",)),
        ("openat", ("a",)),
        ("write", ("a",)),
        ("rename", ("a", "b")),
    ]
    assert trace.foreign >= 1
    assert not trace.unknown


def test_what_a_try_out_writes_into_its_own_room_is_no_change_of_the_device(tmp_path):
    folder = tmp_path / "folder"
    (folder / "try-out").mkdir(parents=True)

    def work():
        return subprocess.run(["touch", str(folder / "try-out" / "c")], check=True).returncode

    assert _tracing.watch(work, folder, tmp_path / "log").foreign == 0


def test_a_kill_takes_place_before_its_call(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    def work():
        (folder / "a").write_bytes(b"1")
        (folder / "a").rename(folder / "b")
        return 0

    calls = _tracing.watch(work, folder, tmp_path / "log").changes
    (folder / "b").unlink()
    left = []
    for call in calls:
        assert _tracing.kill(work, call, folder, tmp_path / "log")
        left.append({path.name: path.read_bytes() for path in folder.iterdir()})
        for path in folder.iterdir():
            path.unlink()
    assert left == [{}, {"a": b""}, {"a": b"1"}]


def test_a_shared_mapping_that_may_be_written_is_not_covered_and_said(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1234")

    def work():
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 4) as mapped:
            mapped[0:1] = b"2"
        return 0

    assert _tracing.watch(work, tmp_path, tmp_path.parent / "log").unknown == {"mmap"}
