"""The Open Inference Protocol through Triton's own client, and by hand where the client is too polite."""

import json

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import ask, post_json

import edgekit
from edgekit import bundle
from edgekit.manifest import Manifest
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread
from edgekit.tensors import TensorSpec

LENGTH = "Inference-Header-Content-Length"
triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402  # after the skip


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oip") / "mlp"
    sealed = bundles.mlp_bundle(folder, version="3")
    host = Host(edgekit.load(folder, threads=1))
    with serve_in_thread(host) as running:
        yield running.url, sealed.digest
    host.close()


@pytest.fixture
def client(mlp):
    opened = triton.InferenceServerClient(mlp[0].removeprefix("http://"))
    yield opened
    opened.close()


def test_client_sees_a_live_and_ready_server(client, mlp):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mlp")
    assert client.is_model_ready("mlp", "3")
    assert client.get_server_metadata() == {
        "name": "edgekit",
        "version": edgekit.__version__,
        "extensions": ["binary_tensor_data"],
    }
    metadata = client.get_model_metadata("mlp")
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 64]}]
    assert metadata["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}]
    assert client.get_model_repository_index() == [{"name": "mlp", "version": "3", "state": "READY", "reason": ""}]
    assert metadata["versions"] == ["3"]
    assert metadata["parameters"]["digest"] == mlp[1]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("version", ["", "3"])
def test_client_infers_with_json_and_binary_tensors(client, mlp, binary_in, binary_out, version):
    image = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    given = triton.InferInput("image", list(image.shape), "FP32")
    given.set_data_from_numpy(image, binary_data=binary_in)
    wanted = triton.InferRequestedOutput("scores", binary_data=binary_out)
    result = client.infer("mlp", [given], version, [wanted], request_id="r1")
    np.testing.assert_allclose(result.as_numpy("scores"), bundles.mlp_numpy(image), atol=1e-5)
    response = result.get_response()
    assert response["parameters"]["digest"] == mlp[1]
    assert (response["model_name"], response["model_version"], response["id"]) == ("mlp", "3", "r1")


def test_client_that_asks_for_no_output_gets_all_of_them_in_binary(client):
    image = np.zeros((1, 64), np.float32)
    given = triton.InferInput("image", [1, 64], "FP32")
    given.set_data_from_numpy(image)
    result = client.infer("mlp", [given])
    np.testing.assert_allclose(result.as_numpy("scores"), bundles.mlp_numpy(image), atol=1e-5)


def test_client_gets_the_servers_reason_for_each_refusal(client):
    given = triton.InferInput("image", [1, 64], "FP32")
    given.set_data_from_numpy(np.zeros((1, 64), np.float32))
    with pytest.raises(InferenceServerException, match="no model 'nobody'") as caught:
        client.infer("nobody", [given])
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="no model 'mlp version 9'"):
        client.get_model_metadata("mlp", "9")
    with pytest.raises(InferenceServerException, match="no output 'labels'") as caught:
        client.infer("mlp", [given], outputs=[triton.InferRequestedOutput("labels")])
    assert caught.value.status() == "400"
    wrong = triton.InferInput("image", [1, 63], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 63), np.float32))
    with pytest.raises(InferenceServerException, match=r"shape \[1, 63\]") as caught:
        client.infer("mlp", [wrong])
    assert caught.value.status() == "400"


DTYPES = {
    "BOOL": (np.bool_, "BOOL"),
    "UINT8": (np.uint8, "UINT8"),
    "INT32": (np.int32, "INT32"),
    "INT64": (np.int64, "INT64"),
    "FP16": (np.float16, "FLOAT16"),
    "FP32": (np.float32, "FLOAT"),
    "FP64": (np.float64, "DOUBLE"),
    "BYTES": (np.object_, "STRING"),
}


def echoes_bundle(folder, names=tuple(DTYPES)):
    """Seal a model that gives back its inputs, one of each datatype."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in names]
    ins, outs = (
        [helper.make_tensor_value_info(f"{d}_{n}", getattr(TensorProto, DTYPES[n][1]), ["n", 2]) for n in names]
        for d in ("in", "out")
    )
    variant = bundles.variant("any", "onnx")
    specs = {n: np.dtype(DTYPES[n][0]).name for n in names}
    manifest = Manifest(
        name="echoes",
        version="1",
        task="tensor",
        inputs=tuple(TensorSpec(f"in_{n}", k, (-1, 2)) for n, k in specs.items()),
        outputs=tuple(TensorSpec(f"out_{n}", k, (-1, 2)) for n, k in specs.items()),
        variants=(variant,),
        files=(),
    )
    bundle.seal(folder, manifest, {variant.main: bundles._model(helper.make_graph(nodes, "echoes", ins, outs))})


@pytest.fixture(scope="module")
def echoes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("echoes") / "b"
    echoes_bundle(folder)
    host = Host(edgekit.load(folder, threads=1))
    with serve_in_thread(host) as running:
        yield running.url
    host.close()


VALUES = {
    "BOOL": [[True, False], [False, True]],
    "UINT8": [[0, 255], [1, 2]],
    "INT32": [[-(2**31), 2**31 - 1], [0, 1]],
    "INT64": [[-(2**63), 2**63 - 1], [0, 1]],
    "FP16": [[0.5, -2.0], [0.0, 65504.0]],
    "FP32": [[1.5, -2.25], [3e38, 1e-38]],
    "FP64": [[1e300, -1e-300], [0.0, 1.0]],
    "BYTES": [["a", ""], ["schön", "日本"]],
}


@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_travels_both_ways(echoes, binary):
    given = []
    for name, (kind, _) in DTYPES.items():
        array = np.array(VALUES[name], kind)
        given.append(triton.InferInput(f"in_{name}", [2, 2], name))
        given[-1].set_data_from_numpy(array, binary_data=binary or name == "FP16")  # the client has no FP16 in JSON
    wanted = [triton.InferRequestedOutput(f"out_{n}", binary_data=binary or n == "FP16") for n in DTYPES]
    client = triton.InferenceServerClient(echoes.removeprefix("http://"))
    result = client.infer("echoes", given, outputs=wanted)
    for name in DTYPES:
        got = result.as_numpy(f"out_{name}").tolist()
        got = [[v.decode() if isinstance(v, bytes) else v for v in row] for row in got]
        want = np.array(VALUES[name], DTYPES[name][0]).tolist()
        assert got == want, name
    client.close()


def test_json_data_may_be_flat_or_nested(mlp):
    image = np.random.default_rng(2).normal(size=(2, 64)).astype(np.float32)
    answers = []
    for data in (image.ravel().tolist(), image.tolist()):
        given = {"name": "image", "shape": [2, 64], "datatype": "FP32", "data": data}
        status, answer = post_json(mlp[0], "/v2/models/mlp/infer", {"inputs": [given]})
        assert status == 200
        assert "id" not in answer
        answers.append(answer["outputs"][0]["data"])
    assert answers[0] == answers[1]
    np.testing.assert_allclose(np.reshape(answers[0], (2, 10)), bundles.mlp_numpy(image), atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"shape": [0, 10**30], "parameters": {"binary_data_size": 0}},
        {"shape": [0, 2**62, 2**62], "parameters": {"binary_data_size": 0}},
        {"shape": [0, 2**62, 2**62], "datatype": "BYTES", "parameters": {"binary_data_size": 0}},
        {"shape": [0, 2**62, 2**62], "data": []},
        {"shape": [1], "datatype": "BYTES", "data": ["\xff\xfe"]},
        {"shape": [1], "datatype": "INT64", "data": [10**4000]},
    ],
)
def test_tensors_that_no_memory_or_text_could_hold_are_the_callers_fault(mlp, given):
    document = {"inputs": [{"name": "image", "datatype": "FP32", **given}]}
    body = json.dumps(document, ensure_ascii=False).encode("latin-1")  # so that the string is no UTF-8
    status, _, answer = ask(mlp[0], "POST", "/v2/models/mlp/infer", body, {LENGTH: str(len(body))})
    assert status == 400, answer
    assert "image" in json.loads(answer)["error"]


def test_whole_request_may_ask_for_binary_outputs(mlp):
    given = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
    body = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}})
    status, headers, answer = ask(mlp[0], "POST", "/v2/models/mlp/infer", body)
    length = int({k.lower(): v for k, v in headers.items()}["inference-header-content-length"])
    assert status == 200
    assert json.loads(answer[:length])["outputs"][0]["parameters"] == {"binary_data_size": 40}
    np.testing.assert_allclose(
        np.frombuffer(answer[length:], np.float32), bundles.mlp_numpy(np.zeros((1, 64)))[0], atol=1e-5
    )


def test_metrics_count_requests_and_errors_under_the_digest(tmp_path):
    sealed = bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    good = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
    with serve_in_thread(host) as running:
        for given in (good, good, {**good, "name": "picture"}):
            post_json(running.url, "/v2/models/mlp/infer", {"inputs": [given]})
        status, headers, body = ask(running.url, path="/metrics")
    text = body.decode()
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert f'edgekit_requests_total{{digest="{sealed.digest}"}} 3' in text
    assert f'edgekit_errors_total{{digest="{sealed.digest}",kind="InputError"}} 1' in text
    assert f'edgekit_request_seconds_count{{digest="{sealed.digest}"}} 2' in text
    assert f'edgekit_request_seconds_bucket{{digest="{sealed.digest}",le="+Inf"}} 2' in text
    resident = next(line for line in text.splitlines() if line.startswith("process_resident_memory_bytes "))
    assert int(resident.split()[1]) > 10 << 20
    host.close()


def test_metrics_parse_as_prometheus_reads_them(mlp):
    import re

    text = ask(mlp[0], path="/metrics")[2].decode()
    line = re.compile(r'(# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [-+0-9.e]+)')
    assert all(line.fullmatch(entry) for entry in text.splitlines())
    assert text.endswith("\n")
