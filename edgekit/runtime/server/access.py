"""Who may ask: bearer tokens and certificates. Knows no route but those that say whether the server lives."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.runtime.server.exchange import HttpError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping
    from pathlib import Path

OPEN = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""What tells no more than that the server is there: load balancers and systemd ask it without a token."""
MIN_TOKEN = 16
MAKE = "make one: python -c 'import secrets; print(secrets.token_urlsafe())'"
MAX_FILE = 1 << 20
WITHOUT = HttpError(
    401, "this server wants a token: Authorization: Bearer …", "invalid_api_key", ((b"www-authenticate", b"Bearer"),)
)


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files: the server's certificate and key, and, where clients need a certificate too, who signs those."""

    certificate: Path
    key: Path
    clients: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Read them.

        Raises:
            UsageError: a file is missing, no PEM, or the key is another's.
        """
        import ssl  # 3 MiB that a server without needs not

        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
            if self.clients:
                context.load_verify_locations(self.clients)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # ssl.SSLError is one
            files = ", ".join(str(one) for one in (self.certificate, self.key, self.clients) if one)
            raise UsageError(
                f"TLS cannot be set up from {files}: {error}", "give PEM files that belong together"
            ) from error
        return context


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask. ``tokens`` are the SHA-256 of those that are taken, none where nobody needs one."""

    tokens: tuple[bytes, ...] = ()
    tls: Tls | None = None

    @property
    def is_open(self) -> bool:
        """Say whether anybody who reaches the port may ask."""
        return not self.tokens and not (self.tls and self.tls.clients)

    def refuse_stranger(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Raise HttpError 401 where a token is wanted and none of those taken is given."""
        if not self.tokens or path in OPEN:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        known = [hmac.compare_digest(given, one) for one in self.tokens]  # all, so that time tells nothing
        if scheme.lower() != b"bearer" or not any(known):
            raise WITHOUT


def read_tokens(path: Path) -> tuple[bytes, ...]:
    """Read a file of tokens, one a line, ``#`` before a comment; return their SHA-256.

    Raises:
        UsageError: the file cannot be read, holds none, or one that could be guessed.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_FILE).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the tokens in {path} cannot be read: {error}", "give a text file, one token a line"
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not found:
        raise UsageError(f"{path} holds no token", MAKE)
    for number, token in enumerate(found, 1):
        if len(token) < MIN_TOKEN or not token.isascii() or " " in token:
            raise UsageError(
                f"token {number} of {path} has {len(token)} characters, {MIN_TOKEN} and more of ASCII are wanted", MAKE
            )
    return tuple(hashlib.sha256(token.encode()).digest() for token in found)


def is_loopback(address: str) -> bool:
    """Say whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
