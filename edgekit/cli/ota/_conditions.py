"""When a device may load what, and over which HTTPS, from the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.ota.device.gate import Gate
    from edgekit.ota.device.sources import Https
    from edgekit.ota.mqtt import Tls

    Command = TypeVar("Command", bound=Callable[..., Any])

UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3}


def options(command: Command) -> Command:
    """Add the flags that `gate` and `https` read."""
    pem = click.Path(path_type=Path, dir_okay=False)
    for add in reversed(
        (
            click.option("--bandwidth", help="Load at most so many bytes a second: 500k, 2M. [default: no limit]"),
            click.option(
                "--window",
                multiple=True,
                help="Load and change the model at this time of day only: 22:00-06:00, with a Z in UTC; repeatable.",
            ),
            click.option("--metered", is_flag=True, help="The link costs money: load no blobs over it …"),
            click.option("--allow-metered-below", default="0", help="… but for updates of fewer bytes: 300k."),
            click.option(
                "--allow-volatile",
                is_flag=True,
                envvar="EDGEKIT_ALLOW_VOLATILE",
                show_envvar=True,
                help="Take a state folder in memory (tmpfs), which a power cut empties.",
            ),
            click.option(
                "--https-ca", help="Authority of HTTPS servers (PEM), or the word system. [default: --broker-ca]"
            ),
            click.option("--https-cert", type=pem, help="Come to HTTPS servers with it. [default: --broker-cert]"),
            click.option("--https-key", type=pem, help="Key of that certificate. [default: --broker-key]"),
        )
    ):
        command = add(command)
    return command


def gate(flags: dict[str, Any], state: Path) -> Gate:
    """Take the flags of a policy out of all flags, and return what holds a device to it.

    Raises:
        UsageError: one of them says nothing.
        ResourceError: the state folder lies in memory.
    """
    from edgekit.ota.device.disks import require_lasting
    from edgekit.ota.device.gate import Gate
    from edgekit.ota.device.policy import Policy, parse_window

    if not flags.pop("allow_volatile"):
        require_lasting(state)
    bandwidth = flags.pop("bandwidth")
    policy = Policy(
        windows=tuple(map(parse_window, flags.pop("window"))),
        bandwidth=size(bandwidth) if bandwidth else 0,
        is_metered=flags.pop("metered"),
        metered_below=size(flags.pop("allow_metered_below")),
    )
    if bandwidth and not policy.bandwidth:
        raise UsageError("a bandwidth of nothing lets nothing come", "leave --bandwidth out, or name a rate: 500k")
    return Gate(policy, state)


def https(flags: dict[str, Any], broker: Tls | None) -> Https:
    """Take the flags of HTTPS out of all flags; what they leave out is as over MQTT.

    Raises:
        UsageError: a certificate without its key, or a file that is none.
    """
    from edgekit.ota.device.https import trusting
    from edgekit.ota.device.sources import Https
    from edgekit.ota.mqtt import Tls

    ca, certificate, key = (flags.pop(name) for name in ("https_ca", "https_cert", "https_key"))
    if bool(certificate) != bool(key):
        raise UsageError("a certificate comes with its key", "give --https-cert and --https-key together")
    tls = broker
    if certificate:
        tls = replace(tls or Tls(), certificate=certificate, key=key)
    if ca:
        tls = replace(tls or Tls(), ca=None if ca == "system" else Path(ca))
    return Https(trusting(tls))


def size(text: str) -> int:
    """Read a number of bytes: ``500k``, ``1.5M``, ``2G``.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([kMG]?)", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no number of bytes", "write it as 500k, 1.5M or 2G")
    return int(float(match[1]) * UNITS[match[2]])
