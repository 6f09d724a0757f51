"""A repository over HTTP: read from any offset, taken up again after breaks, and trusted with nothing."""

import contextlib
import gzip
import hashlib
import http.server
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading

import pytest
from fakes import certificates
from fakes.brokers import free_port
from fakes.fleets import eventually
from fakes.web import mutual, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import TransferError, UsageError
from edgekit.manifest import FileEntry
from edgekit.ota.device.download import download
from edgekit.ota.device.fetchers import MissingFile, Patience
from edgekit.ota.device.https import PIECE_BYTES, HttpFetcher, trusting
from edgekit.ota.mqtt import Tls

DATA = bytes(range(256)) * 4096
LENGTH = len(DATA)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA with Range, and by the first part of the path as a bad server would."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        behaviour = getattr(self, self.path.strip("/").partition("/")[0])
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            behaviour(start, min(end + 1, len(DATA)))

    def answer(self, status, body, told=None, headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if told is None else told))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def part(self, start, end, most=None):
        if start >= len(DATA):
            self.answer(416, b"")
            return
        span = (("Content-Range", f"bytes {start}-{end - 1}/{len(DATA)}"),)
        self.answer(206, DATA[start:end][:most], end - start, span)
        self.close_connection = most is not None

    good = part

    def breaks(self, start, end):  # after 100 kB each time
        self.part(start, end, 100_000)

    def whole(self, _start, _end):
        self.answer(200, DATA)

    def elsewhere(self, start, end):
        self.answer(206, DATA[start:end], headers=(("Content-Range", f"bytes {start + 1}-{end}/{len(DATA)}"),))

    def gone(self, _start, _end):
        self.answer(404, b"not here")

    def hidden(self, _start, _end):
        self.answer(403, b"not yours")

    def wrong(self, _start, _end):
        self.answer(400, b"wrong")

    def ill(self, start, end):  # twice, then well again
        self.server.ill += 1
        if self.server.ill < 3:
            self.answer(503, b"later")
        else:
            self.part(start, end)

    def dead(self, _start, _end):
        self.close_connection = True

    def moved(self, _start, _end):
        self.answer(302, b"", headers=(("Location", self.path.replace("moved", "good")),))

    def packed(self, start, end):
        self.answer(200, gzip.compress(DATA[start:end]), headers=(("Content-Encoding", "gzip"),))

    def endless(self, start, _end):  # says no length, and breaks off after 100 kB each time
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(DATA[start : start + 100_000])

    def grudging(self, start, end):  # a byte a connection
        self.part(start, end, 1)

    def trickling(self, start, end):
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        for at in range(start, end):
            self.wfile.write(DATA[at : at + 1])

    def mumbling(self, _start, _end):  # its head never ends
        self.wfile.write(b"HTTP/1.1 206 OK\r\n")
        for _ in range(100_000):
            self.wfile.write(b"x")

    def lured(self, _start, _end):
        self.answer(302, b"", headers=(("Location", self.server.lure),))

    def silent(self, _start, _end):
        self.server.released.wait(10)
        self.close_connection = True


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.ill, made.released = [], 0, threading.Event()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.released.set()
    made.shutdown()
    made.server_close()


def fetcher(server, **patience):
    return HttpFetcher(f"http://127.0.0.1:{server.server_port}/", Patience(**{"attempts": 3, "seconds": 5, **patience}))


def read(server, path, start=0, end=LENGTH, **patience):
    return b"".join(fetcher(server, **patience).stream(path, start, end))


@pytest.mark.parametrize("path", ["good/file", "breaks/file", "whole/file", "ill/file", "moved/file", "endless/file"])
@pytest.mark.parametrize(("start", "end"), [(0, len(DATA)), (12_345, len(DATA)), (5, 6), (0, 10 * len(DATA)), (7, 7)])
def test_the_bytes_asked_for_come_however_the_server_behaves(server, path, start, end):
    assert read(server, path, start, end) == DATA[start:end]


def test_after_a_break_only_what_is_missing_is_asked_for(server):
    assert read(server, "breaks/file") == DATA
    starts = [int(span.removeprefix("bytes=").partition("-")[0]) for _, span in server.asked]
    assert starts == list(range(0, len(DATA), 100_000))


def test_beyond_the_end_there_is_nothing(server):
    assert read(server, "good/file", len(DATA), 2 * len(DATA)) == b""


@pytest.mark.parametrize("path", ["gone/file", "hidden/file"])
def test_a_missing_file_is_told_apart_from_a_bad_answer(server, path):
    with pytest.raises(MissingFile, match=path):
        read(server, path)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("path", "says", "times"),
    [("wrong/file", "400", 1), ("elsewhere/file", "range 'bytes 1-", 1), ("dead/file", "broke off at byte 0", 3)],
)
def test_a_bad_answer_is_told(server, path, says, times):
    with pytest.raises(TransferError, match=says):
        read(server, path)
    assert len(server.asked) == times


@pytest.mark.attack("slow data")
def test_a_server_that_says_nothing_is_given_up(server):
    with pytest.raises(TransferError, match="broke off"):
        read(server, "silent/file", attempts=2, seconds=0.2)


def test_nobody_there_is_told_with_the_address():
    with pytest.raises(TransferError, match=r"http://127\.0\.0\.1:1/x broke off at byte 0: .*refused"):
        list(HttpFetcher("http://127.0.0.1:1/", Patience(attempts=2)).stream("x", 0, 10))


def test_no_more_is_read_than_was_asked_for(server):
    pieces = list(fetcher(server).stream("whole/file", 0, 10))
    assert b"".join(pieces) == DATA[:10]
    assert all(len(piece) <= PIECE_BYTES for piece in fetcher(server).stream("good/file", 0, len(DATA)))


def test_odd_names_reach_the_server_whole(server):
    assert read(server, "good/a b?c#d/é") == DATA
    assert server.asked[0][0] == "/good/a%20b%3Fc%23d/%C3%A9"


def test_over_https_the_server_has_to_prove_itself_and_may_ask_who_comes(server, tmp_path):
    own, other = (certificates.Authority(tmp_path / name) for name in ("own", "other"))
    server.socket = mutual(own).wrap_socket(server.socket, server_side=True)
    url = f"https://127.0.0.1:{server.server_port}/"

    def context(authority, pair):
        return trusting(Tls(authority.certificate, *pair))

    mine = context(own, own.issue("pi-1"))
    assert b"".join(HttpFetcher(url, Patience(attempts=1), mine).stream("good/file", 0, 1000)) == DATA[:1000]
    nobody = trusting(Tls(own.certificate))
    for wrong in (context(other, own.issue("pi-2")), context(own, other.issue("pi-1")), nobody, None):
        with pytest.raises(TransferError, match="broke off at byte 0"):
            list(HttpFetcher(url, Patience(attempts=1), wrong).stream("good/file", 0, 1000))


def test_certificate_for_another_host_is_refused(server, tmp_path):
    own = certificates.Authority(tmp_path / "own")
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(*own.issue("elsewhere.example"))
    server.socket = served.wrap_socket(server.socket, server_side=True)
    one = HttpFetcher(f"https://127.0.0.1:{server.server_port}/", Patience(attempts=1), trusting(Tls(own.certificate)))
    with pytest.raises(TransferError, match=r"not valid for '127\.0\.0\.1'"):
        list(one.stream("good/file", 0, 1000))
    assert server.asked == []


def test_files_that_are_no_certificates_are_named(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        with pytest.raises(UsageError, match=path.name):
            trusting(Tls(path))


@pytest.mark.parametrize(
    "lure",
    ["file:///etc/hostname", "ftp://127.0.0.1/x", "http://example.com/x", "data:,x", "http://127.0.0.1.example.com/x"],
)
def test_redirect_to_anything_but_https_is_not_followed(server, lure):
    server.lure = lure
    with pytest.raises(TransferError, match=r"not https|answered with 302"):
        read(server, "lured/file")
    assert len(server.asked) == 1


def test_redirect_from_https_to_plain_http_is_refused_even_on_this_machine(server, tmp_path):
    own = certificates.Authority(tmp_path / "own")
    with serving(tmp_path) as plain:
        (tmp_path / "x").write_bytes(DATA)
        server.lure = f"{plain.url}/x"
        server.socket = mutual(own).wrap_socket(server.socket, server_side=True)
        mine = trusting(Tls(own.certificate, *own.issue("pi-1")))
        with pytest.raises(TransferError, match="not https"):
            list(HttpFetcher(f"https://127.0.0.1:{server.server_port}/", None, mine).stream("lured/file", 0, 10))
        assert plain.asked == []


@pytest.mark.parametrize(
    "url", ["file:///etc/", "ftp://127.0.0.1/", "http://example.com/", "", "https:", "http://[::1"]
)
def test_no_other_scheme_is_spoken(url):
    with pytest.raises(TransferError):
        list(HttpFetcher(url, Patience(attempts=1)).stream("hostname", 0, 10))


def test_packed_bytes_that_nobody_asked_for_are_no_bytes(server):
    with pytest.raises(TransferError, match="answers with gzip"):
        read(server, "packed/file")
    assert len(server.asked) == 1


def test_server_that_gives_a_byte_a_connection_is_given_up(server):
    with pytest.raises(TransferError, match="broke off at byte 3"):
        read(server, "grudging/file")
    assert len(server.asked) == 3


@pytest.mark.attack("slow data")
@pytest.mark.parametrize("path", ["trickling/file", "mumbling/file"])
def test_server_that_trickles_is_given_up_by_its_pace(server, path):
    """A minute passes with every look at the clock, which is two for each time that something comes."""
    one = fetcher(server, least_rate=LENGTH, rate_seconds=600)
    minutes = iter(range(0, 10**9, 60))
    one.clock = lambda: next(minutes)
    with pytest.raises(TransferError, match=r"only \d+ bytes came in 6\d\d s"):
        list(one.stream(path, 0, LENGTH))
    assert len(server.asked) == 1


def test_slow_server_above_the_least_rate_is_waited_for(server):
    one = fetcher(server, least_rate=0.01, rate_seconds=60)
    minutes = iter(range(0, 10**9, 60))
    one.clock = lambda: next(minutes)
    assert b"".join(one.stream("good/file", 0, LENGTH)) == DATA


ENTRY = FileEntry(path="m", size=LENGTH, sha256=hashlib.sha256(DATA).hexdigest())


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    (folder / "blobs").mkdir()
    (folder / "blobs" / ENTRY.sha256).write_bytes(DATA)
    with serving(folder) as web:
        yield web


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, LENGTH), min_size=1, max_size=6))
def test_transfer_over_http_cut_anywhere_goes_on_behind_what_is_on_the_disk(blobs, tmp_path, cuts):
    target = tmp_path / "m"
    target.unlink(missing_ok=True)
    blobs.given, blobs.cuts = 0, list(cuts)
    one = HttpFetcher(f"{blobs.url}/", Patience(attempts=1))
    for _ in range(len(cuts) + 1):
        there = target.stat().st_size if target.exists() else 0
        try:
            download(one, ENTRY, target)
            break
        except TransferError:
            assert blobs.asked[-1] == (f"blobs/{ENTRY.sha256}", there)
    assert target.read_bytes() == DATA
    eventually(lambda: blobs.given >= LENGTH)  # the server counts what it has sent, and may be a moment behind
    assert blobs.given == LENGTH


def test_server_without_that_file_any_more_leaves_what_came(blobs, tmp_path):
    target = tmp_path / "m"
    blobs.cuts = [300_000]
    one = HttpFetcher(f"{blobs.url}/", Patience(attempts=1))
    with pytest.raises(TransferError):
        download(one, ENTRY, target)
    blobs.status = 410
    with pytest.raises(TransferError, match="answered with 410"):
        download(one, ENTRY, target)
    blobs.status = 0
    assert target.stat().st_size == 300_000
    download(one, ENTRY, target)
    assert target.read_bytes() == DATA


class Proxy(http.server.BaseHTTPRequestHandler):
    """Opens tunnels to wherever it is asked to."""

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        self.server.tunnels.append(self.path)
        host, port = self.path.split(":")
        with socket.create_connection((host, int(port)), 5) as far:
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            upwards = threading.Thread(target=self._pump, args=(self.connection, far), daemon=True)
            upwards.start()
            self._pump(far, self.connection)
        self.close_connection = True

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)


def test_proxy_of_the_environment_carries_what_it_cannot_read(server, tmp_path, monkeypatch):
    own = certificates.Authority(tmp_path / "own")
    server.socket = mutual(own).wrap_socket(server.socket, server_side=True)
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.tunnels = []
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    mine = trusting(Tls(own.certificate, *own.issue("pi-1")))
    one = HttpFetcher(f"https://127.0.0.1:{server.server_port}/", Patience(attempts=1), mine)
    assert b"".join(one.stream("good/file", 5, LENGTH)) == DATA[5:]
    assert proxy.tunnels == [f"127.0.0.1:{server.server_port}"]
    proxy.shutdown()
    proxy.server_close()


NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    gzip on; gzip_types *; gzip_min_length 1;
    server {{
        listen 127.0.0.1:{port} ssl; root {root};
        ssl_certificate {certificate}; ssl_certificate_key {key};
        ssl_client_certificate {authority}; ssl_verify_client on;
    }}
}}
"""


def test_nginx_with_client_certificates_that_is_killed_in_the_middle_and_comes_back(tmp_path):
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    own, port = certificates.Authority(tmp_path / "own"), free_port()
    root = tmp_path / "repository"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / ENTRY.sha256).write_bytes(DATA)
    for path in (tmp_path, root, root / "blobs"):
        path.chmod(0o755)
    certificate, key = own.issue("127.0.0.1")
    names = {"certificate": certificate, "key": key, "authority": own.certificate}
    config = tmp_path / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""  # the folders of tests are their owner's
    config.write_text(user + NGINX.format(folder=tmp_path, port=port, root=root, **names))
    mine = trusting(Tls(own.certificate, *own.issue("pi-1")))

    @contextlib.contextmanager
    def nginx():
        process = subprocess.Popen([program, "-c", config, "-p", tmp_path], stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            yield
        finally:
            process.terminate()
            process.wait(20)

    one = HttpFetcher(f"https://127.0.0.1:{port}/", Patience(attempts=2), mine)
    target = tmp_path / "m"

    with nginx() as _, contextlib.suppress(ZeroDivisionError):
        download(one, ENTRY, target, lambda _what, done, _total: 1 // (done < LENGTH // 3))  # a kill of the agent
    there = target.stat().st_size
    assert LENGTH // 3 <= there < LENGTH
    with pytest.raises(TransferError, match=r"broke off at byte \d+: .*refused"):
        download(one, ENTRY, target)
    assert target.stat().st_size == there
    with nginx():
        download(one, ENTRY, target)
        assert b"".join(one.stream(f"blobs/{ENTRY.sha256}", LENGTH, LENGTH + 5)) == b""
        with pytest.raises(MissingFile):
            list(one.stream("blobs/none", 0, 5))
        with pytest.raises(TransferError, match="answered with 400"):  # it came without a certificate
            list(HttpFetcher(f"https://127.0.0.1:{port}/", None, trusting(Tls(own.certificate))).stream("x", 0, 5))
    assert target.read_bytes() == DATA
    sent = [int(line.split()[9]) for line in (tmp_path / "access.log").read_text().splitlines() if " 206 " in line]
    assert sent[-1] == LENGTH - there


def test_device_that_goes_down_tries_no_more(server):
    one = HttpFetcher(f"http://127.0.0.1:{server.server_port}/", Patience(attempts=6), None, lambda: True)
    with pytest.raises(TransferError, match="broke off"):
        list(one.stream("dead/file", 0, 10))
    assert len(server.asked) == 1
