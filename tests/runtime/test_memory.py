"""What memory there is: the system's, within the limits of containers and services."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.runtime import memory

MIB = 1 << 20


def limited(monkeypatch, root, line, limits):
    """Lay out control groups: by their folder, a limit, what is taken, and what of it could be dropped, in MiB."""
    monkeypatch.setattr(memory, "PROC", root / "proc")
    monkeypatch.setattr(memory, "CGROUPS", root / "groups")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpu,cpuacct:/elsewhere\n{line}\n")
    names = memory.FILES_2 if line.startswith("0::") else memory.FILES_1
    for folder, (limit, used, files) in limits.items():
        place = root / "groups" / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / names.limits[0]).write_text(f"{limit * MIB if isinstance(limit, int) else limit}\n")
        (place / names.taken).write_text(f"{used * MIB}\n")
        dropped = "".join(f"{name} {files * MIB // 2}\n" for name in names.dropped)
        (place / "memory.stat").write_text(f"anon 5\n{dropped}")


@pytest.mark.parametrize(
    ("line", "limits", "wanted"),
    [
        ("0::/system.slice/a.service", {"system.slice/a.service": (200, 120, 30)}, (110, 200)),
        ("0::/a/b", {"a/b": ("max", 120, 30), "a": (300, 250, 0), ".": (400, 270, 0)}, (50, 300)),
        ("0::/../host", {".": (64, 60, 10)}, (14, 64)),
        ("9:memory:/docker/x", {"memory/docker/x": (150, 100, 20)}, (70, 150)),
        ("9:memory:/docker/x", {"memory": (150, 100, 20)}, (70, 150)),
    ],
)
def test_the_tightest_limit_counts(monkeypatch, tmp_path, line, limits, wanted):
    monkeypatch.setattr(memory, "_of_system", lambda: 100_000.0)
    limited(monkeypatch, tmp_path, line, limits)
    assert (memory.available_mib(), memory.of_device() / MIB) == wanted
    assert memory.of_device(10) == 10 * MIB


@pytest.mark.parametrize("line", ["0::/a", "9:memory:/a"])
def test_without_a_limit_the_system_counts(monkeypatch, tmp_path, line):
    monkeypatch.setattr(memory, "_of_system", lambda: 100.0)
    limited(monkeypatch, tmp_path, line, {"a": ("max", 1, 0), "memory/a": (1 << 43, 1, 0)})
    assert memory.available_mib() == 100
    assert memory.of_device() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_damaged_or_missing_file_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_of_system", lambda: 100.0)
    limited(monkeypatch, tmp_path, "0::/a/b", {"a/b": (10, 5, 0), "a": (50, 10, 0)})
    (tmp_path / "groups/a/b/memory.stat").write_text("nonsense\n")
    assert memory.available_mib() == 5
    (tmp_path / "groups/a/b/memory.current").write_text("nonsense\n")
    assert memory.available_mib() == 40
    (tmp_path / "groups/a/memory.current").unlink()
    assert memory.available_mib() == 100
    (tmp_path / "proc/self/cgroup").unlink()
    assert memory.available_mib() == 100


@pytest.mark.parametrize("name", [b"a\xff", b"a\x1cb", "a\u2028b".encode(), b"a:b", b"with space"])
def test_a_control_group_may_have_any_name(monkeypatch, tmp_path, name):
    monkeypatch.setattr(memory, "_of_system", lambda: 100.0)
    limited(monkeypatch, tmp_path, "0::/x", {os.fsdecode(name): (50, 10, 0)})
    (tmp_path / "proc/self/cgroup").write_bytes(b"odd\n0::/" + name + b"\n")
    assert memory.available_mib() == 40


def test_a_soft_limit_counts_too(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_of_system", lambda: 100.0)
    limited(monkeypatch, tmp_path, "0::/a", {"a": ("max", 10, 0)})
    (tmp_path / "groups/a/memory.high").write_text(f"{30 * MIB}\n")
    assert memory.available_mib() == 20


def test_a_process_in_a_real_control_group_sees_its_limit():
    base = Path("/sys/fs/cgroup")
    old = (base / "memory").is_dir()
    group = base / ("memory" if old else "") / f"edgekit-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / (memory.FILES_1 if old else memory.FILES_2).limits[0]).write_text(f"{600 * MIB}")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        code = (
            f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            "from edgekit.runtime import memory; print(memory.of_device() >> 20, memory.available_mib())"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    finally:
        group.rmdir()
    device, available = done.stdout.split()
    assert int(device) == 600
    assert 400 < float(available) < 600
