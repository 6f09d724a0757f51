"""An embedded MQTT 5 broker for demos, tests and single-machine fleets. Always on the loopback interface.

It has no access rules: whoever reaches the port may say anything, so it is never bound to a network.
A fleet uses Mosquitto with client certificates instead. Knows no message.
"""

from __future__ import annotations

import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import ResourceError
from edgekit.ota.messages import MAX_BLOCK_BYTES
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "mqtt5"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {payload}
max_inflight_count = 100
dynamic_filters = true
"""


@contextmanager
def embedded(port: int = 0) -> Iterator[str]:
    """Run a broker on 127.0.0.1 for the length of the block and give its URL; port 0 takes a free one.

    Raises:
        ResourceError: the port is taken, or the broker does not come up.
    """
    with extra("fleet"):
        from iotcore import Broker
    number = port or _free_port()
    with tempfile.TemporaryDirectory(prefix="edgekit-broker-") as folder:
        config = Path(folder, "broker.toml")
        config.write_text(_CONFIG.format(host=HOST, port=number, payload=4 * MAX_BLOCK_BYTES), encoding="utf-8")
        broker = Broker(config_path=str(config), port=number, listen=HOST)
        try:
            broker.start()
        except (OSError, RuntimeError) as error:
            raise ResourceError(
                f"the embedded broker does not come up on {HOST}:{number}: {error}",
                "stop what listens there, choose another with --port, or use that broker with --broker",
            ) from error
        try:
            yield f"mqtt://{HOST}:{number}"
        finally:
            broker.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
