"""Limits of the server: how many wait, how long, who may ask, and over what."""

import asyncio
import http.client
import inspect
import json
import socket
import ssl
import threading
import time

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import ask, post_json

import edgekit
from edgekit.errors import InputError, UsageError
from edgekit.runtime.host import Host
from edgekit.runtime.server import Access, Limits, Options, read_tokens, serve_in_thread
from edgekit.runtime.server.gate import Gate
from edgekit.runtime.server.serving import listen
from edgekit.runtime.session import Contract, Session
from edgekit.tensors import TensorSpec

INFER = "/v2/models/model/infer"
GIVEN = {"inputs": [{"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}]}


class Held:
    """An engine that computes until it is let go, and counts."""

    engine = "held"

    def __init__(self):
        self.go = threading.Event()
        self.entered = threading.Semaphore(0)
        self.runs = 0

    def run(self, inputs):
        self.runs += 1
        self.entered.release()
        self.go.wait(20)
        return {"scores": np.ones((1, 4), np.float32)}

    def close(self):
        pass


@pytest.fixture
def held():
    engine = Held()
    contract = Contract(
        inputs=(TensorSpec("image", "float32", (-1, 3)),), outputs=(TensorSpec("scores", "float32", (-1, 4)),)
    )
    host = Host(Session(engine, bundles.variant("any", "null"), contract))
    yield engine, host
    engine.go.set()
    host.close()


class Asking:
    """Requests in threads of their own."""

    def __init__(self, url, count):
        self.answers = []
        self.threads = [threading.Thread(target=self.ask, args=(url,)) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def ask(self, url):
        self.answers.append(ask(url, "POST", INFER, json.dumps(GIVEN)))

    def statuses(self):
        for thread in self.threads:
            thread.join()
        return sorted(status for status, _, _ in self.answers)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_finds_the_queue_full_is_turned_away_at_once_and_told_when_to_come_again(held):
    engine, host = held
    with serve_in_thread(host, options=Options(limits=Limits(workers=1, queue=2))) as running:
        asking = Asking(running.url, 6)
        until(lambda: len(asking.answers) == 3)
        assert [status for status, _, _ in asking.answers] == [429] * 3
        headers = {name.lower(): value for name, value in asking.answers[0][1].items()}
        assert int(headers["retry-after"]) >= 1
        assert "2 requests wait already" in json.loads(asking.answers[0][2])["error"]
        assert ask(running.url, path="/healthz")[0] == 200
        engine.go.set()
        assert asking.statuses() == [200] * 3 + [429] * 3
        assert post_json(running.url, INFER, GIVEN)[0] == 200


def test_what_takes_too_long_is_given_up_and_what_has_not_begun_never_begins(held):
    engine, host = held
    with serve_in_thread(host, options=Options(limits=Limits(workers=1, queue=8, seconds=0.3))) as running:
        asking = Asking(running.url, 3)
        assert asking.statuses() == [504] * 3
        assert "no answer within 0.3 s" in json.loads(asking.answers[0][2])["error"]
        engine.go.set()
        until(lambda: post_json(running.url, INFER, GIVEN)[0] == 200)
    assert engine.runs == 2


def test_a_text_that_stalls_is_given_up(tmp_path):
    class Stalled:
        engine, embeds, room = "stalled", False, None

        def complete(self, prompt, sampling):
            time.sleep(0.6)
            yield from ()

        stream = complete

        def close(self):
            pass

    from edgekit.runtime.session import TextSession

    contract = Contract(task="text-generation")
    host = Host(TextSession(Stalled(), bundles.variant("any", "null"), contract))
    with serve_in_thread(host, options=Options(limits=Limits(seconds=0.2))) as running:
        asked = {"model": "model", "prompt": "a"}
        status, answer = post_json(running.url, "/v1/completions", asked)
        assert (status, answer["error"]["code"]) == (504, "timeout")
    host.close()


def test_a_body_is_not_held_back_until_the_client_acknowledges_its_head():
    """asyncio switches Nagle's algorithm off on sockets that call themselves TCP, and leaves it on for others."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        assert accepted.proto == socket.IPPROTO_TCP
        accepted.close()
        del client


async def computed(gate, work, size):
    answer = gate.compute(work, size)
    return await answer if inspect.isawaitable(answer) else answer


def test_work_that_is_short_on_average_is_done_without_a_thread_and_other_work_never():
    async def places(seconds, count=40):
        gate = Gate(Limits(workers=2))

        def work():
            time.sleep(seconds)
            return threading.current_thread().name.startswith("inference")

        in_threads = [await computed(gate, work, 100) for _ in range(count)]
        large = await computed(gate, work, 1 << 20)
        waits, _ = gate.waits()
        gate.close()
        assert sum(waits) == count + 1
        return in_threads, large

    quick, large = asyncio.run(places(0))
    assert quick[0]
    assert not quick[-1]
    assert large
    slow, large = asyncio.run(places(0.002))
    assert all(slow)
    assert large


def test_refusals_do_not_make_a_slow_model_look_quick():
    def refused():
        raise InputError("no")

    def work():
        time.sleep(0.002)
        return threading.current_thread().name.startswith("inference")

    async def asked():
        gate = Gate(Limits(workers=1))
        first = await computed(gate, work, 100)
        for _ in range(100):
            with pytest.raises(InputError):
                await computed(gate, refused, 100)
        last = await computed(gate, work, 100)
        gate.close()
        return first, last

    assert asyncio.run(asked()) == (True, True)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# of the shop floor\nfirst-token-0123456789\n\n  second-token-0123456789  \n")
    return path


def test_only_who_has_a_token_may_ask_but_anybody_sees_that_the_server_lives(tmp_path, tokens):
    bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host, options=Options(access=Access(tokens=read_tokens(tokens)))) as running:
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert ask(running.url, path=path)[0] == 200
        for path in ("/metrics", "/v2", "/v2/models/mlp", "/v1/models", "/nothing"):
            status, headers, _ = ask(running.url, path=path)
            assert (status, {n.lower(): v for n, v in headers.items()}["www-authenticate"]) == (401, "Bearer")
        for token in ("first-token-0123456789", "second-token-0123456789"):
            assert ask(running.url, path="/metrics", headers={"Authorization": f"Bearer {token}"})[0] == 200
        for header in (
            "Bearer first-token-012345678",
            "Basic first-token-0123456789",
            "Bearer",
            "",
            "Bearer # of the shop floor",
        ):
            status, _, body = ask(running.url, path="/v1/models", headers={"Authorization": header})
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    host.close()


def test_a_stranger_is_refused_before_the_body_is_read(tmp_path, tokens):
    bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host, options=Options(access=Access(tokens=read_tokens(tokens)))) as running:
        connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=5)
        connection.putrequest("POST", "/v2/models/mlp/infer")
        connection.putheader("Content-Length", str(50 << 20))
        connection.endheaders()
        assert connection.getresponse().status == 401
    host.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no token"), (b"# only this\n", "holds no token"), (b"short\n", "token 1 of .* has 5 characters"),
     (b"\xff\xfe" * 20, "cannot be read"), ("ü" * 20 + "\n", "token 1"), (None, "cannot be read")],
)  # fmt: skip
def test_tokens_that_protect_nothing_are_refused(tmp_path, content, message):
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        read_tokens(path)


def test_clients_show_a_certificate_where_one_is_wanted(tmp_path):
    from fakes.certificates import authority

    own, other = authority(tmp_path / "own"), authority(tmp_path / "other")
    served, client, stranger = own.issue("127.0.0.1"), own.issue("client"), other.issue("client")
    from edgekit.runtime.server import Tls

    bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    tls = Tls(certificate=served[0], key=served[1], clients=own.certificate)
    with serve_in_thread(host, options=Options(access=Access(tls=tls))) as running:
        assert running.url.startswith("https://")

        def get(pair):
            context = ssl.create_default_context(cafile=str(own.certificate))
            if pair:
                context.load_cert_chain(*pair)
            connection = http.client.HTTPSConnection(running.url.removeprefix("https://"), context=context, timeout=5)
            connection.request("GET", "/metrics")
            return connection.getresponse().status

        assert get(client) == 200
        for pair in (None, stranger):
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                get(pair)
    host.close()
    with pytest.raises(UsageError, match="TLS cannot be set up"):
        serve_in_thread(host, options=Options(access=Access(tls=Tls(certificate=served[0], key=client[1]))))
    with pytest.raises(UsageError, match="TLS cannot be set up"):
        serve_in_thread(host, options=Options(access=Access(tls=Tls(certificate=tmp_path / "gone", key=client[1]))))
