"""Real brokers on free ports, for one test each: Mosquitto where it is installed, the embedded one, and memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time

import pytest

from edgekit.ota import mqtt
from edgekit.ota.memory import MemoryBroker
from edgekit.ota.server.broker import embedded

KINDS = ["memory", "iotcore", "mosquitto"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Mosquitto:
    """A Mosquitto that can be stopped and started again on the same port."""

    def __init__(self, folder, lines=("allow_anonymous true",), scheme="mqtt"):
        self.port = free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if self._program is None:
            pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
        self._config = folder / "mosquitto.conf"
        self._config.write_text("\n".join([f"listener {self.port} 127.0.0.1", *lines]) + "\n")
        self._process = None

    def start(self):
        self._process = subprocess.Popen(
            [self._program, "-c", str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            time.sleep(0.02)
        raise AssertionError("mosquitto did not come up")

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


@contextlib.contextmanager
def unmeasured():
    """Start no coverage in the processes that begin here: its handler keeps a native loop from ending at SIGTERM."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("COVERAGE")}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def running(kind, folder):
    """Run a broker and give a function that connects a client id to it."""
    opened = []
    with contextlib.ExitStack() as stack:
        if kind == "memory":
            connect = MemoryBroker().connect
        else:
            with unmeasured():
                broker = embedded() if kind == "iotcore" else Mosquitto(folder)
                made = stack.enter_context(broker)
            url = made if isinstance(made, str) else made.url

            def connect(client_id, will=None):
                return mqtt.connect(url, client_id, will=will)

        def remembered(client_id, will=None):
            opened.append(connect(client_id, will=will))
            return opened[-1]

        try:
            yield remembered
        finally:
            for channel in opened:
                channel.close()
