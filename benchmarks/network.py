"""The network matrix: what becomes of updates over a broker whose connections break, lose, lag and die.

Everything but the model is real: a signed repository, the fleet's service, a Mosquitto, the agent over MQTT. What is
written on the device is compared byte for byte; what came over the wire is counted, and what came twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import _network
from _network import HOST, Broker, Counted, Proxy, Tally, lossy_link, lots
from _report import Row, run

from edgekit import bundle
from edgekit.manifest import FileEntry, Manifest, Parity, Variant
from edgekit.ota import mqtt
from edgekit.ota.device import slots, trust
from edgekit.ota.device.agent import Agent, Habits, Vitals
from edgekit.ota.device.download import download
from edgekit.ota.device.fetchers import Patience
from edgekit.ota.device.https import HttpFetcher
from edgekit.ota.device.update import Device
from edgekit.ota.messages import MAX_BLOCK_BYTES
from edgekit.ota.release import Limits, Release
from edgekit.ota.server import publisher
from edgekit.ota.server.rollout import Plan
from edgekit.ota.server.service import DATABASE, Service
from edgekit.ota.server.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edgekit.bundle import Bundle
    from edgekit.ota.channel import Channel, Will

SEED = 6
KIB, MIB = 2**10, 2**20
PROFILE = "x86-64"
OVERHEAD_KIB = 16
"""What a connection costs beside blocks: MQTT's own words, hello, wish, metadata that is asked for anew."""
ONE_BLOCK = f"value <= {MAX_BLOCK_BYTES // KIB + OVERHEAD_KIB}"
HABITS = Habits(first_pause=0.1, longest_pause=1.0, health_seconds=0.5, offline_health_seconds=0.5)


class Obedient:
    """Serves whatever it is given."""

    def try_out(self, bundle: Bundle, release: Release) -> Mapping[str, float]:
        """Find nothing wrong."""
        del bundle, release
        return {}

    def activate(self, bundle: Bundle | None) -> None:
        """Do nothing."""
        del bundle

    def probation(self, release: Release) -> Mapping[str, float]:
        """Find nothing wrong."""
        del release
        return {}


class Town:
    """A fleet with one device behind a proxy; both ends share a clock that can be set forward."""

    def __init__(self, folder: Path, broker: Broker, proxy: Proxy) -> None:
        self.ahead = timedelta()
        self.folder = folder
        self.broker = broker
        self.proxy = proxy
        self.tally = Tally()
        self.waste: list[int] = []
        self.published: dict[str, dict[str, bytes]] = {}
        self._seen = 0
        self.proxy.began = self._note
        publisher.init(folder / "fleet", self.now())
        self.store = Store(folder / "fleet" / DATABASE, "lab")
        self.channel = mqtt.connect(broker.url, "server")
        self.service = Service(folder / "fleet", self.channel, self.store, lambda: self.now().timestamp()).start()
        device = Device("pi-1", PROFILE, folder / "device", Obedient())
        trust.install_root(device.state, publisher.root(folder / "fleet"))
        self.agent = Agent("lab", device, HABITS, lambda: Vitals(0, 0, 0.0))
        self.agent.clock = self.now

    def now(self) -> datetime:
        """Tell the time of both ends."""
        return datetime.now(UTC) + self.ahead

    def start(self) -> None:
        """Let the device come up, and return once the server knows it."""
        self.agent.start(self._connect)
        _await(lambda: self.store.devices() and self.store.devices()["pi-1"].online, 120)

    def _connect(self, will: Will) -> Channel:
        return Counted(mqtt.connect(self.proxy.url, "pi-1", will=will, patience=60.0), self.tally)

    def publish(self, version: int, size: int) -> Release:
        """Sign a bundle of one file."""
        content = lots(SEED + version).randbytes(size)
        file = f"{PROFILE}/model.onnx"
        checked = Parity(status="checked")
        variant = Variant(name=PROFILE, format="onnx", precision="int8", main=file, files=(file,), parity=checked)
        manifest = Manifest(name="m", version=str(version), task="tensor", variants=(variant,), files=())
        sealed = bundle.seal(self.folder / f"sealed-{version}", manifest, {file: content})
        made = publisher.publish(
            self.folder / "fleet", sealed, now=self.now(), limits=Limits(probation_requests=0, probation_seconds=0)
        )
        self.published[made[0].bundle] = {file: content}
        return made[0]

    def roll_out(self, release: Release) -> None:
        """Want it on every device."""
        plan = Plan(model=release.model, version=release.version, profiles=(PROFILE,), waves=(1.0,))
        self.store.start(plan, self.now().timestamp())

    def update(self, version: int, size: int, seconds: float = 900) -> bool:
        """Publish, roll out, wait until the server knows it, and say whether the device has those very bytes."""
        release = self.publish(version, size)
        self.roll_out(release)
        _await(lambda: self.store.devices()["pi-1"].version == version, seconds)
        return self.is_identical(release)

    def is_identical(self, release: Release) -> bool:
        """Say whether the device serves that release, byte for byte."""
        state = slots.load(self.folder / "device")
        if state.current != release:
            return False
        folder = slots.bundle_folder(self.folder / "device", release.bundle)
        return all((folder / name).read_bytes() == data for name, data in self.published[release.bundle].items())

    def stop(self) -> None:
        """End both halves."""
        self.agent.stop()
        self.service.stop()
        self.channel.close()
        self.store.close()

    def _note(self) -> None:
        """Note what the last connection brought that was no fresh block."""
        if self.proxy.down:
            self.waste.append(self.proxy.down[-1] - (self.tally.fresh - self._seen))
        self._seen = self.tally.fresh


def main() -> None:
    run("Updates over bad networks", measure)


def measure(quick: bool) -> list[Row]:  # as `run` calls it
    if _network.MOSQUITTO is None:
        return [Row("network matrix", None, "mosquitto is not installed")]
    rows = [*cut_at_random(quick), *lossy(quick), *late(quick), *broker_restarts(quick), *away(quick)]
    return [*rows, *http_cut_at_random(quick)]


def cut_at_random(quick: bool) -> list[Row]:  # as above
    """Cut the device's connection again and again, each time after a random number of bytes."""
    wanted, size = (12, 4 * MIB) if quick else (220, 32 * MIB)
    draw = lots(SEED)
    with _town() as town:
        town.start()
        town.proxy.budget = lambda: draw.randrange(1, MIB) if town.proxy.cuts < wanted else None
        town.proxy.drop_all()
        good = tried = 0
        while town.proxy.cuts < wanted:
            tried += 1
            good += town.update(tried, size)
        cuts = town.proxy.cuts
        return [
            Row(f"MQTT, cut {cuts} times: files that ended identical", good, f"of {tried}", goal=f"value >= {tried}"),
            Row("MQTT, a cut: most bytes beside fresh ones", max(town.waste) / KIB, "KiB", goal=ONE_BLOCK),
            Row("MQTT, a cut: bytes beside fresh ones, mean", sum(town.waste) / len(town.waste) / KIB, "KiB"),
            Row("MQTT, all cuts: whole blocks that came twice", town.tally.repeated / KIB, "KiB"),
        ]


def lossy(quick: bool) -> list[Row]:  # as above
    """Lose 30 % of the packets of a real link, both ways."""
    size = 64 * KIB if quick else MIB
    try:
        with lossy_link(0.3, 0.005, SEED) as listener, _town(listener) as town:
            town.start()
            began = time.monotonic()
            good = town.update(1, size)
            took = time.monotonic() - began
            again = town.tally.repeated / KIB
    except OSError as error:
        return [Row("MQTT, 30 % of the packets lost", None, f"needs Linux and root: {error}")]
    return [
        Row("MQTT, 30 % of the packets lost: files that ended identical", good, "of 1", goal="value >= 1"),
        Row("MQTT, 30 % of the packets lost: came twice", again, "KiB", goal=ONE_BLOCK),
        Row("MQTT, 30 % of the packets lost: speed", size / KIB / took, "KiB/s"),
    ]


def late(quick: bool) -> list[Row]:  # as above
    """Deliver everything two seconds late, in both directions."""
    size = MIB if quick else 16 * MIB
    with _town() as town:
        town.proxy.delay = 2.0
        town.start()
        began = time.monotonic()
        good = town.update(1, size)
        took = time.monotonic() - began
        return [
            Row("MQTT, 2 s late each way: files that ended identical", good, "of 1", goal="value >= 1"),
            Row("MQTT, 2 s late each way: came twice", town.tally.repeated / KIB, "KiB", goal=ONE_BLOCK),
            Row("MQTT, 2 s late each way: speed", size / KIB / took, "KiB/s"),
        ]


def broker_restarts(quick: bool) -> list[Row]:  # as above
    """Kill the broker in the middle of a transfer; it forgets sessions, wishes and hellos."""
    times, size = (2, 4 * MIB) if quick else (10, 8 * MIB)
    draw, good = lots(SEED), 0
    with _town() as town:
        town.start()
        for number in range(1, times + 1):
            at, halfway = draw.randrange(size), threading.Event()

            def watch(_what: str, done: int, _total: int, at: int = at, halfway: threading.Event = halfway) -> None:
                if done >= at and not halfway.is_set():
                    halfway.set()
                    town.broker.kill()
                    town.broker.start()

            town.agent.progress = watch
            good += town.update(number, size) and halfway.is_set()
        return [
            Row("MQTT, broker killed: files that ended identical", good, f"of {times}", goal=f"value >= {times}"),
            Row("MQTT, broker killed: most bytes beside fresh ones", max(town.waste) / KIB, "KiB", goal=ONE_BLOCK),
        ]


def away(quick: bool) -> list[Row]:  # as above
    """Take the device off the network for ninety days by its clock; its fleet goes on meanwhile."""
    size = MIB if quick else 4 * MIB
    with _town() as town:
        town.start()
        first = town.update(1, size)
        town.proxy.is_closed = True
        town.proxy.drop_all()
        _await(lambda: not town.agent._channel.is_connected(), 60)  # type: ignore[union-attr]  # noqa: SLF001  # started
        for day in range(1, 91):
            town.ahead = timedelta(days=day)
            town.service._refresh()  # noqa: SLF001  # as the service does by itself, once a day
            if day in (20, 50, 80):
                town.roll_out(town.publish(2 + (day // 30), size))
        _await(lambda: len(town.agent._outbox or ()) > 2, 60)  # noqa: SLF001  # its health waits
        newest = publisher.releases(town.folder / "fleet")[-1]
        town.proxy.is_closed = False
        _await(lambda: town.store.devices()["pi-1"].version == newest.version, 120)
        _await(lambda: not len(town.agent._outbox or ()), 60)  # noqa: SLF001  # see above
        good = first + town.is_identical(newest)
        return [Row("MQTT, 90 days away by the clock: files that ended identical", good, "of 2", goal="value >= 2")]


def http_cut_at_random(quick: bool) -> list[Row]:  # as above
    """The same over HTTP with Range."""
    wanted, size = (12, 4 * MIB) if quick else (220, 32 * MIB)
    draw, content = lots(SEED), lots(SEED).randbytes(size)
    with tempfile.TemporaryDirectory() as folder, _files(content) as port:
        proxy = Proxy(port)
        proxy.budget = lambda: draw.randrange(1, MIB) if proxy.cuts < wanted else None
        fetcher = HttpFetcher(f"http://{proxy.address[0]}:{proxy.address[1]}/", Patience(attempts=50))
        good = tried = 0
        while proxy.cuts < wanted:
            tried += 1
            entry = FileEntry(path="m", sha256=hashlib.sha256(content).hexdigest(), size=size)
            download(fetcher, entry, Path(folder, f"m{tried}"))
            good += Path(folder, f"m{tried}").read_bytes() == content
        beside = (sum(proxy.down) - tried * size) / len(proxy.down) / KIB
    return [
        Row(f"HTTP, cut {proxy.cuts} times: files that ended identical", good, f"of {tried}", goal=f"value >= {tried}"),
        Row("HTTP, a cut: bytes beside fresh ones, mean", beside, "KiB", goal=ONE_BLOCK),
    ]


@contextlib.contextmanager
def _files(content: bytes) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert found
            start, end = int(found[1]), min(int(found[2]) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content[start:end])

    server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def _town(listener: _network.socket.socket | None = None) -> Iterator[Town]:
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(Path(folder))
        town = Town(Path(folder), broker, Proxy(broker.port, listener))
        try:
            yield town
        finally:
            town.stop()
            broker.kill()


def _await(check: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"did not happen within {seconds} s")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
