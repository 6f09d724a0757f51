"""HTTP/1.1 as clients really speak it: kept, cut up, piled up, slow, too many, too long, gone too soon."""

import asyncio
import json
import resource
import socket
import subprocess
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import ask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.runtime.host import Host
from edgekit.runtime.server import Access, Limits, Options, connection, connections, read_tokens, serve_in_thread
from edgekit.runtime.server.exchange import Response
from edgekit.runtime.server.serving import listen

INFER = "/v2/models/mlp/infer"
BODY = json.dumps({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}).encode()
HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n"
REQUEST = f"{HEAD}\r\n".encode() + BODY
READY = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connection") / "mlp"
    bundles.mlp_bundle(folder)
    host = Host(edgekit.load(folder, threads=1))
    yield host
    host.close()


@pytest.fixture(scope="module")
def url(host):
    with serve_in_thread(host, options=Options(limits=Limits(body=100_000))) as running:
        yield running.url


def connect(url, seconds=20):
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=seconds)


def answers(link, count=1):
    """Read so many responses with a length; return their statuses, headers and bodies."""
    data, found = b"", []
    while len(found) < count:
        while b"\r\n\r\n" not in data:
            piece = link.recv(65536)
            assert piece, f"closed after {len(found)} answers and {data!r}"
            data += piece
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines[1:])
        length = int(headers[b"content-length"])
        while len(data) < length:
            data += link.recv(65536)
        found.append((int(lines[0].split()[1]), headers, data[:length]))
        data = data[length:]
    assert not data
    return found


def is_closed(link):
    return link.recv(65536) == b""


def scores(body):
    return json.loads(body)["outputs"][0]["data"]


WANTED = bundles.mlp_numpy(np.zeros((1, 64)))[0]


def test_a_connection_is_kept_and_answers_each_request_by_itself(url):
    with connect(url) as link:
        for _ in range(3):
            link.sendall(REQUEST)
            ((status, headers, body),) = answers(link)
            assert status == 200
            np.testing.assert_allclose(scores(body), WANTED, atol=1e-5)
            assert b"connection" not in headers
            assert headers[b"date"].endswith(b"gmt")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, len(REQUEST) - 1), max_size=6, unique=True).map(sorted))
def test_a_request_may_arrive_in_any_pieces(url, cuts):
    with connect(url) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *cuts], [*cuts, len(REQUEST)], strict=True):
            link.sendall(REQUEST[start:end])
            time.sleep(0.001)
        ((status, _, body),) = answers(link)
    assert status == 200
    np.testing.assert_allclose(scores(body), WANTED, atol=1e-5)


def test_requests_that_pile_up_are_answered_in_their_order(url):
    with connect(url) as link:
        link.sendall((REQUEST + READY) * 50)
        found = answers(link, 100)
    assert [status for status, _, _ in found] == [200] * 100
    assert all(b'"outputs"' in body for _, _, body in found[::2])
    assert all(b'"ready"' in body for _, _, body in found[1::2])


def test_a_refused_request_is_answered_after_those_before_it(url):
    with connect(url) as link:
        link.sendall(REQUEST + READY + b"nonsense\r\n\r\n")
        found = answers(link, 3)
        assert [status for status, _, _ in found] == [200, 200, 400]
        assert is_closed(link)


def test_chunked_bodies_are_read_and_bounded(url):
    def chunked(pieces):
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)

    with connect(url) as link:
        link.sendall(chunked([BODY[:10], BODY[10:], b""]))
        assert answers(link)[0][0] == 200
        link.sendall(chunked([b"x" * 60_000, b"x" * 60_000]))
        ((status, headers, body),) = answers(link)
        assert status == 413
        assert headers[b"connection"] == b"close"
        assert "longer than 100000 bytes" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("request_line", "closes"),
    [
        (b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", True),
        (b"GET /readyz HTTP/1.0\r\n\r\n", True),
        (b"GET /readyz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
        (b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", False),
    ],
)
def test_a_connection_ends_where_its_client_says_so(url, request_line, closes):
    with connect(url) as link:
        link.sendall(request_line)
        assert answers(link)[0][0] == 200
        if closes:
            assert is_closed(link)
        else:
            link.sendall(READY)
            assert answers(link)[0][0] == 200


def test_head_is_told_the_length_and_gets_no_body(url):
    with connect(url) as link:
        link.sendall(READY.replace(b"GET", b"HEAD") + READY)
        data = b""
        while data.count(b"\r\n\r\n") < 2 or not data.endswith(b"}"):
            data += link.recv(65536)
    first, second, body = data.split(b"\r\n\r\n")
    length = f"content-length: {len(body)}".encode()
    assert length in first
    assert length in second


def test_who_asks_first_whether_to_send_a_body_is_told(url):
    with connect(url) as link:
        link.sendall(f"{HEAD}Expect: 100-continue\r\n\r\n".encode())
        assert link.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        link.sendall(BODY)
        assert answers(link)[0][0] == 200
    with connect(url) as link:
        link.sendall(f"POST {INFER} HTTP/1.1\r\nContent-Length: 100001\r\nExpect: 100-continue\r\n\r\n".encode())
        assert answers(link)[0][0] == 413


def test_this_is_no_proxy(url):
    with connect(url) as link:
        link.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
        assert answers(link)[0][0] == 405


@pytest.mark.parametrize("header", [b"X: " + b"x" * 40_000, b"\r\n".join([b"X%d: y" % n for n in range(9000)])])
def test_giant_headers_are_a_431(url, header):
    with connect(url) as link:
        link.sendall(b"GET /readyz HTTP/1.1\r\n" + header + b"\r\n\r\n")
        assert answers(link)[0][0] == 431
        assert is_closed(link)
    with connect(url) as link:  # one that never ends either
        link.sendall(b"GET /" + b"x" * 50_000)
        assert answers(link)[0][0] == 431


def test_a_client_that_sends_a_refused_body_to_its_end_still_reads_why(url):
    with connect(url) as link:
        link.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n".encode())
        for _ in range(30):
            link.sendall(b"x" * 10_000)
            time.sleep(0.002)
        assert answers(link)[0][0] == 413


def test_a_stranger_is_refused_before_the_body_is_read(host, tmp_path):
    (tmp_path / "tokens").write_text("0123456789-0123456789\n")
    access = Access(tokens=read_tokens(tmp_path / "tokens"))
    with serve_in_thread(host, options=Options(access=access)) as running, connect(running.url) as link:
        link.sendall(f"{HEAD}\r\n".encode())
        ((status, headers, _),) = answers(link)
    assert status == 401
    assert headers[b"www-authenticate"] == b"bearer"


def test_all_bodies_together_are_bounded(host):
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    with serve_in_thread(host, options=Options(limits=Limits(body=1000))) as running:
        links = [connect(running.url) for _ in range(5)]
        for link in links[:4]:
            link.sendall(head + b"x" * 990)
        time.sleep(0.2)
        links[4].sendall(head + b"x" * 990)
        ((status, headers, _),) = answers(links[4])
        assert (status, headers[b"retry-after"]) == (429, b"1")
        links[0].close()  # what it sent is forgotten
        time.sleep(0.1)
        with connect(running.url) as link:
            link.sendall(head + b"x" * 1000)
            assert answers(link)[0][0] == 400
        for link in links:
            link.close()


def test_slow_clients_are_told_and_closed_while_others_are_served(host, monkeypatch):
    """Slow-loris: heads and bodies that trickle in, and clients that say nothing at all."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 1.0)
    with serve_in_thread(host, options=Options(limits=Limits(seconds=1.0))) as running:
        head, body, silent = (connect(running.url) for _ in range(3))
        until = time.monotonic() + 30
        statuses = {}
        head.sendall(b"GET /readyz HTTP/1.1\r\n")
        body.sendall(f"{HEAD}\r\n".encode())
        while len(statuses) < 2 and time.monotonic() < until:
            assert ask(running.url, path="/readyz")[0] == 200
            for name, link, drop in (("head", head, b"X: y\r\n"), ("body", body, b" ")):
                if name in statuses:
                    continue
                link.setblocking(False)  # noqa: FBT003  # its signature
                try:
                    link.send(drop)
                    statuses[name] = int(link.recv(65536).split()[1])
                except BlockingIOError:
                    time.sleep(0.05)
        assert statuses == {"head": 408, "body": 408}
        assert is_closed(silent)
        for link in (head, body, silent):
            link.close()


def test_a_client_that_does_not_read_is_cut_off(host, monkeypatch):
    class Giant:
        def admit(self, path, headers):
            pass

        def respond(self, request):
            return Response(b"x" * (64 << 20))

    async def play():
        everyone = connections.Connections(Giant(), Limits(seconds=0.5))
        made = []

        def make():
            made.append(connection.Connection(everyone))
            return made[-1]

        listener = listen("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(make, sock=listener)
        with socket.create_connection(listener.getsockname()) as link:
            link.sendall(READY * 3)
            await asyncio.sleep(0.1)
            assert len(everyone) == 1
            async with asyncio.timeout(20):
                while len(everyone):  # noqa: ASYNC110  # it tells nobody of each end
                    await asyncio.sleep(0.1)
        server.close()

    asyncio.run(play())


def test_a_failure_that_nobody_foresaw_is_a_500_and_harms_nobody_else(caplog):
    class Broken:
        def admit(self, path, headers):
            pass

        def refuse(self, request, error):
            return Response(str(error).encode(), error.status)

        def respond(self, request):
            if request.path == ("later",):
                return self.later()
            if request.path == ("now",):
                raise KeyError("now")
            return Response(b"good")

        async def later(self):
            raise KeyError("later")

    def asked(address):
        found = []
        for path in (b"later", b"now", b"good"):
            with socket.create_connection(address, timeout=10) as link:
                link.sendall(b"GET /" + path + b" HTTP/1.1\r\n\r\n")
                found.append(answers(link)[0][0])
        return found

    async def play():
        everyone = connections.Connections(Broken(), Limits())
        listener = listen("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(lambda: connection.Connection(everyone), sock=listener)
        found = await asyncio.to_thread(asked, listener.getsockname())
        server.close()
        return found

    assert asyncio.run(play()) == [500, 500, 200]
    assert "KeyError: 'later'" in caplog.text
    assert "KeyError: 'now'" in caplog.text


def test_a_thousand_connections_are_held_and_served(host):
    """Each from its own socket, all open at once; then one too many ends the one that was silent the longest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"this process may open {hard} files at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    with serve_in_thread(host, options=Options(limits=Limits(connections=1000, queue=1000))) as running:
        links = [connect(running.url) for _ in range(1000)]
        for link in links:
            link.sendall(REQUEST)
        for link in links:
            ((status, _, body),) = answers(link)
            assert status == 200
            np.testing.assert_allclose(scores(body), WANTED, atol=1e-5)
        with connect(running.url) as one_more:
            one_more.sendall(REQUEST)
            assert answers(one_more)[0][0] == 200
            still = 0
            for link in links:
                link.settimeout(5)
                try:
                    link.sendall(READY)
                    still += answers(link)[0][0] == 200
                except (AssertionError, ConnectionError):
                    pass
        assert still == 999
        for link in links:
            link.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_all_connections_are_busy_one_more_is_a_503(host):
    with serve_in_thread(host, options=Options(limits=Limits(connections=2))) as running:
        busy = [connect(running.url) for _ in range(2)]
        for link in busy:
            link.sendall(HEAD.encode())  # begun, not ended
        time.sleep(0.2)
        with connect(running.url) as link:
            assert answers(link)[0][0] == 503
        for link in busy:
            link.close()


def test_drain_closes_idle_connections_and_finishes_requests_that_arrive(host):
    running = serve_in_thread(host)
    idle, half = connect(running.url), connect(running.url)
    idle.sendall(READY)
    assert answers(idle)[0][0] == 200
    half.sendall(REQUEST[:-10])
    time.sleep(0.1)
    ending = threading.Thread(target=running.stop)
    ending.start()
    assert is_closed(idle)
    half.sendall(REQUEST[-10:])
    ((status, headers, _),) = answers(half)
    assert (status, headers[b"connection"]) == (200, b"close")
    ending.join(10)
    assert not ending.is_alive()


def test_errors_have_the_shape_of_what_is_spoken_at_the_path(url):
    with connect(url) as link:
        link.sendall(b"POST /v1/classify HTTP/1.1\r\nContent-Length: 100001\r\n\r\n")
        ((status, _, body),) = answers(link)
    assert status == 413
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_curl_speaks_with_it(url, tmp_path):
    (tmp_path / "body").write_bytes(BODY)
    command = ["curl", "-sS", "-f", "--http2", "--data-binary", f"@{tmp_path / 'body'}", f"{url}{INFER}"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=20)
    except FileNotFoundError:
        pytest.skip("curl is not installed")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(scores(done.stdout), WANTED, atol=1e-5)


def served(app, limits=None):
    """Serve an application of the test's own in a thread; return its address, its connections and a way to end."""
    ready, loops = threading.Event(), []

    async def play():
        everyone = connections.Connections(app, limits or Limits())
        listener = listen("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(lambda: connection.Connection(everyone), sock=listener)
        ended = asyncio.Event()
        loops.append((listener.getsockname(), everyone, asyncio.get_running_loop(), ended))
        ready.set()
        await ended.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(play()))
    thread.start()
    assert ready.wait(10)
    address, everyone, loop, ended = loops[0]

    def stop():
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)

    return address, everyone, stop


class Pieces:
    """Streams what each path says."""

    def admit(self, path, headers):
        pass

    def refuse(self, request, error):
        return Response(str(error).encode(), error.status)

    def respond(self, request):
        return Response(getattr(self, request.path[0])()) if request.path[0] != "plain" else Response(b"plain")

    async def slow(self):
        yield b"one"
        await asyncio.sleep(0.3)
        yield b""
        yield b"two"

    async def broken(self):
        yield b"one"
        raise KeyError("broken")


@pytest.fixture
def pieces():
    address, everyone, stop = served(Pieces())
    yield address, everyone
    stop()


def everything(address, data):
    with socket.create_connection(address, timeout=10) as link:
        link.sendall(data)
        found = b""
        while piece := link.recv(65536):
            found += piece
        return found


def test_a_word_to_go_on_waits_for_the_answer_before_it(pieces):
    with socket.create_connection(pieces[0], timeout=10) as link:
        link.sendall(
            b"GET /slow HTTP/1.1\r\n\r\nPOST /plain HTTP/1.1\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
        )
        found = b""
        while not found.endswith(b"100 Continue\r\n\r\n"):
            found += link.recv(65536)
        link.sendall(b"x")
        while not found.endswith(b"plain"):
            found += link.recv(65536)
    stream, _, rest = found.partition(b"0\r\n\r\n")
    assert stream.endswith(b"3\r\none\r\n3\r\ntwo\r\n")
    assert rest.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


def test_a_stream_that_fails_ends_too_soon_and_gets_no_second_status(pieces, caplog):
    found = everything(pieces[0], b"GET /broken HTTP/1.1\r\n\r\n")
    assert found.endswith(b"3\r\none\r\n")
    assert found.count(b"HTTP/1.1") == 1
    assert "KeyError: 'broken'" in caplog.text


def test_a_client_that_leaves_leaves_no_memory_behind(pieces):
    address, everyone = pieces
    for _ in range(5):
        with socket.create_connection(address, timeout=10) as link:
            link.sendall(b"POST /slow HTTP/1.1\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
            link.recv(10)
    deadline = time.monotonic() + 10
    while (len(everyone) or everyone.buffered) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (len(everyone), everyone.buffered) == (0, 0)


def test_clients_that_are_too_many_are_told_and_closed(pieces, monkeypatch):
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.2)
    address, everyone, stop = served(Pieces(), Limits(connections=1))
    with socket.create_connection(address, timeout=10) as busy:
        busy.sendall(b"GET /plain HTTP/1.1\r\n")
        time.sleep(0.2)
        links = [socket.create_connection(address, timeout=10) for _ in range(5)]
        for link in links:
            assert b" 503 " in link.recv(65536)
        time.sleep(0.6)  # they stay, and are cut off
        for link in links:
            try:
                link.sendall(b"x")
                time.sleep(0.05)
                link.sendall(b"x")
            except ConnectionError:
                continue
            pytest.fail("a refused client is still connected")
        assert len(everyone) == 1
    stop()


def test_a_new_client_is_not_the_one_that_makes_room(host):
    with serve_in_thread(host, options=Options(limits=Limits(connections=2))) as running:
        old, new = connect(running.url), connect(running.url)
        for link in (old, new):
            link.sendall(READY)
            answers(link)
        with connect(running.url) as third, connect(running.url) as fourth:
            third.sendall(READY)
            assert answers(third)[0][0] == 200
            fourth.sendall(READY)
            assert answers(fourth)[0][0] == 200
        for link in (old, new):
            link.close()


def test_hundreds_of_offers_in_one_piece_are_answered_each(url):
    offer = b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with connect(url) as link:
        link.sendall(offer * 100)
        assert [status for status, _, _ in answers(link, 100)] == [200] * 100


def test_who_piles_requests_up_without_end_is_refused(url):
    with connect(url) as link:
        link.sendall(READY * 3000)
        found = answers_until_closed(link)
    assert found.count(b"HTTP/1.1 200") >= 128
    assert found.count(b"HTTP/1.1 429") == 1


def answers_until_closed(link):
    found = b""
    while True:
        try:
            piece = link.recv(65536)
        except ConnectionError:
            return found
        if not piece:
            return found
        found += piece


def test_what_comes_behind_chunks_neither_counts_nor_says_anything(url):
    body = BODY + b" " * 40_000
    request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with connect(url) as link:
        link.sendall(request + b"%x\r\n%b\r\n0\r\nX-Checksum: 1\r\nContent-Encoding: gzip\r\n\r\n" % (len(body), body))
        assert answers(link)[0][0] == 200


def test_a_head_that_begins_behind_a_long_body_is_no_long_head(url):
    body = BODY + b" " * 40_000
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with connect(url) as link:
        link.sendall(head + body + READY[:10])
        time.sleep(0.1)
        link.sendall(READY[10:])
        assert [status for status, _, _ in answers(link, 2)] == [200, 200]
