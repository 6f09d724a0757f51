"""Writes the configuration of a Mosquitto that lets each device at its own topics only. Pure; starts nothing.

Who a client is says its certificate, never what it sends: its common name is its user name and its client id, so that
nobody takes another's connection over. https://mosquitto.org/man/mosquitto-conf-5.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.ota import messages
from edgekit.ota.messages import MAX_BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FROM_DEVICES, TO_DEVICES = ("hello", "report", "request"), ("desired", "blocks")
PACKET_BYTES = MAX_BLOCK_BYTES + (16 << 10)
"""A block with its properties: the largest message there is."""
QUEUED = 64
"""So many messages wait for a device that is away or slow; states are retained, and blocks are asked for again."""


@dataclass(frozen=True)
class Place:
    """Where the broker listens, and its files in PEM: whose clients it takes, and who it is."""

    address: str
    port: int
    ca: Path
    certificate: Path
    key: Path
    revoked: Path | None = None
    """The certificates that are no longer good; it reads them again when it gets SIGHUP."""


def config(place: Place, acl: Path) -> str:
    """Return ``mosquitto.conf``: mutual TLS 1.2 or newer, nobody without a certificate, bounded messages and queues.

    Raises:
        UsageError: a path that its lines cannot hold.
    """
    lines = {
        "listener": f"{place.port} {place.address}",
        "cafile": place.ca,
        "certfile": place.certificate,
        "keyfile": place.key,
        **({"crlfile": place.revoked} if place.revoked else {}),
        "tls_version": "tlsv1.2",
        "require_certificate": "true",
        "use_identity_as_username": "true",
        "use_username_as_clientid": "true",
        "allow_anonymous": "false",
        "acl_file": acl,
        "max_packet_size": PACKET_BYTES,
        "max_queued_messages": QUEUED,
    }
    for name, value in lines.items():
        if "\n" in str(value) or str(value) != str(value).strip():
            raise UsageError(f"{name} {str(value)!r} cannot stand in Mosquitto's configuration", "rename it")
    return "".join(f"{name} {value}\n" for name, value in lines.items())


def acl(fleet: str, servers: Sequence[str], groups: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the access rules: a device reads and writes what lies under its own name, servers what they answer.

    ``servers`` are the one, or the workers that share its work: each has a name and a certificate of its own, for a
    second client of the same name ends the connection of the first. ``groups`` names each group's devices, which read
    what it is to run. A change of them needs the rules written anew.

    Raises:
        MessageError: the fleet, the server, a group or a device is named in a way that could change a topic.
        UsageError: a device is called as the server is.
    """
    lines = [line for server in servers for line in _of_server(fleet, server)]
    lines += _of_members(fleet, servers, groups or {})
    own = messages.topic(fleet, "+", "").replace("+", "%u")
    lines += [f"pattern read {own}{leaf}" for leaf in (*TO_DEVICES, "hello")]  # of its own life it hears, too
    lines += [f"pattern write {own}{leaf}" for leaf in FROM_DEVICES]
    return "\n".join(lines) + "\n"


def _of_server(fleet: str, server: str) -> list[str]:
    messages.topic(fleet, server, "hello")
    return [
        f"user {server}",
        *(f"topic read {messages.topic(fleet, '+', leaf)}" for leaf in FROM_DEVICES),
        *(f"topic write {messages.topic(fleet, '+', leaf)}" for leaf in TO_DEVICES),
        f"topic write {messages.group_topic(fleet, '+')}",
    ]


def _of_members(fleet: str, servers: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what no pattern can say: which device is in which group."""
    lines = []
    for device in sorted({device for members in groups.values() for device in members}):
        messages.topic(fleet, device, "hello")
        if device in (*servers, "+"):
            raise UsageError(f"a device of a group is called {device!r}", "take it out of its groups")
        lines.append(f"user {device}")
        mine = (name for name in sorted(groups) if device in groups[name])
        lines += [f"topic read {messages.group_topic(fleet, name)}" for name in mine]
    return lines
