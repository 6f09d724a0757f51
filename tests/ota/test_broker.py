"""The embedded broker: on the loopback interface only, and honest about a port that is taken."""

import socket
from pathlib import Path

import pytest
from fakes.fleets import eventually

from edgekit.errors import ResourceError
from edgekit.ota import mqtt
from edgekit.ota.server.broker import embedded


def test_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=str(port)) as caught, embedded(port):
            pass
    assert "--port" in caught.value.hint


@pytest.mark.slow
def test_broker_listens_on_the_loopback_interface_only_and_is_gone_afterwards():
    with embedded() as url:
        port = int(url.rpartition(":")[2])
        channel = mqtt.connect(url, "one")
        got = []
        channel.subscribe("a", got.append)
        eventually(lambda: (channel.publish("a", b"x"), got)[1])
        channel.close()
        lines = Path("/proc/net/tcp").read_text().splitlines()
        listening = [line.split()[1] for line in lines if f":{port:04X} 00000000:0000" in line]
        assert listening == [f"0100007F:{port:04X}"]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)
