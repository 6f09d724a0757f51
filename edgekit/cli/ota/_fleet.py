"""What the fleet's commands share: opening a fleet folder, reading shares, being stopped, foreign text."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing, contextmanager
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


DATABASE, BY = "edgekit.database", "edgekit.by"


def folder(command: Command) -> Command:
    """Add the argument FLEET, and the flags that `open_store` reads: where the database is, and who asks."""
    for flag, variable, what in (
        ("--by", "EDGEKIT_BY", "Who does this, for the audit log. [default: the system's name of the user]"),
        ("--database", "EDGEKIT_DATABASE", "postgresql+psycopg://… [default: what `ota init` was told, or a file]"),
    ):
        command = click.option(flag, envvar=variable, expose_value=False, callback=_keep, help=what)(command)
    return click.argument("fleet", type=click.Path(path_type=Path))(command)


def _keep(context: click.Context, option: click.Parameter, value: str | None) -> None:
    context.meta[f"edgekit.{option.name}"] = value


def told(key: str) -> str:
    """Return what the flag of that key said; empty where it said nothing."""
    context = click.get_current_context(silent=True)
    return str((context.meta.get(key) if context else None) or "")


def operator() -> str:
    """Name whoever runs this command: what --by says, else the system's name of the user."""
    import getpass

    try:
        return told(BY) or getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"user {os.getuid()}"


def open_store(folder: Path, *, who: str | None = None) -> Store:
    """Open the database of a fleet folder in the name of `operator`, or of ``who``: empty for the service itself.

    Raises:
        UsageError: there is no fleet in that folder, or its database is not where the flag says.
    """
    from edgekit.ota.server import publisher, whereabouts
    from edgekit.ota.server.store import Store

    publisher.root(folder)
    place, name = whereabouts.find(folder, told(DATABASE))
    return Store(place, name, who=operator() if who is None else who)


def reach(folder: Path) -> None:
    """Open the database and close it again, before something is done that is to be recorded there; see `open_store`."""
    open_store(folder).close()


def record(folder: Path, action: str, subject: str, **details: object) -> None:
    """Write into the audit log what was done to a fleet beside its database."""
    with closing(open_store(folder)) as store:
        store.audit(action, subject, details)


def broker_files(command: Command) -> Command:
    """Add the flags that `tls` reads."""
    for flag, what in (
        ("--broker-key", "Key of that certificate (PEM)."),
        ("--broker-cert", "Come to the broker with this certificate (PEM)."),
        ("--broker-ca", "Take the broker's certificate from this authority only (PEM). [default: the system's]"),
    ):
        command = click.option(flag, type=click.Path(path_type=Path, dir_okay=False), help=what)(command)
    return click.option(
        "--allow-plain",
        is_flag=True,
        envvar="EDGEKIT_ALLOW_PLAIN",
        help="Reach a broker beyond this machine without TLS, or without a client certificate.",
    )(command)


def tls(flags: dict[str, Any], broker: str | None) -> Tls | None:
    """Take the flags of `broker_files` out of others, and return what they say.

    Raises:
        UsageError: a certificate without its key, or the other way round; a broker that must not be trusted so.
    """
    from edgekit.ota.mqtt import Tls, require_protected

    ca, certificate, key = (flags.pop(name) for name in ("broker_ca", "broker_cert", "broker_key"))
    if bool(certificate) != bool(key):
        raise UsageError("a certificate comes with its key", "give --broker-cert and --broker-key together")
    told = Tls(ca, certificate, key) if ca or certificate else None
    if not flags.pop("allow_plain") and broker:
        require_protected(broker, told)
    return told


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
