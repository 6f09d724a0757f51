"""What the agent costs a device: what `pip install edgekit[device]` brings, and the memory of an agent that waits.

A fresh environment, a real broker, the real command. Memory is that of the process as Linux counts it: RSS with shared
pages in full, PSS with a share of them; MB are millions of bytes. Peers run as their packages start them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import _updates
from _report import ROOT, Row, run

from edgekit.ota.server import publisher
from edgekit.ota.server.broker import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GOAL_MB = 45
PROVISIONED, WAITS = "agent at its first start, that checked its root", "agent that waits, connected"
PACKAGES = {"mender": "mender-client"}
PATIENCE = 120.0
SETTLE = 3.0
"""Seconds until a process that has come up waits."""


def main(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = _installed(folder / "venv")
        bare = folder / "venv" / "lib"
        rows = [_size(bare)]
        settle = SETTLE / 3 if quick else SETTLE
        with _broker(folder) as url:
            rows += _agent(folder, python, url, settle=settle)
        return [*rows, *(_peer(folder, name, peer, settle=settle) for name, peer in PEERS.items())]


def _installed(venv: Path) -> Path:
    """Make an environment with the agent alone, as a device has it, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), f"{ROOT}[device]"], check=True, cwd=venv)
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True, cwd=venv)
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "pip"], check=True, cwd=venv)
    return python


def _size(folder: Path) -> Row:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    parts = {
        path.name: sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file()) / 1e6
        for path in next(folder.glob("python*/site-packages")).iterdir()
        if path.is_dir()
    }
    most = ", ".join(f"{name} {size:.0f}" for name, size in sorted(parts.items(), key=lambda one: -one[1])[:4])
    return Row("pip install edgekit[device]", total / 1e6, f"MB ({most})")


@contextlib.contextmanager
def _broker(folder: Path) -> Iterator[str]:
    """Run a Mosquitto, or the embedded broker where there is none."""
    program = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")
    if program is None:
        with embedded() as url:
            yield url
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    process = subprocess.Popen([program, "-c", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _agent(folder: Path, python: Path, url: str, *, settle: float) -> list[Row]:
    fleet = folder / "fleet"
    publisher.init(fleet, datetime.now(UTC))
    root = fleet / "repository" / "metadata" / "1.root.json"
    command = [str(python), "-m", "edgekit", "ota", "agent", "--state", str(folder / "device"), "--root", str(root)]
    command += ["--device", "pi-1", "--target", _updates.CLASS, "--broker", url, "--no-isolate"]
    rows, log = [], folder / "agent.log"
    for what in (PROVISIONED, WAITS):
        with _running(command, log) as agent:
            _until(log, "listens to fleet")
            time.sleep(settle)
            rows += _rows(what, agent.pid, f"value <= {GOAL_MB}")
            if what == PROVISIONED:
                continue
            _update(folder, fleet, url)
            time.sleep(settle)
            rows += _rows("after its first update, that model loaded (null engine, with NumPy)", agent.pid, "")
    return rows


def _update(folder: Path, fleet: Path, url: str) -> None:
    """Publish a bundle and roll it out from a server of this environment."""
    sealed = _updates.sealed(folder / "v1", 1, 1 << 20)
    publisher.publish(fleet, sealed, now=datetime.now(UTC), limits=_updates.AT_ONCE, allow_unverified=True)
    edgekit = [sys.executable, "-m", "edgekit", "ota"]
    with _running([*edgekit, "server", str(fleet), "--broker", url], folder / "server.log"):
        _until(folder / "server.log", "is served over")
        subprocess.run([*edgekit, "rollout", "start", str(fleet), "proof", "1"], check=True, capture_output=True)
        _until(folder / "agent.log", "installed version 1")


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # it is the installed one that counts
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _until(log: Path, text: str) -> None:
    until = time.monotonic() + PATIENCE
    while text not in log.read_text():
        assert time.monotonic() < until, f"never said {text!r}: {log.read_text()}"
        time.sleep(0.1)


def _rows(what: str, process: int, goal: str) -> list[Row]:
    rss, pss = _held(process)
    return [Row(f"{what}: RSS", rss, "MB", goal=goal), Row(f"{what}: PSS", pss, "MB")]


def _held(process: int) -> tuple[float, float]:
    """Return RSS and PSS of a process and its children, in MB."""
    held = dict.fromkeys(("Rss", "Pss"), 0.0)
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in held:
            held[name] = int(rest.split()[0]) * 1024 / 1e6
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    others = [_held(int(child)) for child in children]
    return held["Rss"] + sum(rss for rss, _ in others), held["Pss"] + sum(pss for _, pss in others)


def _mender(folder: Path) -> list[str]:
    """Run Debian's Mender client; no server answers it, and it tries again now and then."""
    settings = {
        "Servers": [{"ServerURL": "https://127.0.0.1:9"}],
        "RootfsPartA": "/dev/null",
        "RootfsPartB": "/dev/null",
    }
    (folder / "mender.conf").write_text(json.dumps(settings))
    (folder / "mender").mkdir()
    return ["mender", "--config", "mender.conf", "--data", "mender", "--no-syslog", "daemon"]


def _swupdate(folder: Path) -> list[str]:
    """Run Debian's SWUpdate as a client of hawkBit; no server answers it."""
    del folder
    names = ["-subj", "/CN=peer", "-keyout", "key.pem", "-out", "certificate.pem"]
    made = f"openssl req -x509 -newkey rsa:2048 -nodes {' '.join(names)} 2>/dev/null"
    return ["sh", "-c", f"{made}; exec swupdate -k certificate.pem -u '-t DEFAULT -u http://127.0.0.1:9 -i pi-1'"]


def _rauc(folder: Path) -> list[str]:
    """Run Debian's RAUC as a service on a bus of its own; it knows no network."""
    settings = "[system]\ncompatible=peer\nbootloader=noop\n[keyring]\npath=/dev/null\n"
    (folder / "rauc.conf").write_text(settings + "[slot.rootfs.0]\ndevice=/dev/null\ntype=raw\nbootname=a\n")
    bus = "DBUS_SYSTEM_BUS_ADDRESS=$DBUS_SESSION_BUS_ADDRESS exec rauc -c rauc.conf service"
    return ["dbus-run-session", "--", "sh", "-c", bus]


PEERS = {"mender": _mender, "swupdate": _swupdate, "rauc": _rauc}


def _peer(folder: Path, name: str, peer: Callable[[Path], list[str]], *, settle: float) -> Row:
    """Measure a peer that is installed, all processes of its name, as it waits."""
    if shutil.which(name) is None:
        return Row(f"{name}, waiting", None, f"not installed: apt-get install {PACKAGES.get(name, name)}")
    with _running(peer(folder), folder / f"{name}.log"):
        time.sleep(2 + settle)
        status = [path for path in Path("/proc").glob("[0-9]*/comm") if path.read_text().strip() == name]
        first = min((int(path.parent.name) for path in status), default=0)
        if not first:
            return Row(f"{name}, waiting", None, "did not start: see how it is built")
        rss, pss = _held(first)
    return Row(f"{name} of Debian, waiting: RSS (PSS {pss:.1f})", rss, "MB")


if __name__ == "__main__":
    run("What the agent costs a device", main)
