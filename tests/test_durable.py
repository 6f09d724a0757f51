"""Writes that survive anything: a process killed at every single system call leaves old or new, never half."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.durable import new_folder, write_file

KILLER = """
import os, shutil, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
budget = int(sys.argv[2])
def deadly(function):
    def call(*arguments, **settings):
        global budget
        if budget == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        budget -= 1
        return function(*arguments, **settings)
    return call
from edgekit.durable import new_folder, write_file
import tempfile
for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open", "chmod"):
    setattr(os, name, deadly(getattr(os, name)))
target = Path(sys.argv[1])
"""
WRITE_FILE = KILLER + "write_file(target, b'new' * 1000)\nprint('done')"
WRITE_FOLDER = (
    KILLER
    + "with new_folder(target) as scratch:\n"
    + "    for name in 'ab': (scratch / name).write_bytes(b'new')\nprint('done')"
)
MANY = 200


def killed_at_every_call(script, target):
    """Run the script once for each system call it makes, killed there; yield after each, and after a whole run."""
    for budget in range(MANY):
        done = subprocess.run(
            [sys.executable, "-c", script, str(target), str(budget)], capture_output=True, check=False
        )
        yield budget
        if done.returncode == 0:
            assert done.stdout == b"done\n"
            return
        assert done.returncode == -9, done.stderr
    pytest.fail("the script makes more calls than the test allows for")


def test_a_kill_leaves_the_old_or_the_new_file(tmp_path):
    target = tmp_path / "state.json"
    seen = set()
    target.write_bytes(b"old" * 1000)
    for _ in killed_at_every_call(WRITE_FILE, target):
        content = target.read_bytes()
        assert content in (b"old" * 1000, b"new" * 1000)
        seen.add(content)
        target.write_bytes(b"old" * 1000)
    assert len(seen) == 2


def test_a_kill_leaves_the_old_folder_or_the_new_or_none_but_never_half(tmp_path):
    target = tmp_path / "bundle"
    states = []
    for _ in killed_at_every_call(WRITE_FOLDER, target):
        found = {path.name: path.read_bytes() for path in target.iterdir()} if target.exists() else None
        assert found in (None, {"old": b"old"}, {"a": b"new", "b": b"new"})
        states.append(found)
        with new_folder(target) as scratch:
            (scratch / "old").write_bytes(b"old")
        assert list(tmp_path.iterdir()) == [target], "what killed runs left behind is swept"
    assert states[-1] == {"a": b"new", "b": b"new"}
    assert {"old": b"old"} in states


def test_of_two_that_write_the_same_folder_neither_loses_its_work_and_the_last_one_stays(tmp_path):
    target = tmp_path / "bundle"
    with new_folder(target) as first:
        (first / "one").write_text("one")
        with new_folder(target) as second:
            (second / "two").write_text("two")
        assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in target.iterdir()] == ["one"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_inside_leaves_the_old_folder_and_no_litter(tmp_path):
    target = tmp_path / "bundle"
    with new_folder(target) as scratch:
        (scratch / "old").write_text("old")
    with pytest.raises(IsADirectoryError), new_folder(target) as scratch:  # noqa: PT012  # half-way is the point
        (scratch / "half").write_text("half")
        scratch.read_bytes()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = tmp_path / "state"
    target.write_bytes(b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_secret_is_written_with_its_mode_from_the_first_moment(tmp_path):
    write_file(tmp_path / "deep" / "key", b"secret", 0o600)
    assert stat.S_IMODE((tmp_path / "deep/key").stat().st_mode) == 0o600


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    target = tmp_path / "bundle"
    with pytest.raises(OSError, match="No space"), new_folder(target), Path("/dev/full").open("wb") as file:
        file.write(b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_new_name_is_on_the_disk_before_the_write_counts_as_done(tmp_path, monkeypatch):
    steps = []

    def watched(name):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, **k: (steps.append(name), real(*a, **k))[1])

    for name in ("fsync", "replace", "rename"):
        watched(name)
    write_file(tmp_path / "state", b"new")
    renamed = max(i for i, step in enumerate(steps) if step != "fsync")
    assert "fsync" in steps[:renamed]
    assert "fsync" in steps[renamed:]
