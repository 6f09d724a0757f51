"""The demo's fleet: a broker, a service, one device as a process of its own with an HTTP server, five as threads.

All of it is the product's own; this module only starts it, keeps traffic flowing, and looks on.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from edgekit.cli.ota._serving import HostServing
from edgekit.errors import EdgekitError, HealthError
from edgekit.ota import mqtt
from edgekit.ota.device import trust
from edgekit.ota.device.agent import Agent, Habits
from edgekit.ota.device.update import Device
from edgekit.ota.server import publisher
from edgekit.ota.server.broker import embedded
from edgekit.ota.server.plan import Plan
from edgekit.ota.server.service import DATABASE, Service
from edgekit.ota.server.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.ota.release import Limits
    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.rollout import Rollout
    from edgekit.tensors import Array

FLEET = "demo"
CLASS = "raspberry-pi-5"
MODEL = "efficientnet-lite0"
PATIENCE = 150.0


@dataclass(frozen=True)
class Request:
    """One answered or failed request to the Raspberry Pi that serves over HTTP; times in seconds and ms."""

    at: float
    ms: float
    digest: str
    labels: tuple[tuple[str, float], ...]
    error: str = ""


@dataclass
class Fleet:
    """A running fleet and what its traffic has seen; ``answered_by``: which bundle gave each device's last answer."""

    folder: Path
    url: str
    store: Store
    port: int
    began: float = field(default_factory=time.monotonic)
    requests: list[Request] = field(default_factory=list)
    others: int = 0
    answered_by: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def publish(self, bundle: Bundle, limits: Limits) -> None:
        """Sign a bundle as the next version."""
        publisher.publish(self.folder, bundle, now=datetime.now(UTC), model=MODEL, profiles=[CLASS], limits=limits)

    def roll_out(self, version: int, waves: tuple[float, ...]) -> str:
        """Start a rollout and return its name."""
        return self.store.start(Plan(model=MODEL, version=version, profiles=(CLASS,), waves=waves), time.time()).id

    def rollout(self, name: str) -> Rollout:
        """Read a rollout as it stands."""
        return self.store.rollout(name)

    def devices(self) -> dict[str, DeviceState]:
        """Read what the fleet knows of its devices."""
        return self.store.devices()

    def wait(self, what: str, is_so: Callable[[], bool]) -> float:
        """Wait until it is so; return the seconds it took.

        Raises:
            HealthError: it did not become so in time.
        """
        start = time.monotonic()
        while not is_so():
            if time.monotonic() - start > PATIENCE:
                raise HealthError(f"the demo waited {PATIENCE:g} s in vain until {what}", "see the devices' reports")
            time.sleep(0.05)
        return time.monotonic() - start

    def now(self) -> float:
        """Return the seconds since the fleet came up."""
        return time.monotonic() - self.began

    def failed_requests(self) -> list[str]:
        """List the errors of every request so far, over HTTP and in process."""
        return [r.error for r in self.requests if r.error] + list(self.failures)


@contextmanager
def running(folder: Path, state: Path, picture: bytes, samples: Array) -> Iterator[Fleet]:
    """Bring up the whole fleet and its traffic for the length of the block."""
    with ExitStack() as stack:
        publisher.init(folder, datetime.now(UTC))
        store = Store(folder / DATABASE, FLEET)
        stack.callback(store.close)
        url = stack.enter_context(embedded())
        channel = mqtt.connect(url, "edgekit-server-demo")
        stack.callback(channel.close)
        service = Service(folder, channel, store).start()
        stack.callback(service.stop)
        fleet = Fleet(folder, url, store, _free_port())
        stack.enter_context(_process(fleet, state / "pi-1"))
        servings = {f"pi-{i}": stack.enter_context(_thread(fleet, f"pi-{i}", state)) for i in range(2, 7)}
        stack.enter_context(_traffic(fleet, picture, servings, samples))
        yield fleet


@contextmanager
def _process(fleet: Fleet, state: Path) -> Iterator[None]:
    """Run ``edgekit ota agent`` as its own process, as on a device."""
    root = fleet.folder / "repository" / "metadata" / "1.root.json"
    arguments = ["--state", state, "--root", root, "--device", state.name, "--target", CLASS, "--threads", "1"]
    arguments += ["--broker", fleet.url, "--fleet", FLEET, "--port", str(fleet.port), "--quiet", "--allow-volatile"]
    command = [sys.executable, "-m", "edgekit", "ota", "agent", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def _thread(fleet: Fleet, name: str, state: Path) -> Iterator[HostServing]:
    serving = HostServing(CLASS, threads=1)
    serving.scratch = state / name / "try-out"
    trust.install_root(state / name, publisher.root(fleet.folder))
    device = Device(name=name, profile=CLASS, state=state / name, serving=serving)
    agent = Agent(FLEET, device, Habits(first_pause=0.2, longest_pause=2.0), serving.vitals)
    agent.start(lambda will: mqtt.connect(fleet.url, f"edgekit-{FLEET}-{name}", will=will))
    try:
        yield serving
    finally:
        serving.stop()
        agent.stop()
        serving.close()


@contextmanager
def _traffic(fleet: Fleet, picture: bytes, servings: Mapping[str, HostServing], samples: Array) -> Iterator[None]:
    """Keep asking every device for answers until the block ends."""
    stopping = threading.Event()
    threads = [
        threading.Thread(target=_ask_over_http, args=(fleet, picture, stopping), daemon=True),
        threading.Thread(target=_ask_in_process, args=(fleet, servings, samples, stopping), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def _ask_over_http(fleet: Fleet, picture: bytes, stopping: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=20)
    while not stopping.wait(0.04):
        if fleet.requests or _is_ready(fleet.port):
            request = _ask(connection, picture, fleet.now())
            fleet.requests.append(request)
            fleet.answered_by["pi-1"] = request.digest
    connection.close()


def _ask(connection: http.client.HTTPConnection, picture: bytes, at: float) -> Request:
    start = time.perf_counter()
    try:
        connection.request("POST", "/v1/classify", picture, {"Content-Type": "image/png"})
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return Request(at, 0.0, "", (), f"{type(error).__name__}: {error}")
    ms = 1000 * (time.perf_counter() - start)
    if response.status != 200:
        return Request(at, ms, "", (), f"{response.status}: {body[:200]!r}")
    answer = json.loads(body)
    labels = tuple((str(entry["label"]), float(entry["probability"])) for entry in answer["labels"])
    return Request(at, ms, str(answer["digest"]), labels)


def _ask_in_process(
    fleet: Fleet, servings: Mapping[str, HostServing], samples: Array, stopping: threading.Event
) -> None:
    for (name, serving), index in zip(itertools.cycle(servings.items()), itertools.count()):
        if stopping.wait(0.02):
            return
        host = serving.host
        if host is None:
            continue
        sample = samples[index % len(samples)][None]
        try:
            fleet.answered_by[name] = host.run({"image": sample}).digest
            fleet.others += 1
        except EdgekitError as error:
            fleet.failures.append(f"{type(error).__name__}: {error}")


def _is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
