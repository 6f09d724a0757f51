"""Puts the arm64 system together: Debian's packages by apt, engines by pip, one archive in memory. Boots nothing.

Nothing is installed on this machine: apt gets a state of its own, the packages are only unpacked. It takes the mirrors
that this machine's apt has, so it works on Debian.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.durable import new_folder
from edgekit.errors import ResourceError
from edgekit.runtime import arm64

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgekit.progress import Progress

PROGRAMS = ("apt-get", "dpkg-deb", "cpio", arm64.EMULATOR)
PROGRAM_PACKAGES = "apt-get install qemu-system-arm cpio"
DEBIAN = ("python3", "libstdc++6", "libgomp1", "linux-image-arm64")
MODULES = ("virtio_mmio", "virtio_blk")
NEEDLESS = ("usr/share", "usr/lib/linux-image-*", "lib/modules", "boot", "var", "usr/lib/python3/dist-packages/*/tests")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
STEPS = ("packages of Debian", "packages of Python", "archive")


def build(progress: Progress) -> Path:
    """Build the system anew, some 200 MiB, and return its folder. The old one stays until the new one is whole.

    Raises:
        ResourceError: a program is missing, a mirror has no arm64 packages, or a package has no wheel for it.
    """
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        raise ResourceError(f"{', '.join(absent)} not found; the system is built on Debian", PROGRAM_PACKAGES)
    target = arm64.place()
    target.parent.mkdir(parents=True, exist_ok=True)
    versions = arm64.installed()
    with new_folder(target) as made, tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        root = work / "root"
        root.mkdir()
        progress(STEPS[0], 0, len(STEPS))
        _debian(work, root)
        shutil.move(_kernel(root), made / arm64.KERNEL)
        progress(STEPS[1], 1, len(STEPS))
        _wheels(work, root, versions)
        progress(STEPS[2], 2, len(STEPS))
        _lay_out(root)
        _precompile(root)
        _archive(root, made / arm64.ROOT)
        (made / arm64.RECORD).write_bytes(msgspec.json.encode(arm64.System(versions)))
    progress(STEPS[2], len(STEPS), len(STEPS))
    return target


def _run(command: Sequence[str], *, doing: str) -> None:
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        told = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise ResourceError(
            f"{doing} failed: {' '.join(told[-2:])[:400]}", f"run it by hand: {' '.join(command)[:300]}"
        )


def _debian(work: Path, root: Path) -> None:
    """Fetch and unpack the kernel, Python and what it needs, with a state that apt shares with nobody."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    settings = work / "apt.conf"
    settings.write_text(
        f'#clear APT::Architectures;\nAPT::Architecture "arm64";\nAPT::Architectures {{ "arm64"; }};\n'
        f'#clear APT::Update::Post-Invoke;\nAPT::Sandbox::User "";\nDir::State "{work}/state";\n'
        f'Dir::State::status "{work}/status";\nDir::Cache "{work}/cache";\n'
    )
    apt = ["apt-get", "-q", "-c", str(settings)]
    _run([*apt, "update"], doing="reading the mirrors of apt for arm64")
    fetch = [*apt, "install", "-y", "--no-install-recommends", "--download-only", *DEBIAN]
    _run(fetch, doing="fetching Debian's packages for arm64")
    for package in sorted((work / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)], doing=f"unpacking {package.name}")


def _kernel(root: Path) -> Path:
    """Return the kernel; the modules that it needs for its disks are put where the first process finds them."""
    (root / "modules").mkdir()
    for name in MODULES:
        shutil.copyfile(next((root / "lib/modules").rglob(f"{name}.ko")), root / "modules" / f"{name}.ko")
    return next((root / "boot").glob("vmlinuz-*"))


def _wheels(work: Path, root: Path, versions: dict[str, str]) -> None:
    """Fetch the engines' wheels in this machine's versions, for the Python that Debian has."""
    python = next(path for path in sorted((root / "usr/bin").iterdir()) if re.fullmatch(r"python3\.\d+", path.name))
    version = python.name.removeprefix("python")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={version}", f"--dest={work / 'wheels'}"]
    command += [f"--platform={platform}_aarch64" for platform in PLATFORMS]
    _run([*command, *(f"{name}=={one}" for name, one in versions.items())], doing="fetching wheels for arm64")
    packages = root / f"usr/lib/python{version[0]}/dist-packages"
    packages.mkdir(parents=True, exist_ok=True)
    for wheel in sorted((work / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(packages)


def _lay_out(root: Path) -> None:
    for path in (path for pattern in NEEDLESS for path in list(root.glob(pattern))):
        shutil.rmtree(path)
    for name in ("proc", "sys", "dev", "tmp"):
        (root / name).mkdir(exist_ok=True)
    code = (Path(__file__).parent / "guest.py").read_text(encoding="utf-8")
    init = root / "init"
    init.write_text(f"#!/usr/bin/python3 -B\n{code}", encoding="utf-8")
    init.chmod(0o755)


def _precompile(root: Path) -> None:
    """Spare the emulated processor the compiling, where this Python is of the system's version."""
    for folder in (root / "usr/lib").glob(f"python3.{sys.version_info.minor}"):
        for one in (folder, folder.parent / "python3"):
            compileall.compile_dir(one, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def _archive(root: Path, path: Path) -> None:
    """Write what the kernel unpacks into memory."""
    names = "\0".join(_names(root)).encode()
    with path.open("wb") as file:
        command = ["cpio", "-o", "-0", "-H", "newc", "--quiet", "-R", "0:0"]
        done = subprocess.run(command, input=names, stdout=file, stderr=subprocess.PIPE, check=False, cwd=root)
    if done.returncode:
        raise ResourceError(f"cpio failed: {done.stderr.decode(errors='replace').strip()[:300]}")


def _names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        for name in sorted((*folders, *files)):
            yield str(Path(folder, name).relative_to(root))
