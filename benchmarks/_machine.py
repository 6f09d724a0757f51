"""A small Linux machine under QEMU: Debian's kernel, this Python and what the agent needs of it, all in memory.

Booted once, frozen when it is ready, thawed as often as wanted, each time with another disk; or booted from cold. Knows
what it runs (`_guest.py`), not what that means.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import edgekit

if TYPE_CHECKING:
    from collections.abc import Iterator

EMULATOR, KERNEL_PACKAGE = "qemu-system-x86_64", "linux-image-cloud-amd64"
PROGRAMS = {EMULATOR: "qemu-system-x86", "mkfs.ext4": "e2fsprogs", "dpkg-deb": "dpkg", "ldd": "libc-bin"}
DISTRIBUTIONS = ("click", "msgspec", "numpy", "tuf", "securesystemslib", "urllib3", "cryptography", "cffi")
OPTIONAL = ("zstandard",)
"""Of deltas."""
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
NEEDLESS = {
    "test",
    "tests",
    "test_data",
    "idlelib",
    "tkinter",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "lib2to3",
}
MEMORY_MIB = 768
KVM_SECONDS = 10
"""A kernel is up and done in one; there are machines on which KVM can be opened, and hangs."""
PATIENCE = 300.0
"""Seconds for one step of a machine, of which an emulated processor needs more than a virtual one."""


def lacking() -> str:
    """Say why no machine can be built here, empty where it can."""
    if os.uname().machine != "x86_64":
        return "needs x86-64"
    place = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=place) is None]
    if missing:
        return f"not installed: apt-get install {' '.join(missing)}"
    absent = [name for name in DISTRIBUTIONS if _is_absent(name)]
    return f"not installed: {' '.join(absent)}" if absent else ""


def _is_absent(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return True
    return False


def fetch_kernel(scratch: Path) -> Path:
    """Fetch and unpack Debian's kernel, without installing it; return the folder.

    Raises:
        OSError: there is no apt, or its mirrors have none.
    """
    told = _said(["apt-cache", "depends", KERNEL_PACKAGE], scratch)
    names = [line.split()[-1] for line in told.splitlines() if "Depends: linux-image-" in line]
    if not names:
        raise OSError(f"the mirrors of apt have no {KERNEL_PACKAGE}")
    _said(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", names[0]], scratch)
    _said(["dpkg-deb", "-x", str(next(scratch.glob("linux-image-*.deb"))), "kernel"], scratch)
    return scratch / "kernel"


@dataclass(frozen=True)
class System:
    """What is booted, and the machine that is frozen when it is ready."""

    kernel: Path
    memory: Path
    frozen: Path
    processor: tuple[str, ...]


def build(scratch: Path, kernel: Path, extra: dict[str, Path]) -> System:
    """Put the system together, ``extra`` folders in it by name, boot it and freeze it when it is ready."""
    found: dict[str, Path] = {"init": Path(__file__).with_name("_guest.py")}
    own = Path(edgekit.__file__).parent
    found |= {f"edgekit/{name}": path for name, path in _files(own)}
    found["_updates.py"] = Path(__file__).with_name("_updates.py")
    for number, name in enumerate(MODULES):
        for path in (kernel / "lib/modules").rglob(f"{name}.ko"):
            found[f"modules/{number}-{name}.ko"] = path
    for name, folder in extra.items():
        found |= {f"{name}/{inner}": path for inner, path in _files(folder)}
    found |= _python()
    archive = scratch / "root.cpio"
    _write_archive(archive, found)
    image = next((kernel / "boot").glob("vmlinuz-*"))
    system = System(image, archive, scratch / "frozen", _processor(image))
    with booted(system, None, scratch, cold=False) as machine:
        machine.wait("ready")
        machine.freeze(system.frozen)
    return system


class Machine:
    """A machine that runs; its console is lines, of which those that `_guest.py` tells count."""

    def __init__(self, process: subprocess.Popen[str], control: Path) -> None:
        self.process = process
        self._control = control
        self.lines: list[str] = []
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def order(self, what: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def wait(self, what: str, seconds: float = PATIENCE) -> str | None:
        """Wait until that is told and return its value; ``None`` if nothing comes in time.

        Raises:
            AssertionError: the machine ended before.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                line = self._told.get(timeout=min(left, 0.5))
            except queue.Empty:
                assert self.process.poll() is None or not self._told.empty(), "\n".join(self.lines[-40:])
                continue
            kind, _, value = line.partition(":")
            if kind == what:
                return value
        return None

    def told(self, what: str) -> str | None:
        """Return the value that was told last, once the machine has ended."""
        self._listener.join()
        found = [line.partition(f"edgekit:{what}:")[2] for line in self.lines if f"edgekit:{what}:" in line]
        return found[-1] if found else None

    def kill(self) -> None:
        """Cut the power."""
        self.process.kill()
        self.process.wait()

    def command(self, *commands: tuple[str, dict[str, Any]]) -> list[Any]:
        """Let QEMU's monitor do something, and return what it answers."""
        answers = []
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._control))
            with connection.makefile("rw") as lines:
                lines.readline()
                for name, arguments in (("qmp_capabilities", {}), *commands):
                    lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                    lines.flush()
                    while "return" not in (answer := json.loads(lines.readline())):
                        assert "error" not in answer, answer
                    answers.append(answer["return"])
        return answers[1:]

    def freeze(self, path: Path) -> None:
        """Write the machine's memory to a file."""
        self.command(("stop", {}), ("migrate", {"uri": f"exec:cat > {path}"}))
        until = time.monotonic() + PATIENCE
        while (state := self.command(("query-migrate", {}))[0]["status"]) != "completed":
            assert state in ("setup", "active", "device"), state
            assert time.monotonic() < until, "freezing takes too long"
            time.sleep(0.05)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "edgekit:" in line:
                self._told.put(line.rstrip().partition("edgekit:")[2])


def _processor(kernel: Path) -> tuple[str, ...]:
    """Return the fastest processor on which the kernel comes as far as to find no root and to give up."""
    virtual, emulated = ("-accel", "kvm", "-cpu", "host,-arch-capabilities"), ("-accel", "tcg", "-cpu", "max")
    command = [EMULATOR, *virtual, "-m", "256", "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-kernel", str(kernel), "-append", "quiet panic=-1"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=KVM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return emulated
    return emulated if done.returncode else virtual


@contextlib.contextmanager
def booted(system: System, disk: Path | None, scratch: Path, *, cold: bool) -> Iterator[Machine]:
    """Run a machine with the disk behind a socket, from cold or, once it was frozen, thawed; kill it in the end."""
    is_thawed = system.frozen.exists() and not cold
    control = scratch / "control"
    control.unlink(missing_ok=True)
    where = f"nbd+unix:///?socket={disk}" if disk else "null-co://,file.size=1048576"
    command = [EMULATOR, *system.processor, "-m", str(MEMORY_MIB), "-nodefaults"]
    command += [
        "-display",
        "none",
        "-no-reboot",
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]
    command += ["-qmp", f"unix:{control},server=on,wait=off"]
    command += ["-drive", f"file={where},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"]
    command += ["-kernel", str(system.kernel), "-initrd", str(system.memory)]
    command += ["-append", "console=ttyS0 quiet rdinit=/init panic=-1" + " edgekit.cold" * cold]
    if is_thawed:
        command += ["-incoming", f"exec:cat {system.frozen}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **pipes, text=True, errors="replace")
    machine = Machine(process, control)
    try:
        if is_thawed:
            _thaw(machine)
        yield machine
    finally:
        machine.kill()


def _thaw(machine: Machine) -> None:
    """Let a machine go on as soon as its memory is read."""
    until, state = time.monotonic() + PATIENCE, "inmigrate"
    while state == "inmigrate" and time.monotonic() < until:
        time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # QEMU does not listen yet
            state = machine.command(("query-status", {}))[0]["status"]
    machine.command(("cont", {}))


def _said(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])} failed: {done.stderr.strip()[-200:]}")
    return done.stdout


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.is_file():
            yield str(path.relative_to(folder)), path


def _python() -> dict[str, Path]:
    """Return this interpreter, its library, the packages the agent needs, and the libraries all these load."""
    program, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    found = {str(path): path for name, path in _files(library) if _is_needed(Path(name))}
    found[str(program)] = program
    for name in (*DISTRIBUTIONS, *(one for one in OPTIONAL if not _is_absent(one))):
        for file in metadata.files(name) or ():
            path = Path(str(file.locate()))
            if _is_needed(file) and ".." not in file.parts and path.is_file():
                found[f"packages/{file}"] = path
    loads = [str(path) for path in found.values() if path == program or ".so" in path.suffixes]
    told = subprocess.run(["ldd", *loads], capture_output=True, text=True, check=False).stdout
    packed = {path.resolve() for path in found.values()}
    words = {word for word in told.split() if word.startswith("/") and Path(word).is_file()}
    found |= {word: Path(word) for word in words if Path(word).resolve() not in packed}
    return {name.lstrip("/"): path for name, path in found.items()}


def _is_needed(path: PurePath) -> bool:
    return not NEEDLESS & set(path.parts) and not path.name.endswith((".a", ".opt-1.pyc", ".opt-2.pyc", ".pyi", ".h"))


def _write_archive(path: Path, found: dict[str, Path]) -> None:
    """Write what the kernel unpacks into memory, in cpio's format ``newc``; links within it stay links."""
    folders = {str(parent) for name in found for parent in Path(name).parents} - {"."}
    shebang = f"#!{Path(sys.executable).resolve()} -B\n".encode()
    with path.open("wb") as file:
        for name in sorted(folders | {"dev", "proc", "sys", "tmp"}):
            file.write(_entry(name, stat.S_IFDIR | 0o755, b""))
        for name, source in sorted(found.items()):
            if source.is_symlink() and str(Path(name).parent / source.readlink()) in found:
                file.write(_entry(name, stat.S_IFLNK | 0o777, os.fsencode(source.readlink())))
            else:
                data = source.read_bytes()
                file.write(_entry(name, stat.S_IFREG | 0o755, shebang + data if name == "init" else data))
        file.write(_entry("TRAILER!!!", 0, b""))


_numbers = iter(range(1, 1 << 30))


def _entry(name: str, mode: int, data: bytes) -> bytes:
    text = os.fsencode(name) + b"\0"
    fields = (next(_numbers), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(text), 0)
    head = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + text
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
