"""How a server is reached, from the command line: address, limits, tokens, certificates."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.runtime.server import Access, Options

    Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(path_type=Path, dir_okay=False)


def options(command: Command) -> Command:
    """Add the flags that `told` reads."""
    for add in reversed(
        (
            click.option("--host", "address", default="127.0.0.1", show_default=True, help="Address to listen on."),
            click.option(
                "--grpc-port",
                type=click.IntRange(0, 65535),
                help="Serve gRPC too, on this port; 0 takes a free one. [default: off]",
            ),
            click.option("--token-file", type=FILE, help="Take requests with one of these bearer tokens only."),
            click.option("--tls-cert", type=FILE, help="Serve HTTPS with this certificate (PEM)."),
            click.option("--tls-key", type=FILE, help="The certificate's key (PEM)."),
            click.option("--tls-client-ca", type=FILE, help="Take clients with a certificate of this authority only."),
            click.option("--without-authentication", is_flag=True, help="Let anybody ask who reaches the address."),
            click.option(
                "--concurrency",
                default=4,
                show_default=True,
                type=click.IntRange(1, 256),
                help="Requests of one model that are computed at once.",
            ),
            click.option(
                "--queue",
                default=64,
                show_default=True,
                type=click.IntRange(0),
                help="Requests of one model that wait.",
            ),
            click.option(
                "--request-timeout",
                default=60.0,
                show_default=True,
                type=click.FloatRange(0, min_open=True),
                help="Seconds until a request is given up.",
            ),
            click.option(
                "--max-body", default=64, show_default=True, type=click.IntRange(1, 4096), help="MiB of a request."
            ),
            click.option("--access-log", is_flag=True, help="Write a line of JSON a request to stderr."),
        )
    ):
        command = add(command)
    return command


def told(*, address: str, grpc_port: int | None, request_timeout: float, **more: Any) -> Options:  # noqa: ANN401  # flags as click typed them
    """Return what the flags say.

    Raises:
        UsageError: files are missing or damaged, or anybody on the network could ask and nobody said that they may.
    """
    from edgekit.runtime.server import Limits, Options

    if more["access_log"]:
        _log()
    access = _access(**more)
    _refuse_open(address, access, allowed=more["without_authentication"])
    limits = Limits(
        body=more["max_body"] << 20, workers=more["concurrency"], queue=more["queue"], seconds=request_timeout
    )
    return Options(address=address, grpc_port=grpc_port, limits=limits, access=access)


def _log() -> None:
    from edgekit.runtime.server.access_log import LOG

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def _access(
    *, token_file: Path | None, tls_cert: Path | None, tls_key: Path | None, tls_client_ca: Path | None, **_: object
) -> Access:
    from edgekit.errors import UsageError
    from edgekit.runtime.server import Access, Tls, read_tokens

    if bool(tls_cert) != bool(tls_key) or (tls_client_ca and not tls_cert):
        raise UsageError("TLS needs a certificate and its key", "give --tls-cert and --tls-key together")
    tls = Tls(certificate=tls_cert, key=tls_key, clients=tls_client_ca) if tls_cert and tls_key else None
    return Access(tokens=read_tokens(token_file) if token_file else (), tls=tls)


def _refuse_open(address: str, access: Access, *, allowed: bool) -> None:
    from edgekit.errors import UsageError
    from edgekit.runtime.server.access import is_loopback

    if access.is_open and not allowed and not is_loopback(address):
        raise UsageError(
            f"anybody who reaches {address} could use the model",
            "give --token-file or --tls-client-ca, or say --without-authentication",
        )
