"""Bad networks to measure on: a proxy that cuts and delays, a link that loses packets, and who counts what came twice.

The link is real IP: two TUN devices, one in a network of its own, and this process between them (Linux, root).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import queue
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from typing import TYPE_CHECKING

from edgekit.ota import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edgekit.ota.channel import Arrival, Back, Channel, Receipt

HOST = "127.0.0.1"
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
NEAR, FAR = "10.77.0.1", "10.77.0.2"


def lots(seed: int) -> random.Random:
    """Return what draws the same lots at each run."""
    return random.Random(seed)  # noqa: S311  # where to cut and what to lose protects nothing


class Broker:
    """A Mosquitto that keeps nothing over a restart."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = int(probe.getsockname()[1])
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"listener {self.port} {HOST}\nallow_anonymous true\n")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"mqtt://{HOST}:{self.port}"

    def start(self) -> None:
        assert MOSQUITTO is not None
        told = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], **told)  # type: ignore[call-overload]  # a dict of options
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1):
                return
            time.sleep(0.02)
        raise SystemExit("mosquitto does not come up")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Proxy:
    """Passes TCP on to a port: ``delay`` seconds late, cut after as many bytes to the client as ``budget`` says.

    ``down`` has the bytes that went to the client, a connection an entry. Nobody is let in while it ``is_closed``.
    """

    def __init__(self, port: int, listener: socket.socket | None = None) -> None:
        self.delay = 0.0
        self.budget: Callable[[], int | None] = lambda: None
        self.began: Callable[[], None] = lambda: None
        self.is_closed = False
        self.down: list[int] = []
        self.cuts = 0
        self._port = port
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = listener or socket.create_server((HOST, 0))
        host, number = self._listener.getsockname()[:2]
        self.url, self.address = f"mqtt://{host}:{number}", (host, number)
        threading.Thread(target=self._accept, daemon=True).start()

    def drop_all(self) -> None:
        """Cut every connection."""
        for pair in self._pairs:
            _cut(*pair)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            time.sleep(0.05)  # what came over the last connection has been counted by now
            self.began()
            try:
                if self.is_closed:
                    raise ConnectionRefusedError
                broker = socket.create_connection((HOST, self._port), 5)
            except OSError:
                client.close()
                continue
            for one in (client, broker):
                one.settimeout(None)
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.down.append(0)
            self._pairs = [(client, broker)]
            threading.Thread(target=self._pass, args=(client, broker, None), daemon=True).start()
            threading.Thread(target=self._pass, args=(broker, client, len(self.down) - 1), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, number: int | None) -> None:
        """Read and write apart, so that a delay holds nothing up; ``number``: of the connection, to the client."""
        late: queue.Queue[tuple[float, bytes]] = queue.Queue()
        threading.Thread(target=self._write, args=(late, source, target, number), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                late.put((time.monotonic() + self.delay, data))
        late.put((time.monotonic() + self.delay, b""))

    def _write(
        self,
        late: queue.Queue[tuple[float, bytes]],
        source: socket.socket,
        target: socket.socket,
        number: int | None,
    ) -> None:
        left = self.budget() if number is not None else None
        while True:
            due, data = late.get()
            time.sleep(max(0.0, due - time.monotonic()))
            ends = not data or (left is not None and len(data) >= left)
            if left is not None:
                data, left = data[:left], left - len(data)
            with contextlib.suppress(OSError):
                target.sendall(data)
                if number is not None:
                    self.down[number] += len(data)
            if ends and number is None:
                _cut(source, target)
            elif ends:
                self.cuts += left is not None and left <= 0
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)  # a reset would take away what came and is not read yet
                _cut(source)
            if ends:
                return


def _cut(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


class Counted:
    """A device's channel that knows how many bytes of files came, and how many of them for the second time."""

    def __init__(self, channel: Channel, tally: Tally) -> None:
        self._channel = channel
        self._tally = tally

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, reply_to: str = "", correlation: bytes = b""
    ) -> Receipt:
        if reply_to:
            self._tally.asked(correlation, payload)
        return self._channel.publish(topic, payload, retain=retain, reply_to=reply_to, correlation=correlation)

    def subscribe(self, pattern: str, on_arrival: Callable[[Arrival], None]) -> None:
        def counted(arrival: Arrival) -> None:
            if arrival.correlation:
                self._tally.came(arrival)
            on_arrival(arrival)

        self._channel.subscribe(pattern, counted)

    def is_connected(self, seconds: float = 0.0) -> bool:
        return self._channel.is_connected(seconds)

    def when_back(self, call: Callable[[Back], None]) -> None:
        self._channel.when_back(call)

    def close(self) -> None:
        self._channel.close()


class Tally:
    """Bytes of files that came for the first time, and again."""

    def __init__(self) -> None:
        self.fresh = self.repeated = 0
        self._questions: dict[bytes, messages.BlockRequest] = {}
        self._have: dict[str, list[tuple[int, int]]] = {}

    def asked(self, correlation: bytes, payload: bytes) -> None:
        self._questions[correlation] = messages.decode(payload, messages.BlockRequest)

    def came(self, arrival: Arrival) -> None:
        question = self._questions[arrival.correlation]
        length = len(messages.decode_block(arrival.payload).data)
        if question.path.startswith("metadata/timestamp"):
            self.fresh += length  # asked for at every update, and another one each time
            return
        start, end = question.offset, question.offset + length
        had = self._have.setdefault(question.path, [])
        again = sum(max(0, min(end, high) - max(start, low)) for low, high in had)
        self.repeated += min(again, length)
        self.fresh += length - min(again, length)
        self._have[question.path] = _merged([*had, (start, end)])


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


@contextlib.contextmanager
def lossy_link(share: float, delay: float, seed: int) -> Iterator[socket.socket]:
    """Give a listening socket that is reached at FAR over a link which loses packets, both ways, and delays each.

    Raises:
        OSError: this is no Linux, or we are not root there.
    """
    near = _tun("ekbench0")
    try:
        _configure("ekbench0", NEAR)
        made: queue.Queue[tuple[int, socket.socket] | OSError] = queue.Queue()
        threading.Thread(target=lambda: made.put(_far_end()), daemon=True).start()
        got = made.get()
        if isinstance(got, OSError):
            raise got
        far, listener = got
        stop = threading.Event()
        carrier = threading.Thread(target=_carry, args=((near, far), share, delay, lots(seed), stop))
        carrier.start()
        try:
            yield listener
        finally:
            stop.set()
            carrier.join()
            listener.close()
            os.close(far)
    finally:
        os.close(near)


def _far_end() -> tuple[int, socket.socket] | OSError:
    """Make a network of this thread's own, with the other end of the link and a socket that listens there."""
    try:
        if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET of linux/sched.h
            return OSError(ctypes.get_errno(), "no network of its own")
        far = _tun("ekbench1")
        _configure("ekbench1", FAR)
        return far, socket.create_server((FAR, 0))
    except OSError as error:
        return error


def _tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))  # TUNSETIFF: TUN, no header
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _configure(name: str, address: str) -> None:
    for command in (["addr", "add", f"{address}/24", "dev", name], ["link", "set", name, "up"]):
        try:
            subprocess.run(["ip", *command], check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            raise OSError(error.returncode, error.stderr.decode().strip()) from error


def _carry(ends: tuple[int, int], share: float, delay: float, draw: random.Random, stop: threading.Event) -> None:
    """Carry packets between both ends, but for those that the lot loses."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    late: list[tuple[float, int, bytes]] = []
    while not stop.is_set():
        wait = min(0.2, max(0.0, late[0][0] - time.monotonic())) if late else 0.2
        for end in select.select(ends, [], [], wait)[0]:
            packet = os.read(end, 65536)
            if draw.random() >= share:
                late.append((time.monotonic() + delay, other[end], packet))
        while late and late[0][0] <= time.monotonic():
            _, target, packet = late.pop(0)
            with contextlib.suppress(OSError):
                os.write(target, packet)
