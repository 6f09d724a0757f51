"""Heads that come again are compared, not parsed: the answers must be those of a parser that sees every byte."""

import asyncio
import socket
import ssl

import pytest
from fakes import certificates
from hypothesis import given
from hypothesis import strategies as st

from edgekit.runtime.server import Limits, connection, connections
from edgekit.runtime.server.exchange import HttpError, Response
from edgekit.runtime.server.heads import LONGEST_KEPT, Head, Repeated

POST = b"POST /a%20b/c?d=e HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"


class Echo:
    """Tells what it was asked; a token that is no longer taken is refused before the body is read."""

    def __init__(self):
        self.taken = True

    def admit(self, path, headers):
        if not self.taken:
            raise HttpError(401, "no longer")

    def respond(self, request):
        return Response(repr((request.method, request.path, sorted(request.headers.items()), request.body)).encode())

    def refuse(self, request, error):
        return Response(repr((request.path, error.message)).encode(), error.status)


class Wire:
    """A transport that remembers what was written."""

    def __init__(self):
        self.written = b""
        self.closed = False

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    abort = write_eof = close

    def can_write_eof(self):
        return True


class Client:
    """A connection, what it answered, and how often it compared a head."""

    def __init__(self, app=None, limits=None):
        self.everyone = connections.Connections(app or Echo(), limits or Limits())
        self.everyone.date = lambda: b"date: today\r\n"
        self.connection = connection.Connection(self.everyone)
        self.wire = Wire()
        self.connection.connection_made(self.wire)
        self.compared = 0
        take_again = self.connection._take_again

        def counted(known, body):
            self.compared += 1
            take_again(known, body)

        self.connection._take_again = counted

    def send(self, piece, step=7):
        """Give a piece as asyncio does, into a buffer that holds others' bytes behind it; over TLS record by record."""
        buffer = self.connection.get_buffer(-1)
        buffer[:] = b"!" * len(buffer)
        for at in range(0, len(piece), step):
            record = piece[at : at + step]
            buffer[at:][: len(record)] = record  # the rest of the buffer, as asyncio's sslproto hands it on
        self.connection.buffer_updated(len(piece))

    def answer(self, piece):
        before = len(self.wire.written)
        self.send(piece)
        return self.wire.written[before:]


def played(play):
    async def main():
        play()

    asyncio.run(main())


def test_a_head_that_comes_again_is_only_compared():
    def play():
        client = Client()
        first = client.answer(POST + b"12345")
        assert b"('a b', 'c')" in first
        assert client.answer(POST + b"67890") == first.replace(b"12345", b"67890")
        assert client.compared == 1
        assert client.everyone.buffered == 0

    played(play)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (POST + b"12345\r\n", POST + b"\r\n123"),
        (b"\r\n" + POST + b"12345", b"\r\n" + POST + b"\r\n\r\n1"),
        (POST + b"\r\n123", POST + b"\r\n\r\n1"),
        (POST + b"\r\n123\r\n", POST + b"\r\n\r\n1\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n\r\n"),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",) * 2,
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nab",) * 2,
        (b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",) * 2,
        (b"GET / HTTP/1.1\nHost: x\n\n", b"GET / HTTP/1.1\nHost: x\n\n"),
    ],
)
def test_what_stands_around_a_request_is_left_to_the_parser(first, second):
    def play():
        whole, dripping = Client(), Client()
        for piece in (first, second, POST + b"abcde"):
            whole.send(piece)
            for byte in piece:
                dripping.send(bytes([byte]))
        assert whole.wire.written == dripping.wire.written
        assert whole.wire.closed == dripping.wire.closed

    played(play)


PARTS = st.sampled_from(
    [
        POST + b"12345",
        POST + b"\r\n\r\n!",
        POST.replace(b"5", b"0"),
        POST.replace(b"5", b"7") + b"1234567",
        b"GET /x HTTP/1.1\r\n\r\n",
        b"\r\n",
        b"POST /y HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    ]
)


@given(stream=st.lists(st.tuples(PARTS, st.integers(1, 200)), max_size=12))
def test_the_same_bytes_get_the_same_answers_however_they_are_cut(stream):
    """A part is given whole more often than not: those are the ones that are compared."""

    def play():
        cut, dripping = Client(), Client()
        for part, at in stream:
            for piece in filter(None, (part[:at], part[at:])):
                cut.send(piece)
            for byte in part:
                dripping.send(bytes([byte]))
        assert cut.wire.written == dripping.wire.written
        assert cut.everyone.buffered == dripping.everyone.buffered == 0
        assert dripping.compared == 0

    played(play)


def test_who_is_no_longer_taken_is_refused_though_the_head_is_known():
    def play():
        app = Echo()
        client = Client(app)
        client.send(POST + b"12345")
        app.taken = False
        assert client.answer(POST + b"12345").startswith(b"HTTP/1.1 401 ")
        assert client.compared == 1
        assert client.answer(POST + b"12345") == b""

    played(play)


@pytest.mark.parametrize("length", [5, 3000, 17_000, 200_000])
def test_over_tls_each_client_gets_what_it_sent_in_however_many_records(tmp_path, length):
    """A body longer than a record, and head and body in records of their own that come at once."""
    authority = certificates.Authority(tmp_path / "authority")
    issued = authority.issue("127.0.0.1")
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(*issued)
    client_side = ssl.create_default_context(cafile=str(authority.certificate))
    bodies = [b"secret of another client " * 12_000, *(bytes([at]) * length for at in b"ab")]

    def asked(address, body):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        talk = client_side.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        got = b""
        with socket.create_connection(address, timeout=10) as link:

            def until(step):
                while True:
                    try:
                        return step()
                    except ssl.SSLWantReadError:
                        link.sendall(outgoing.read())
                        incoming.write(link.recv(65536))

            until(talk.do_handshake)
            for _ in range(2):  # the second time the head is known
                talk.write(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
                talk.write(body)
                link.sendall(outgoing.read())
                got = b""
                while len(got.partition(b"\r\n\r\n")[2]) < len(body):
                    got += until(lambda: talk.read(65536))
        return got.partition(b"\r\n\r\n")[2]

    class Mirror(Echo):
        def respond(self, request):
            return Response(request.body)

    async def play():
        everyone = connections.Connections(Mirror(), Limits())
        made = await asyncio.get_running_loop().create_server(
            lambda: connection.Connection(everyone), "127.0.0.1", 0, ssl=server_side
        )
        address = made.sockets[0].getsockname()
        found = [await asyncio.to_thread(asked, address, body) for body in bodies]
        made.close()
        return found

    assert asyncio.run(play()) == bodies


def test_long_heads_are_not_kept():
    head = Head()
    head.keep = True
    raw = b"GET / HTTP/1.1\r\nA: " + b"x" * LONGEST_KEPT + b"\r\n\r\n"
    assert Repeated.of(memoryview(raw), head) is None
    assert Repeated.of(memoryview(raw[:20] + b"\r\n\r\n"), head).size == 24
