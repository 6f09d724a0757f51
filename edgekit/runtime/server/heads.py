"""What has arrived of a request, and heads that a client sends again, byte for byte. Knows no socket and no parser."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

from edgekit.runtime.server.exchange import HttpError, Request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

END = b"\r\n\r\n"
LONGEST_KEPT = 4 << 10
"""A longer head is parsed each time: what is kept of a thousand connections must stay small."""


class Head:
    """What has arrived of a request."""

    __slots__ = ("begun", "head_size", "headers", "keep", "method", "path", "pieces", "segments", "size", "url",
                 "version")  # fmt: skip

    def __init__(self) -> None:
        self.url = b""
        self.path = ""
        self.segments: tuple[str, ...] = ()
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.size = self.head_size = 0
        self.begun = False  # to be answered, piece by piece
        self.method = ""
        self.version = "1.1"
        self.keep = False

    def find_path(self) -> None:
        """Read the path from the address."""
        path = self.url.partition(b"?")[0].decode("latin-1")
        self.path = unquote(path) if "%" in path else path
        self.segments = tuple(filter(None, self.path.split("/")))

    def request(self, disconnected: Callable[[], Awaitable[None]]) -> Request:
        """Return what an application gets of it."""
        pieces = self.pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return Request(self.method, self.segments, self.headers, body, disconnected)


NOTHING = Head()
"""Stands where no request is being received; nobody writes to it."""


class Repeated:
    """A head that came whole, with its body, in one piece: clients that keep a connection send the same one again.

    Parsed once it is only compared from then on, which halves what HTTP costs a small request: 10 us for 20.
    """

    __slots__ = ("_head", "raw", "size")

    def __init__(self, raw: bytes, head: Head) -> None:
        self._head = head
        self.raw = raw
        self.size = len(raw) + head.size
        """Of the head and its body, in bytes."""

    @staticmethod
    def of(piece: memoryview, head: Head) -> Repeated | None:
        """Remember the head of a piece that was one request from its first byte to its last; None where it cannot be.

        What stands around a request, such as empty lines, and what it says of more than itself is left to the parser.
        """
        length = len(piece) - head.size
        if not 0 < length <= LONGEST_KEPT or not head.keep or head.version != "1.1":
            return None
        if any(name in head.headers for name in (b"transfer-encoding", b"expect", b"upgrade")):
            return None
        raw = bytes(piece[:length])
        return Repeated(raw, head) if raw.find(END) == length - len(END) else None

    def again(self) -> Head:
        """Return the same head, whose body is yet to come."""
        known, head = self._head, Head()
        head.url, head.path, head.segments = known.url, known.path, known.segments
        head.headers, head.method, head.keep = known.headers, known.method, True
        return head


def refuse_body(headers: Mapping[bytes, bytes], longest: int) -> None:
    """Look at what headers say of a body that has not arrived.

    Raises:
        HttpError: it is too long, or compressed.
    """
    claimed = headers.get(b"content-length", b"0")
    if not claimed.isdigit() or int(claimed) > longest:
        raise HttpError(413, f"the body has {claimed.decode('latin-1')} bytes, at most {longest} are taken")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise HttpError(415, "compressed bodies are not taken: send it as it is")
