"""What the fleet's commands share: opening a fleet folder, reading shares, being stopped, foreign text."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgekit.ota.mqtt import Tls
    from edgekit.ota.server.store import Store

    Command = TypeVar("Command", bound=Callable[..., Any])


def open_store(folder: Path) -> Store:
    """Open the database of a fleet folder.

    Raises:
        UsageError: there is no fleet in that folder.
    """
    from edgekit.ota.server import publisher
    from edgekit.ota.server.service import DATABASE
    from edgekit.ota.server.store import Store

    publisher.root(folder)
    return Store(folder / DATABASE)


def broker_files(command: Command) -> Command:
    """Add the flags that `tls` reads."""
    for flag, what in (
        ("--broker-key", "Key of that certificate (PEM)."),
        ("--broker-cert", "Come to the broker with this certificate (PEM)."),
        ("--broker-ca", "Take the broker's certificate from this authority only (PEM). [default: the system's]"),
    ):
        command = click.option(flag, type=click.Path(path_type=Path, dir_okay=False), help=what)(command)
    return command


def tls(flags: dict[str, Any]) -> Tls | None:
    """Take the flags of `broker_files` out of others, and return what they say.

    Raises:
        UsageError: a certificate without its key, or the other way round.
    """
    from edgekit.ota.mqtt import Tls

    ca, certificate, key = (flags.pop(name) for name in ("broker_ca", "broker_cert", "broker_key"))
    if bool(certificate) != bool(key):
        raise UsageError("a certificate comes with its key", "give --broker-cert and --broker-key together")
    return Tls(ca, certificate, key) if ca or certificate else None


def now() -> datetime:
    """Return the time, with its zone."""
    return datetime.now(UTC)


def ago(then: float) -> str:
    """Say how long ago that was, as ``4 s`` or ``3 h``."""
    seconds = max(0.0, time.time() - then)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def plain(text: str, length: int = 80) -> str:
    """Make text that a device wrote safe for a terminal: no control characters, not too long."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


@contextmanager
def stop_signal(also: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """Give what is set when somebody interrupts or terminates this process; ``also`` is called then."""
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        also()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
