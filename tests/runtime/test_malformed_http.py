"""Requests no client would send: each gets a clear 4xx or a closed connection, never a 500, and the server lives on."""

import json
import socket
import struct
from urllib.parse import urlsplit

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import ask, raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread

INFER = "/v2/models/mlp/infer"
GOOD = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed") / "mlp"
    bundles.mlp_bundle(folder)
    host = Host(edgekit.load(folder, threads=1))
    with serve_in_thread(host) as running:
        yield running.url
    host.close()


@pytest.fixture(autouse=True)
def server_lives_on(url):
    yield
    status, _, body = ask(url, "POST", INFER, json.dumps({"inputs": [GOOD]}))
    assert status == 200
    np.testing.assert_allclose(
        json.loads(body)["outputs"][0]["data"], bundles.mlp_numpy(np.zeros((1, 64)))[0], atol=1e-5
    )


BAD_INPUTS = {
    "too few values": {**GOOD, "data": [0.0] * 63},
    "too many values": {**GOOD, "data": [0.0] * 65},
    "a giant shape": {**GOOD, "shape": [1 << 40, 1 << 40], "data": [1.0]},
    "an endless shape": {**GOOD, "shape": [1] * 1000, "data": [1.0]},
    "a negative shape": {**GOOD, "shape": [-1, -64]},
    "a shape beyond 64 bits": {**GOOD, "shape": [1 << 80]},
    "an unknown datatype": {**GOOD, "datatype": "FP128"},
    "another datatype": {**GOOD, "datatype": "INT32", "data": [0] * 64},
    "strings for numbers": {**GOOD, "data": ["x"] * 64},
    "null for numbers": {**GOOD, "data": [None] * 64},
    "an object for data": {**GOOD, "data": {"a": 1}},
    "ragged rows": {**GOOD, "data": [[0.0] * 32, [0.0] * 31, 1.0]},
    "no data": {k: v for k, v in GOOD.items() if k != "data"},
    "an int that does not fit": {**GOOD, "datatype": "UINT8", "data": [300] * 64},
    "an int beyond 64 bits": {**GOOD, "datatype": "INT64", "data": [1 << 90] * 64},
    "an empty batch": {**GOOD, "shape": [0, 64], "data": []},
    "binary bytes that are not there": {
        **{k: v for k, v in GOOD.items() if k != "data"},
        "parameters": {"binary_data_size": 256},
    },
    "a negative binary size": {**GOOD, "parameters": {"binary_data_size": -1}},
    "a binary size that is no number": {**GOOD, "parameters": {"binary_data_size": "256"}},
    "a binary size that is true": {**GOOD, "parameters": {"binary_data_size": True}},
    "shared memory": {**GOOD, "parameters": {"shared_memory_region": "r"}},
}


@pytest.mark.parametrize("bad", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_tensor_is_a_400_with_a_reason(url, bad):
    status, _, body = ask(url, "POST", INFER, json.dumps({"inputs": [bad]}))
    assert status == 400
    assert len(json.loads(body)["error"]) > 10


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"inputs": 3}',
        b'{"inputs": []}',
        b'{"inputs": [{}]}',
        json.dumps({"inputs": [GOOD, GOOD]}).encode(),
        b'{"inputs":' + b"[" * 100_000,
        json.dumps({"inputs": [GOOD]}).replace("0.0", "[" * 50_000 + "]" * 50_000, 1).encode(),
        json.dumps({"inputs": [GOOD]}).replace("0.0", "NaN", 1).encode(),
        json.dumps({"inputs": [GOOD]}).replace("0.0", "1e999", 1).encode(),
    ],
)
def test_body_that_is_no_request_is_a_400(url, body):
    status, _, answer = ask(url, "POST", INFER, body)
    assert status == 400
    assert set(json.loads(answer)) == {"error"}


def binary_request(parameters, blob, shape=(1, 64), datatype="FP32"):
    given = {"name": "image", "shape": shape, "datatype": datatype, "parameters": parameters}
    head = json.dumps({"inputs": [given]}).encode()
    return head, head + blob


@pytest.mark.parametrize(
    ("size", "blob"),
    [(256, b"x" * 255), (256, b"x" * 257), (255, b"x" * 255), (0, b""), (1 << 62, b"x" * 256), (256, b"")],
)
def test_binary_tensor_of_another_length_is_a_400(url, size, blob):
    head, body = binary_request({"binary_data_size": size}, blob)
    status, _, answer = ask(url, "POST", INFER, body, {"Inference-Header-Content-Length": str(len(head))})
    assert status == 400
    assert "error" in json.loads(answer)


@pytest.mark.parametrize("length", ["-1", "99999999", "x", "1e3", "", "0"])
def test_header_length_that_lies_is_a_400(url, length):
    _, body = binary_request({"binary_data_size": 256}, bytes(256))
    assert ask(url, "POST", INFER, body, {"Inference-Header-Content-Length": length})[0] == 400


@pytest.mark.parametrize(
    "blob",
    [
        b"\x01",
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", 3) + b"ab",
        struct.pack("<I", 0) * 3,
        b"",
        struct.pack("<I", 1) + b"\xff",
    ],
)
def test_malformed_binary_strings_are_a_400(url, blob):
    head, body = binary_request({"binary_data_size": len(blob)}, blob, (1, 64), "BYTES")
    assert ask(url, "POST", INFER, body, {"Inference-Header-Content-Length": str(len(head))})[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/mlp/versions/9", 404),
        ("GET", "/v2/models/mlp/versions/1", 200),
        ("GET", "/v2/models/mlp/versions/1/ready", 200),
        ("GET", "/v2/models/mlp/nothing", 404),
        ("GET", INFER, 405),
        ("POST", "/v2", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("HEAD", "/healthz", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v2/models/%ff%00", 404),
    ],
)
def test_each_path_answers_with_its_status(url, method, path, status):
    got, _, body = ask(url, method, path)
    assert got == status
    if status >= 400 and path.startswith("/v2"):
        assert set(json.loads(body)) == {"error"}


def test_body_that_claims_to_be_giant_is_refused_before_it_is_read(url):
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 50}\r\n\r\n".encode()
    assert b" 413 " in raw(url, head).split(b"\r\n")[0]


def test_compressed_body_is_a_415(url):
    assert ask(url, "POST", INFER, b"x", {"Content-Encoding": "gzip"})[0] == 415


def test_client_that_leaves_in_the_middle_harms_nobody(url):
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    address = urlsplit(url)
    for _ in range(5):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head + b'{"inputs"')


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_broken_http_is_a_400_or_a_closed_connection(url, data):
    answer = raw(url, data, half_close=True)
    assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), value=json_values)
def test_no_value_in_any_field_makes_a_500(url, field, value):
    status, _, body = ask(url, "POST", INFER, json.dumps({"inputs": [{**GOOD, field: value}]}))
    assert status in (200, 400)
    assert json.loads(body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": 3}', b'{"model":"mlp","messages":[]}', b'{"model":"mlp"}', b"\xff"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_malformed_openai_request_is_a_400_in_openais_shape(url, path, body):
    status, _, answer = ask(url, "POST", path, body)
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_picture_endpoint_refuses_what_is_no_picture(url):
    status, _, answer = ask(url, "POST", "/v1/classify", b"no picture")
    assert status == 400
    assert "picture" in json.loads(answer)["error"]["message"]
