"""A file that takes over the engine which opens it crashes, eats, forks, writes, spies and phones in vain."""

import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fakes import bundles, engine_files, engines
from fakes.fleets import eventually

from edgekit import bundle
from edgekit.errors import HealthError, ResourceError, Unrunnable
from edgekit.manifest import Golden, Manifest
from edgekit.runtime import acceptance, memory
from edgekit.runtime.acceptance import Allowance, try_out
from edgekit.runtime.sandbox import FILE_MIB, calls, landlock, warden

pytestmark = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")


@pytest.fixture(autouse=True)
def hostile_engine(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("COVERAGE")]:
        monkeypatch.delenv(name)  # it could not write what it measured
    engines.install(tmp_path / "site", monkeypatch)


def run(tmp_path, code, allowed=None):
    """Try a bundle out whose file runs that code, and return the figures."""
    made = engines.sealed(tmp_path / "bundle", engines.CODE + code)
    return try_out(made.folder, "any", 1, allowed or Allowance(30.0))


def stopped(tmp_path, code, told, allowed=None):
    with pytest.raises(HealthError, match=told) as caught:
        run(tmp_path, code, allowed)
    return caught.value


def test_a_file_that_does_no_harm_passes(tmp_path):
    assert run(tmp_path, "x = 1")["peak_rss_mib"] > 5


@pytest.mark.parametrize("place", ["outside", "bundle", "home"])
def test_it_writes_nowhere_but_into_its_own_scratch(tmp_path, place):
    folder = {"outside": tmp_path, "bundle": tmp_path / "bundle", "home": Path.home()}[place]
    target = folder / "planted-by-a-model"
    stopped(tmp_path, f"open({str(target)!r}, 'w')", "Permission denied")
    assert not target.exists()
    run(tmp_path, "import tempfile; tempfile.NamedTemporaryFile().write(b'x' * 1000)")


def test_it_changes_and_removes_no_file_that_is_there(tmp_path):
    mine = tmp_path / "state.json"
    mine.write_text("{}")
    for deed in (
        "unlink(p)",
        "truncate(p, 0)",
        "chmod(p, 0o777)",
        "rename(p, p + 'x')",
        "link(p, p + 'x')",
        "utime(p)",
    ):
        stopped(tmp_path, f"import os; p = {str(mine)!r}; os.{deed}", "not permitted|Permission denied|cross-device")
    assert (mine.read_text(), oct(mine.stat().st_mode)[-3:]) == ("{}", "644")


def test_it_reads_no_secret_of_the_device_nor_of_the_agent(tmp_path, monkeypatch):
    secret = tmp_path / "device.key"
    secret.write_text("-----BEGIN PRIVATE KEY-----")
    stopped(tmp_path, f"open({str(secret)!r}).read()", "Permission denied")
    for file in ("mem", "environ", "maps", "cmdline"):
        stopped(tmp_path, f"import os; open(f'/proc/{{os.getppid()}}/{file}', 'rb').read(10)", "Permission denied")
    stopped(tmp_path, "open('/etc/shadow').read()", "Permission denied")


def test_it_reaches_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        stopped(tmp_path, f"import socket; socket.create_connection(('127.0.0.1', {port}))", "not permitted")
        for family in ("AF_UNIX", "AF_NETLINK", "AF_INET6"):
            stopped(tmp_path, f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)", "not permitted")
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "deed", ["os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])"]
)
def test_a_fork_bomb_has_no_first_child(tmp_path, deed):
    stopped(tmp_path, f"import os\nwhile True: {deed}", "not permitted")


def test_threads_are_no_processes(tmp_path):
    run(tmp_path, "import threading; t = threading.Thread(target=int); t.start(); t.join()")


def test_it_kills_nobody(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as victim:
        for deed in (f"kill({victim.pid}, 9)", "kill(os.getppid(), 9)", "killpg(os.getpgid(os.getppid()), 9)"):
            stopped(tmp_path, f"import os; os.{deed}", "not permitted")
        tgkill = calls.NUMBERS[platform.machine()].tgkill
        run(tmp_path, f"import ctypes; ctypes.CDLL(None).syscall({tgkill}, {victim.pid}, {victim.pid}, 9)")
        assert victim.poll() is None
        victim.kill()


def test_it_does_not_take_its_limits_back(tmp_path):
    raises = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    stopped(tmp_path, raises, "not permitted|not allowed")


def test_it_fills_no_disk(tmp_path):
    code = f"import tempfile; f = tempfile.NamedTemporaryFile(); f.write(bytes({FILE_MIB + 1} << 20)); f.flush()"
    stopped(tmp_path, code, "File too large")


FILLING = {
    "many files": "n = 0\nwhile True: n += 1; open(f'{t}/{n}', 'wb').write(bytes(1 << 20))",
    "many empty files": "n = 0\nwhile True: n += 1; open(f'{t}/{n}', 'wb')",
    "files without a name": "held = []\nwhile True: held += [tempfile.TemporaryFile()]; held[-1].write(bytes(1 << 22))",
    "folders without an end": "os.chdir(t)\nwhile True: os.mkdir('d'); os.chdir('d')",
}


@pytest.mark.parametrize("code", FILLING.values(), ids=FILLING)
def test_it_fills_no_disk_by_many_files_either_and_leaves_none_behind(tmp_path, code):
    place = tmp_path / "state" / "try-out"
    code = f"import os, tempfile; t = tempfile.gettempdir()\nassert t.startswith({str(place)!r})\n{code}"
    stopped(tmp_path, code, "bundle wrote more than the 64 MiB that it may", Allowance(60.0, place=place))
    assert list((tmp_path / "state").iterdir()) == []


def test_what_is_seen_by_the_disk_alone_is_ended_before_it_is_full_and_is_no_fault_of_the_release(
    tmp_path, monkeypatch
):
    free = iter([100 << 20, 60 << 20])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=next(free, 15 << 20)))
    hides = (
        "import mmap, tempfile, time\n"
        "with tempfile.TemporaryFile() as f: f.write(bytes(1 << 20)); f.flush(); m = mmap.mmap(f.fileno(), 0)"
    )
    with pytest.raises(ResourceError, match="the disk ran full while bundle was tried out"):
        run(tmp_path, f"{hides}\ntime.sleep(60)")


def test_what_a_killed_agents_try_out_left_goes_with_the_next_one(tmp_path):
    place = tmp_path / "try-out"
    (place / "edgekit-try-left").mkdir(parents=True)
    (place / "edgekit-try-left/cache").write_bytes(b"x")
    (place / "edgekit-try-left/cache").with_name("link").symlink_to(tmp_path)
    (tmp_path / "mine").write_text("kept")
    with warden.scratch(place) as scratch:
        assert list(place.iterdir()) == [scratch]
    assert not place.exists()
    assert (tmp_path / "mine").read_text() == "kept"


def test_it_takes_no_core_for_itself_alone(tmp_path):
    """As root it would get real time, and nobody else that core any more."""
    for deed in ("sched_setscheduler(0, os.SCHED_FIFO, p)", "sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))"):
        stopped(tmp_path, f"import os; p = os.sched_param(1); os.{deed}", "Operation not permitted")
    number = {"x86_64": 314, "aarch64": 274}[platform.machine()]  # sched_setattr, with the attributes it has
    reads = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); a = (ctypes.c_char * 48)(48)"
    sets = f"assert libc.syscall({number}, 0, a, 0) == -1; raise OSError(ctypes.get_errno(), 'sched_setattr')"
    stopped(tmp_path, f"{reads}\n{sets}", r"\[Errno 1\]")


def test_output_without_an_end_fills_no_memory_and_no_disk(tmp_path):
    before = memory.rss_mib()
    stopped(tmp_path, "import os\nwhile True: os.write(1, b'x' * 65536)", "File too large")
    assert memory.rss_mib() < before + 20


LIES = {
    "many figures": '{"measured": {' + ",".join(f'"f{n}": 1' for n in range(17)) + "}}",
    "an odd figure": '{"measured": {"<script>": 1}}',
    "a long text": '{"kind": "HealthError", "message": "' + "x" * 4001 + '"}',
    "depth": "[" * 10_000,
    "no text": "\udcff",
}


@pytest.mark.parametrize("said", LIES.values(), ids=LIES)
def test_what_it_says_in_the_place_of_the_judge_is_bounded(tmp_path, said):
    data = said.encode(errors="surrogateescape")
    stopped(tmp_path, f"import os; os.write(1, {data!r}); os._exit(0)", "the try-out ended with exit code 0")


@pytest.mark.parametrize(
    "eat",
    ["held.append(bytearray(1 << 22))", "held.append(mmap.mmap(-1, 1 << 22)); held[-1].write(b'x' * (1 << 22))"],
    ids=["of its own", "shared"],
)
def test_a_memory_eater_is_stopped_at_what_it_may_have(tmp_path, eat):
    error = stopped(
        tmp_path, f"import mmap; held = []\nwhile True: {eat}", "more memory than the 150 MiB", Allowance(30.0, 150.0)
    )
    assert 150 < error.measured["peak_rss_mib"] < 400


HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
FOR_THREADS = {"clone", "clone3", "tgkill", "prlimit64"}
NEVER = {
    "execve",
    "execveat",
    "socket",
    "kill",
    "ptrace",
    "memfd_create",
    "mount",
    "bpf",
    "unshare",
    "setrlimit",
    "sched_setscheduler",
    "sched_setparam",
    "sched_setattr",
    "ioprio_set",
    "reboot",
}


@pytest.mark.parametrize("machine", sorted(calls.NUMBERS))
def test_the_numbers_of_the_filter_are_the_kernels(machine):
    header = Path("/usr/include") / HEADERS[machine]
    if not header.exists():
        pytest.skip(f"the kernel's headers are not installed: {header}")
    names = {int(n): name for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())}
    mine = calls.NUMBERS[machine]
    assert {names[n] for n in (mine.clone, mine.clone3, mine.tgkill, mine.prlimit)} == FOR_THREADS
    refused = {names.get(number, "newer") for number in mine.refused}
    assert refused >= NEVER
    needed = {"read", "write", "openat", "mmap", "mprotect", "munmap", "futex", "exit_group", "rt_sigaction", "ioctl"}
    assert not refused & (needed | FOR_THREADS)


def test_what_is_only_reserved_is_bounded_too(tmp_path):
    reserve = "import mmap; held = [mmap.mmap(-1, 1 << 30, mmap.MAP_PRIVATE) for _ in range(8)]"
    stopped(tmp_path, reserve, "Cannot allocate memory", Allowance(30.0, 150.0))


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "while True: pass"], ids=["sleeps", "computes"])
def test_one_that_never_ends_is_ended(tmp_path, code):
    started = time.monotonic()
    stopped(tmp_path, code, "did not finish its golden samples in 2 s", Allowance(2.0))
    assert time.monotonic() - started < 20


def test_a_crash_and_an_unknown_instruction_are_told_apart(tmp_path):
    crash = stopped(tmp_path, "import ctypes; ctypes.string_at(0)", "crashed on bundle with SIGSEGV")
    assert not isinstance(crash, Unrunnable)
    illegal = stopped(tmp_path, "import signal; signal.raise_signal(signal.SIGILL)", "lacks an instruction")
    assert isinstance(illegal, Unrunnable)


def is_alive(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_what_is_left_of_a_process_ends_with_it(tmp_path):
    """Where no filter holds a process back, its children still go when it goes."""
    pid = tmp_path / "pid"
    code = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid))"
    assert warden.run([sys.executable, "-c", code], os.environ, seconds=30.0).code == 0
    eventually(lambda: not is_alive(int(pid.read_text())))


def test_a_real_engine_runs_shut_in_and_costs_no_figure(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    inside, outside = (try_out(tmp_path / "b", "x86-64", 2, Allowance(is_shut_in=shut)) for shut in (True, False))
    assert inside["sqnr_db"] == outside["sqnr_db"] > 100


def test_where_the_kernel_lacks_something_the_log_says_so_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "site/sitecustomize.py").write_text(
        "import platform\nplatform.machine = lambda: 'vax'\n"
        "from edgekit.runtime.sandbox import landlock\nlandlock.version = lambda: 0\n"
    )
    acceptance._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(tmp_path, "open('/dev/null', 'w')")
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "the kernel has no Landlock" in told[0]
    assert "no filter for vax" in told[1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "tflite", "openvino", "executorch", "tensorrt"])
def test_every_engine_runs_shut_in(tmp_path, engine):
    pytest.importorskip(
        {"onnx": "onnxruntime", "tflite": "ai_edge_litert", "tensorrt": "onnxruntime"}.get(engine, engine)
    )
    (tmp_path / "made").mkdir()
    one = engine_files.write(engine, tmp_path / "made")
    made = tuple(path.name for path in (tmp_path / "made").iterdir())
    x = np.ones((1, 3), np.float32)
    manifest = Manifest(
        name="double",
        version="1",
        task="tensor",
        inputs=engine_files.CONTRACT.inputs,
        outputs=engine_files.CONTRACT.outputs,
        variants=(msgspec.structs.replace(one, name="any", files=made),),
        golden=Golden(inputs={"image": "x.npy"}, outputs={"scores": "y.npy"}),
        files=(),
    )
    golden = {"x.npy": bundles.npy(x), "y.npy": bundles.npy(x @ engine_files.WEIGHTS)}
    bundle.seal(tmp_path / "b", manifest, {**golden, **{path: tmp_path / "made" / path for path in made}})
    assert try_out(tmp_path / "b", "any")["sqnr_db"] > 40
