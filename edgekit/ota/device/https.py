"""Reads a repository over HTTPS, from any offset on, and takes up again what breaks off. Writes no file.

Trusts nothing that it delivers, as `fetchers` does: whoever asked compares hashes and stops at the signed length.
Speaks to no other scheme, whatever it is redirected to; plain HTTP reaches this machine alone.
"""

from __future__ import annotations

import functools
import http.client
import io
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import edgekit
from edgekit.errors import TransferError, UsageError
from edgekit.ota.device.fetchers import MissingFile, Patience
from edgekit.ota.device.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgekit.ota.mqtt import Tls

PIECE_BYTES = 256 << 10
LEAST_PROGRESS = 16 << 10
"""A connection that breaks after fewer bytes counts as a failure: a byte each would keep a device busy for ever."""
MISSING = (403, 404)
"""Stores of objects answer 403 for what is not there where listing is not allowed."""
BEYOND = 416
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class HttpFetcher:
    """Reads files below a URL with Range; ``context`` says whom to trust over HTTPS and who this device is.

    ``clock`` tells seconds; ``is_stopped`` is asked before each new try.
    """

    def __init__(
        self,
        url: str,
        patience: Patience | None = None,
        context: ssl.SSLContext | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.clock: Callable[[], float] = time.monotonic
        self._url = url
        self._patience = patience or Patience()
        self._context = context
        self._is_stopped = is_stopped

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes asked for; see `Fetcher`. After a break only what is missing is asked for."""
        url = self._url + urllib.parse.quote(path, safe="/%:~[]")
        _require_allowed(url)
        failures = 0
        while start < end:
            before = start
            try:
                for piece in self._once(url, start, end):
                    start += len(piece)
                    yield piece
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: it leads to no URL
                failures = 1 if start - before >= LEAST_PROGRESS else failures + 1
                if self._is_stopped() or failures >= self._patience.attempts:
                    raise TransferError(f"{url} broke off at byte {start}: {_told(error)}", "try again") from error
            else:
                return

    def _once(self, url: str, start: int, end: int) -> Iterator[bytes]:
        headers = {
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": f"edgekit/{edgekit.__version__}",
        }
        asked = urllib.request.Request(url, headers=headers)  # noqa: S310  # the opener knows no scheme but these two
        try:
            answer = self._opener().open(asked, timeout=self._patience.seconds)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == BEYOND:
                return
            if error.code in MISSING:
                raise MissingFile(f"the repository has no {url}", "publish it: edgekit ota publish") from error
            if error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                raise  # it may pass: asked again
            raise TransferError(
                f"{url} is answered with {error.code} {error.reason}", "see the server's log"
            ) from error
        with answer:
            yield from _from(answer, start, end)

    def _trust(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = ssl.create_default_context()
        return self._context

    def _opener(self) -> urllib.request.OpenerDirector:
        """Return what opens HTTP and HTTPS and nothing else: the usual one would read files and FTP, too."""
        pace = Pace(self._patience.least_rate, self._patience.rate_seconds)
        answers = functools.partial(_Answer, pace, self.clock)
        opener = urllib.request.OpenerDirector()
        for part in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
            _Connections(answers, self._trust),
        ):
            opener.add_handler(part)
        return opener


def trusting(tls: Tls | None) -> ssl.SSLContext | None:
    """Return whom to believe and who we are, over HTTPS, from files in PEM; ``None``: the system's authorities, nobody.

    Raises:
        UsageError: a file is missing or no such thing.
    """
    if tls is None:
        return None
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = ", ".join(str(path) for path in (tls.ca, tls.certificate, tls.key) if path is not None)
        raise UsageError(f"these certificates cannot be used: {error} ({files})", "give PEM files") from error
    return context


def is_allowed(url: str) -> bool:
    """Say whether a URL is read at all: over HTTPS, or over plain HTTP from this very machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)


def _require_allowed(url: str) -> None:
    if not is_allowed(url):
        raise TransferError(f"{url} is not read: it is not https", "give an https:// URL")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https alone; from plain HTTP of this machine also to the same."""

    def redirect_request(self, req: urllib.request.Request, fp: Any, *told: Any) -> urllib.request.Request | None:  # noqa: ANN401  # as urllib has it
        _require_allowed(told[-1])
        if req.type == "https" and not told[-1].startswith("https:"):
            raise TransferError(f"{req.full_url} leads to {told[-1]}, which is not https", "see the server's settings")
        return super().redirect_request(req, fp, *told)


class _Connections(urllib.request.AbstractHTTPHandler):
    """Opens connections whose answers are timed while they trickle in, heads included."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, answers: Callable[..., _Answer], trust: Callable[[], ssl.SSLContext]) -> None:
        super().__init__()
        self._answers = answers
        self._trust = trust

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._plain, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._secure, req)

    def _plain(self, host: str, **options: Any) -> http.client.HTTPConnection:  # noqa: ANN401  # as urllib has it
        connection = http.client.HTTPConnection(host, **options)
        connection.response_class = self._answers  # type: ignore[assignment]  # the same
        return connection

    def _secure(self, host: str, **options: Any) -> http.client.HTTPConnection:  # noqa: ANN401  # as urllib has it
        connection = http.client.HTTPSConnection(host, context=self._trust(), **options)
        connection.response_class = self._answers  # type: ignore[assignment]  # the same
        return connection


class _Answer(http.client.HTTPResponse):
    """An answer of which every byte is timed."""

    def __init__(self, pace: Pace, clock: Callable[[], float], *connection: Any, **told: Any) -> None:  # noqa: ANN401  # as http.client has it
        super().__init__(*connection, **told)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), pace, clock))


class _Timed(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, pace: Pace, clock: Callable[[], float]) -> None:
        self._raw = raw
        self._pace = pace
        self._clock = clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:  # noqa: ANN401  # as io has it
        began = self._clock()
        size: int | None = self._raw.readinto(buffer)
        self._pace.took(self._clock() - began, size or 0)
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def _from(answer: http.client.HTTPResponse, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes from ``start`` to ``end``, also where the server gives the whole file."""
    coding = answer.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise TransferError(f"{answer.url} answers with {coding}, which nobody asked for", "see the server's log")
    at = start if _begins_at(answer, start) else 0
    while at < end and (piece := answer.read1(min(PIECE_BYTES, end - at))):
        if at + len(piece) > start:
            yield piece[max(0, start - at) :]
        at += len(piece)
    if at < end and (answer.length or at < _told_end(answer)):
        raise http.client.IncompleteRead(b"", answer.length)


def _begins_at(answer: http.client.HTTPResponse, start: int) -> bool:
    told = answer.headers.get("Content-Range", "")
    if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
        return False
    if not told.startswith(f"bytes {start}-"):
        raise TransferError(f"{answer.url} answers with the range {told!r}, asked from {start}", "see the server's log")
    return True


def _told_end(answer: http.client.HTTPResponse) -> int:
    """Return the byte behind the last one that the answer's range names: a cut tells itself by it without a length."""
    last = answer.headers.get("Content-Range", "").partition("-")[2].partition("/")[0]
    return int(last) + 1 if last.isdecimal() and len(last) < 20 else 0


def _told(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return str(error)
    return str(getattr(error, "reason", "")) or str(error) or type(error).__name__
