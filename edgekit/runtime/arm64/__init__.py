"""A small arm64 system under QEMU, in which the same engines run a file as they do on an ARM board.

Engines of another architecture do not run in QEMU's user mode, so this boots a whole machine: Debian's kernel, and a
root file system in memory that `build` puts together. A job goes in as a tar on one disk, its answers come back as a
tar on another. Knows no bundle and no tensor.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import edgekit
from edgekit.errors import HealthError

if TYPE_CHECKING:
    from collections.abc import Mapping

EMULATOR = "qemu-system-aarch64"
BUILD = "edgekit emulator"
KERNEL, ROOT, RECORD = "kernel", "root.cpio", "system.json"
PACKAGES = ("numpy", "msgspec", "onnxruntime", "ai-edge-litert")
"""What the system takes from PyPI, in the versions that are installed here: engines, and what edgekit needs of them."""
ANSWER_MIB = 512
"""The longest answer; the file is sparse."""
TIMEOUT = 900.0


class System(msgspec.Struct, frozen=True):
    """What was built: the versions of its packages."""

    versions: dict[str, str]


def place() -> Path:
    """Return where the system lies: ``$XDG_CACHE_HOME/edgekit/arm64``, else below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "edgekit" / "arm64"


def installed() -> dict[str, str]:
    """Return the versions of `PACKAGES` that this machine has, of those that it has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def lacking() -> str:
    """Say why no arm64 system can be booted, empty where it can."""
    if shutil.which(EMULATOR) is None:
        return f"{EMULATOR} is not installed: apt-get install qemu-system-arm, then {BUILD}"
    try:
        system = msgspec.json.decode((place() / RECORD).read_bytes(), type=System)
    except FileNotFoundError:
        return f"the arm64 system is not built: {BUILD}"
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"the arm64 system in {place()} is damaged: {BUILD}"
    if system.versions != installed():
        here = ", ".join(f"{name} {version}" for name, version in installed().items())
        return f"the arm64 system has other versions than this machine ({here}): {BUILD}"
    return ""


def run(module: str, files: Mapping[str, Path | bytes], *, cpu: str, answer: str, doing: str) -> bytes:
    """Run ``python -m module`` of edgekit in the system, beside the files, and return the file that it answers with.

    Args:
        module: a module of edgekit; gets no arguments, its working folder holds the files.
        files: what goes in, by the name in the working folder.
        cpu: QEMU's name of the processor.
        answer: name of the file that the module writes.
        doing: what an error is to call the job.

    Raises:
        HealthError: there is no system, it crashed or hung, or the module did not answer: with the last line it wrote.
    """
    if lacking():
        raise HealthError(lacking())
    with tempfile.TemporaryDirectory() as scratch:
        job, answers = Path(scratch, "job.tar"), Path(scratch, "answer.tar")
        _pack(job, module, {**files, **_own_code()}, answer=answer)
        with answers.open("wb") as file:
            file.truncate(ANSWER_MIB * 2**20)
        memory = 1536 + 4 * (job.stat().st_size // 2**20)
        console = _boot(place(), cpu=cpu, memory=memory, disks=(job, answers))
        status, told, found = _unpack(answers, answer)
    if found is None:
        last = (told or console).strip().rpartition("\n")[2][:300]
        raise HealthError(f"{doing} does not run on {cpu}: {last or f'exit code {status}'}")
    return found


def _own_code() -> dict[str, Path]:
    root = Path(edgekit.__file__).parent
    files = (path for path in root.rglob("*") if path.suffix in {".py", ".toml"})
    return {f"edgekit/{path.relative_to(root)}": path for path in files}


def _pack(job: Path, module: str, files: Mapping[str, Path | bytes], *, answer: str) -> None:
    order = msgspec.json.encode({"module": module, "answer": answer})
    with tarfile.open(job, "w") as tar:
        for name, content in {"order.json": order, **files}.items():
            if isinstance(content, Path):
                tar.add(content, name)
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _boot(system: Path, *, cpu: str, memory: int, disks: tuple[Path, Path]) -> str:
    """Boot, wait for the power to go off, and return what the console said."""
    command = [EMULATOR, "-M", "virt", "-cpu", cpu, "-m", str(memory), "-smp", "1"]
    command += ["-display", "none", "-serial", "stdio", "-monitor", "none", "-nic", "none", "-no-reboot"]
    command += ["-kernel", str(system / KERNEL), "-initrd", str(system / ROOT)]
    command += ["-append", "console=ttyAMA0 quiet rdinit=/init panic=-1"]
    for number, disk in enumerate(disks):
        path = str(disk).replace(",", ",,")  # QEMU's own way to write a comma
        command += ["-drive", f"file={path},format=raw,if=none,id=disk{number}"]
        command += ["-device", f"virtio-blk-device,drive=disk{number},serial=edgekit{number}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise HealthError(f"the arm64 system did not finish in {TIMEOUT:g} s") from error
    return (done.stdout + done.stderr).decode(errors="replace")


def _unpack(answers: Path, answer: str) -> tuple[int, str, bytes | None]:
    """Return the exit code, what was written to stderr, and the answer's bytes; nothing where it never came so far."""
    with tarfile.open(answers, "r:") as tar:  # zeros are a tar, an empty one
        read = {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}
    return int(read.get("status", b"1")), read.get("stderr", b"").decode(errors="replace"), read.get(answer)
