"""The server as a process and as a thread: ports, drain on SIGTERM, swaps under HTTP load, pictures."""

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import ask, post_json
from PIL import Image

import edgekit
from edgekit.errors import HealthError, ResourceError
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread
from edgekit.runtime.server.serving import listen, url_of
from edgekit.runtime.session import Contract, Session
from edgekit.tensors import TensorSpec


def test_free_port_is_taken_and_given_back(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    running = serve_in_thread(host)
    port = int(running.url.rpartition(":")[2])
    assert running.url.startswith("http://127.0.0.1:")
    assert json.loads(ask(running.url, path="/readyz")[2]) == {"ready": True, "digest": host.digest}
    running.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    with serve_in_thread(host, port) as again:
        assert again.url == running.url
    host.close()


def test_taken_port_is_named(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port}.*in use") as caught:
            serve_in_thread(Host(edgekit.load(tmp_path / "b")), port)
    assert "--port" in caught.value.hint


@pytest.mark.parametrize(("address", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70000), ("192.0.2.1", 0)])
def test_address_that_is_not_ours_is_a_resource_error(address, port):
    with pytest.raises(ResourceError):
        listen(address, port)


def test_address_of_version_six_makes_a_url():
    try:
        listener = listen("::1", 0)
    except ResourceError:
        pytest.skip("this machine has no IPv6 loopback")
    with listener:
        assert url_of(listener).startswith("http://[::1]:")


def test_picture_is_classified_with_the_digest_of_the_bundle(tmp_path):
    sealed = bundles.brightness_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (240, 240, 240)).save(file, "JPEG")
    with serve_in_thread(host) as running:
        status, _, body = ask(running.url, "POST", "/v1/classify", file.getvalue())
    answer = json.loads(body)
    assert status == 200
    assert answer["labels"][0]["label"] == "bright"
    assert answer["labels"][0]["probability"] > 0.9
    assert answer["digest"] == sealed.digest
    host.close()


def test_swaps_under_http_load_fail_no_request_and_mix_no_digest(tmp_path):
    values = {}
    for value in (1.0, 2.0):
        values[bundles.null_bundle(tmp_path / str(value), value=value).digest] = value
    host = Host(edgekit.load(tmp_path / "1.0"))
    given = {"inputs": [{"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}]}
    wrong, done, stop = [], [], threading.Event()

    def ask_on():
        while not stop.is_set():
            status, answer = post_json(running.url, "/v2/models/null/infer", given)
            done.append(status)
            if status != 200 or answer["outputs"][0]["data"][0] != values[answer["parameters"]["digest"]]:
                wrong.append(answer)

    with serve_in_thread(host) as running:
        threads = [threading.Thread(target=ask_on) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            host.swap(edgekit.load(tmp_path / ("1.0", "2.0")[(turn + 1) % 2]), shadow=turn % 3 == 0)
            time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join()
    host.close()
    assert not wrong
    assert len(done) > 50


class Slow:
    """An engine that takes its time, and may break."""

    engine = "slow"

    def __init__(self, error=None):
        self.error = error

    def run(self, inputs):
        time.sleep(0.5)
        if self.error:
            raise self.error
        return {"scores": np.ones((1, 4), np.float32)}

    def close(self):
        pass


def slow_host(error=None):
    contract = Contract(
        inputs=(TensorSpec("image", "float32", (-1, 3)),), outputs=(TensorSpec("scores", "float32", (-1, 4)),)
    )
    return Host(Session(Slow(error), bundles.variant("any", "null"), contract))


GIVEN = {"inputs": [{"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}]}


def test_health_answers_while_the_model_computes():
    host = slow_host()
    with serve_in_thread(host) as running:
        thread = threading.Thread(target=post_json, args=(running.url, "/v2/models/model/infer", GIVEN))
        thread.start()
        time.sleep(0.1)
        started = time.perf_counter()
        assert ask(running.url, path="/healthz")[0] == 200
        assert time.perf_counter() - started < 0.3
        thread.join()
    host.close()


def test_engine_that_fails_is_a_500_with_its_reason_and_a_closed_host_a_503():
    host = slow_host(HealthError("the engine is ill"))
    with serve_in_thread(host) as running:
        assert post_json(running.url, "/v2/models/model/infer", GIVEN) == (500, {"error": "the engine is ill"})
        host.close()
        assert post_json(running.url, "/v2/models/model/infer", GIVEN)[0] == 503


def test_stop_answers_what_is_in_flight():
    host = slow_host()
    running = serve_in_thread(host)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post_json(running.url, "/v2/models/model/infer", GIVEN)))
    thread.start()
    time.sleep(0.2)
    running.stop()
    thread.join()
    assert answers[0][0] == 200
    host.close()


SERVE_SLOWLY = """
import sys
sys.path[:0] = {path!r}
import test_serving
from edgekit.runtime.server import serve
serve(test_serving.slow_host(), 0, on_ready=lambda url, _: print(url, flush=True))
print("drained", flush=True)
"""


def test_sigterm_drains_what_is_in_flight():
    code = SERVE_SLOWLY.format(path=sys.path) + "\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        url = child.stdout.readline().strip()
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post_json(url, "/v2/models/model/infer", GIVEN)))
        thread.start()
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        thread.join()
        rest = child.communicate(timeout=20)[0]
    assert answers[0][0] == 200
    assert rest.strip() == "drained"
    assert child.returncode == 0
