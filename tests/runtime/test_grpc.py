"""The Open Inference Protocol over gRPC through Triton's own client, and by hand where the client is too polite."""

import contextlib
import hashlib
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import bundles, certificates
from fakes.requests_to import ask
from test_oip import DTYPES, VALUES, echoes_bundle

import edgekit
from edgekit.errors import HealthError, MissingExtra, ResourceError, UsageError
from edgekit.runtime.host import Host
from edgekit.runtime.repository import Repository
from edgekit.runtime.server import Access, Limits, Options, Tls, serve_in_thread
from edgekit.runtime.server.oip_contents import FIELDS
from edgekit.runtime.session import Contract, Session
from edgekit.tensors import TensorSpec

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402  # after the skip
from tritonclient.utils import InferenceServerException  # noqa: E402  # after the skip

TOKEN = "0123456789-0123456789"
TOKENS = (hashlib.sha256(TOKEN.encode()).digest(),)


def address(url):
    return url.partition("://")[2]


@contextlib.contextmanager
def serving(host, **options):
    with serve_in_thread(host, options=Options(grpc_port=0, **options)) as running:
        yield running
    host.close()


@contextlib.contextmanager
def stub(running, credentials=None):
    """A client without manners: it sends what it is told, however large."""
    where = address(running.grpc)
    settings = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    channel = (
        grpc.secure_channel(where, credentials, settings) if credentials else grpc.insecure_channel(where, settings)
    )
    with channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpc") / "mlp"
    sealed = bundles.mlp_bundle(folder, version="3")
    with serving(Host(edgekit.load(folder, threads=1))) as running:
        yield running, sealed.digest


@pytest.fixture
def client(mlp):
    with triton.InferenceServerClient(address(mlp[0].grpc)) as opened:
        yield opened


@pytest.fixture
def raw(mlp):
    with stub(mlp[0]) as opened:
        yield opened


def image_input(array):
    given = triton.InferInput("image", list(array.shape), "FP32")
    given.set_data_from_numpy(array)
    return given


def request_of(array=None, **fields):
    """A request to the perceptron with typed contents."""
    array = np.zeros((1, 64), np.float32) if array is None else array
    made = service_pb2.ModelInferRequest(**{"model_name": "mlp", **fields})
    tensor = made.inputs.add(name="image", datatype="FP32", shape=array.shape)
    tensor.contents.fp32_contents.extend(array.ravel().tolist())
    return made


def refused(call, *arguments, **settings):
    """Return the code, the details and the trailing metadata of a call that has to fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **settings)
    error = caught.value
    return error.code().name, error.details(), dict(error.trailing_metadata() or ())


def test_client_sees_a_live_and_ready_server(client, mlp):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mlp")
    assert client.is_model_ready("mlp", "3")
    told = client.get_server_metadata(as_json=True)
    assert told == {"name": "edgekit", "version": edgekit.__version__}
    metadata = client.get_model_metadata("mlp", as_json=True)
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": ["-1", "64"]}]
    assert metadata["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": ["-1", "10"]}]
    assert metadata["versions"] == ["3"]
    assert metadata["platform"].startswith("onnxruntime")
    index = client.get_model_repository_index(as_json=True)
    assert index == {"models": [{"name": "mlp", "version": "3", "state": "READY"}]}


@pytest.mark.parametrize("version", ["", "3"])
def test_client_infers_and_gets_the_digest_and_its_identifier(client, mlp, version):
    image = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    wanted = [triton.InferRequestedOutput("scores")]
    result = client.infer("mlp", [image_input(image)], version, wanted, request_id="r1")
    np.testing.assert_allclose(result.as_numpy("scores"), bundles.mlp_numpy(image), atol=1e-5)
    response = result.get_response()
    assert response.parameters["digest"].string_param == mlp[1]
    assert (response.model_name, response.model_version, response.id) == ("mlp", "3", "r1")


def test_typed_contents_are_answered_in_kind(raw, mlp):
    image = np.random.default_rng(2).normal(size=(2, 64)).astype(np.float32)
    answer = raw.ModelInfer(request_of(image))
    assert not answer.raw_output_contents
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("scores", "FP32", [2, 10])
    scores = np.reshape(output.contents.fp32_contents, (2, 10))
    np.testing.assert_allclose(scores, bundles.mlp_numpy(image), atol=1e-5)
    assert answer.parameters["digest"].string_param == mlp[1]


def test_both_protocols_answer_alike(client, mlp):
    from tritonclient import http

    image = np.random.default_rng(4).normal(size=(5, 64)).astype(np.float32)
    over_http = http.InferInput("image", [5, 64], "FP32")
    over_http.set_data_from_numpy(image)
    with http.InferenceServerClient(address(mlp[0].url)) as other:
        theirs = other.infer("mlp", [over_http]).as_numpy("scores")
    np.testing.assert_array_equal(client.infer("mlp", [image_input(image)]).as_numpy("scores"), theirs)


@pytest.fixture(scope="module")
def echoes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("echoes") / "b"
    echoes_bundle(folder)
    with serving(Host(edgekit.load(folder, threads=1))) as running:
        yield running


def as_text(value):
    return value.decode() if isinstance(value, bytes) else value


def test_every_datatype_travels_raw_both_ways(echoes):
    given = [triton.InferInput(f"in_{name}", [2, 2], name) for name in DTYPES]
    for one, (name, (kind, _)) in zip(given, DTYPES.items(), strict=True):
        one.set_data_from_numpy(np.array(VALUES[name], kind))
    with triton.InferenceServerClient(address(echoes.grpc)) as client:
        result = client.infer("echoes", given)
    assert len(result.get_response().raw_output_contents) == len(DTYPES)
    for name, (kind, _) in DTYPES.items():
        got = [[as_text(v) for v in row] for row in result.as_numpy(f"out_{name}").tolist()]
        assert got == np.array(VALUES[name], kind).tolist(), name


def typed_request(values=VALUES, names=DTYPES):
    made = service_pb2.ModelInferRequest(model_name="echoes")
    for name in names:
        tensor = made.inputs.add(name=f"in_{name}", datatype=name, shape=[2, 2])
        flat = [item.encode() if isinstance(item, str) else item for row in values[name] for item in row]
        getattr(tensor.contents, FIELDS.get(name, "fp32_contents")).extend(flat)
    return made


@pytest.fixture(scope="module")
def typed_echoes(tmp_path_factory):
    """The same model without FP16, which has no typed contents."""
    folder = tmp_path_factory.mktemp("typed") / "b"
    echoes_bundle(folder, [name for name in DTYPES if name != "FP16"])
    with serving(Host(edgekit.load(folder, threads=1))) as running:
        yield running


def test_every_datatype_but_half_floats_travels_typed_both_ways(typed_echoes):
    names = [name for name in DTYPES if name != "FP16"]
    with stub(typed_echoes) as raw:
        answer = raw.ModelInfer(typed_request(names=names))
    assert not answer.raw_output_contents
    for name, output in zip(names, answer.outputs, strict=True):
        assert (output.name, output.datatype) == (f"out_{name}", name)
        got = np.reshape([as_text(v) for v in getattr(output.contents, FIELDS[name])], (2, 2))
        assert got.tolist() == np.array(VALUES[name], DTYPES[name][0]).tolist(), name


def test_half_floats_in_typed_contents_are_refused_and_as_output_come_raw(echoes):
    with stub(echoes) as raw:
        code, details, _ = refused(raw.ModelInfer, typed_request())
        assert code == "INVALID_ARGUMENT"
        assert "'FP16', which has no typed contents" in details
        assert "raw_input_contents" in details


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("BOOL", {"int_contents": [1, 0, 0, 1]}, "has int_contents, BOOL travels in bool_contents"),
        ("UINT8", {"uint_contents": [0, 256, 1, 2]}, "holds a value that UINT8 cannot"),
        ("INT64", {"int64_contents": [1, 2, 3]}, "needs 32"),
        ("FP64", {"fp64_contents": [1.0] * 5}, "40 bytes"),
        ("BYTES", {"bytes_contents": [b"a"]}, "has 1 strings"),
        ("BYTES", {}, "has 0 strings"),
    ],
)
def test_typed_contents_that_are_not_the_datatypes_are_refused(typed_echoes, name, contents, told):
    made = service_pb2.ModelInferRequest(model_name="echoes")
    tensor = made.inputs.add(name=f"in_{name}", datatype=name, shape=[2, 2])
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    with stub(typed_echoes) as raw:
        code, details, _ = refused(raw.ModelInfer, made)
    assert code == "INVALID_ARGUMENT"
    assert told in details


def change_raw_count(made):
    made.raw_input_contents.extend([b"", b""])


def change_both(made):
    made.raw_input_contents.append(bytes(256))


def change_memory(made):
    made.inputs[0].parameters["shared_memory_region"].string_param = "mine"


WRONG = {
    "another name": (lambda made: setattr(made.inputs[0], "name", "picture"), "'picture'"),
    "another shape": (lambda made: made.inputs[0].shape.__setitem__(1, 63), "[1, 63]"),
    "a negative shape": (lambda made: made.inputs[0].shape.__setitem__(0, -1), "impossible shape [-1, 64]"),
    "a giant claim": (lambda made: made.inputs[0].shape.__setitem__(0, 2**62), "needs"),
    "an unknown datatype": (lambda made: setattr(made.inputs[0], "datatype", "FP7"), "'FP7'"),
    "no input": (lambda made: made.ClearField("inputs"), "image"),
    "the same twice": (lambda made: made.inputs.append(made.inputs[0]), "given twice"),
    "an unknown output": (lambda made: made.outputs.add(name="labels"), "no output 'labels'"),
    "raw contents for nobody": (change_raw_count, "2 raw_input_contents came for 1 inputs"),
    "both kinds of contents": (change_both, "both contents and raw_input_contents"),
    "shared memory": (change_memory, "shared memory is not supported"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests_are_the_callers_fault_with_a_reason(raw, what):
    change, told = WRONG[what]
    made = request_of()
    change(made)
    code, details, _ = refused(raw.ModelInfer, made)
    assert code == "INVALID_ARGUMENT"
    assert told in details


def test_bytes_that_are_no_message_are_the_callers_fault(mlp):
    with grpc.insecure_channel(address(mlp[0].grpc)) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        assert refused(call, b"\xff" * 40)[0] == "INVALID_ARGUMENT"
        assert refused(channel.unary_unary("/inference.GRPCInferenceService/Fly"), b"")[0] == "UNIMPLEMENTED"


def test_a_giant_empty_tensor_takes_no_memory(raw):
    made = service_pb2.ModelInferRequest(model_name="mlp", raw_input_contents=[b""])
    made.inputs.add(name="image", datatype="FP32", shape=[0, 2**62, 2**62])
    assert refused(raw.ModelInfer, made)[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(("model", "version"), [("nobody", ""), ("mlp", "9")])
def test_unknown_models_and_versions_are_not_found(raw, model, version):
    asked = service_pb2.ModelMetadataRequest(name=model, version=version)
    ready = service_pb2.ModelReadyRequest(name=model, version=version)
    for call, request in (
        (raw.ModelInfer, request_of(model_name=model, model_version=version)),
        (raw.ModelMetadata, asked),
        (raw.ModelReady, ready),
    ):
        code, details, _ = refused(call, request)
        assert code == "NOT_FOUND"
        assert model in details


def test_health_checks_of_grpc_itself_are_answered(mlp):
    with grpc.insecure_channel(address(mlp[0].grpc)) as channel:
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert call(b"") == b"\x08\x01"
        assert call(b"\x0a\x1e" + b"inference.GRPCInferenceService") == b"\x08\x01"
        assert refused(call, b"\x0a\x05other")[0] == "NOT_FOUND"


def test_a_message_over_the_limit_is_refused_and_one_below_is_not(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    with serving(Host(edgekit.load(tmp_path / "b")), limits=Limits(body=1 << 20)) as running, stub(running) as raw:
        large = service_pb2.ModelInferRequest(model_name="mlp", raw_input_contents=[bytes(1 << 20)])
        assert refused(raw.ModelInfer, large)[0] == "RESOURCE_EXHAUSTED"
        small = np.zeros((4000, 64), np.float32)
        assert len(raw.ModelInfer(request_of(small)).outputs[0].contents.fp32_contents) == 40000


def test_a_compressed_message_is_refused_before_it_grows(mlp):
    where = address(mlp[0].grpc)
    with grpc.insecure_channel(where, [("grpc.max_send_message_length", -1)]) as channel:
        raw = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        bomb = service_pb2.ModelInferRequest(model_name="mlp", raw_input_contents=[bytes(256 << 20)])
        code, details, _ = refused(raw.ModelInfer, bomb, compression=grpc.Compression.Gzip)
    assert code == "UNIMPLEMENTED"
    assert "gzip" in details


def test_without_the_token_nothing_is_answered_but_life(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    access = Access(tokens=TOKENS)
    with serving(Host(edgekit.load(tmp_path / "b")), access=access) as running, stub(running) as raw:
        assert raw.ServerLive(service_pb2.ServerLiveRequest()).live
        assert raw.ServerReady(service_pb2.ServerReadyRequest()).ready
        for headers in ([], [("authorization", "Bearer wrong")], [("authorization", TOKEN)]):
            code, details, trailing = refused(raw.ModelInfer, request_of(), metadata=headers)
            assert code == "UNAUTHENTICATED"
            assert "wants a token" in details
            assert trailing["www-authenticate"] == "Bearer"
            assert refused(raw.ServerMetadata, service_pb2.ServerMetadataRequest(), metadata=headers)[0] == code
            with pytest.raises(grpc.RpcError, match="wants a token"):
                next(raw.ModelStreamInfer(iter([request_of()]), metadata=headers))
        good = [("authorization", f"Bearer {TOKEN}")]
        assert raw.ModelInfer(request_of(), metadata=good).outputs
        with triton.InferenceServerClient(address(running.grpc)) as client:
            assert client.is_model_ready("mlp", headers={"authorization": f"Bearer {TOKEN}"})


def test_a_strangers_message_is_not_read(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    access = Access(tokens=TOKENS)
    with (
        serving(Host(edgekit.load(tmp_path / "b")), access=access) as running,
        grpc.insecure_channel(address(running.grpc)) as channel,
    ):
        endless = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        never = queue.Queue()
        assert refused(endless, iter(never.get, None), timeout=20)[0] == "UNAUTHENTICATED"
        never.put(None)


def test_tls_and_certificates_of_clients_are_asked_for(tmp_path):
    ours, others = certificates.authority(tmp_path / "ours"), certificates.authority(tmp_path / "others")
    certificate, key = ours.issue("127.0.0.1")
    root = ours.certificate.read_bytes()
    bundles.mlp_bundle(tmp_path / "b")

    def told(running, *signed):
        pair = [file.read_bytes() for file in reversed(signed)]
        with stub(running, grpc.ssl_channel_credentials(root, *pair)) as raw:
            return raw.ModelInfer(request_of(), timeout=20)

    with serving(
        Host(edgekit.load(tmp_path / "b")), access=Access(tls=Tls(certificate=certificate, key=key))
    ) as running:
        assert running.grpc.startswith("grpcs://127.0.0.1:")
        assert told(running).outputs
        with stub(running) as plain:
            assert refused(plain.ModelInfer, request_of(), timeout=20)[0] == "UNAVAILABLE"
    tls = Tls(certificate=certificate, key=key, clients=ours.certificate)
    with serving(Host(edgekit.load(tmp_path / "b")), access=Access(tls=tls)) as running:
        assert told(running, *ours.issue("device-7")).outputs
        for signed in ((), others.issue("device-7")):
            with pytest.raises(grpc.RpcError) as caught:
                told(running, *signed)
            assert caught.value.code().name == "UNAVAILABLE"


def test_files_of_tls_that_do_not_belong_together_are_named(tmp_path):
    ours = certificates.authority(tmp_path / "ours")
    tls = Tls(certificate=ours.issue("127.0.0.1")[0], key=ours.issue("other")[1])
    bundles.null_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with pytest.raises(UsageError, match="TLS cannot be set up"):
        serve_in_thread(host, options=Options(grpc_port=0, access=Access(tls=tls)))
    host.close()


class Held:
    """An engine that computes until it is let go, and may break then."""

    engine = "held"

    def __init__(self, error=None):
        self.error = error
        self.go = threading.Event()
        self.ran = 0

    def run(self, inputs):
        self.ran += 1
        self.go.wait(60)
        if self.error:
            raise self.error
        return {"scores": np.ones((1, 10), np.float32)}

    def close(self):
        self.go.set()


def held_host(error=None):
    contract = Contract(
        name="mlp",
        inputs=(TensorSpec("image", "float32", (-1, 64)),),
        outputs=(TensorSpec("scores", "float32", (-1, 10)),),
    )
    engine = Held(error)
    return engine, Host(Session(engine, bundles.variant("any", "null"), contract))


def until(is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metric(running, name):
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", ask(running.url, path="/metrics")[2].decode(), re.MULTILINE)
    return float(found[1])


def test_a_full_queue_turns_away_and_says_when_to_come_again():
    engine, host = held_host()
    with serving(host, limits=Limits(workers=1, queue=1)) as running, stub(running) as raw:
        inside = [raw.ModelInfer.future(request_of()) for _ in range(2)]
        until(lambda: metric(running, "edgekit_requests_in_flight") == 2)
        code, details, trailing = refused(raw.ModelInfer, request_of())
        assert code == "RESOURCE_EXHAUSTED"
        assert "1 requests wait already" in details
        assert (trailing["retry-after"], trailing["grpc-retry-pushback-ms"]) == ("1", "1000")
        assert raw.ServerLive(service_pb2.ServerLiveRequest()).live
        engine.go.set()
        assert all(one.result().outputs for one in inside)
        assert metric(running, "edgekit_turned_away_total") == 1
        assert metric(running, "edgekit_requests_total") == 2


def test_what_takes_too_long_is_given_up_and_what_had_not_begun_never_computes():
    engine, host = held_host()
    with serving(host, limits=Limits(workers=1, queue=4, seconds=0.2)) as running, stub(running) as raw:
        both = [raw.ModelInfer.future(request_of()) for _ in range(2)]
        for one in both:
            assert one.exception().code().name == "DEADLINE_EXCEEDED"
            assert "no answer within 0.2 s" in one.exception().details()
        assert metric(running, "edgekit_given_up_total") == 2
        engine.go.set()
        until(lambda: metric(running, "edgekit_requests_in_flight") == 0)
        assert engine.ran == 1


def test_a_clients_own_deadline_frees_its_place_in_the_queue():
    engine, host = held_host()
    with serving(host, limits=Limits(workers=1, queue=1)) as running, stub(running) as raw:
        first = raw.ModelInfer.future(request_of())
        until(lambda: engine.ran == 1)
        assert refused(raw.ModelInfer, request_of(), timeout=0.2)[0] == "DEADLINE_EXCEEDED"
        until(lambda: metric(running, "edgekit_requests_in_flight") == 1)
        engine.go.set()
        assert first.result().outputs
        assert engine.ran == 1


def test_an_engine_that_fails_is_internal_and_a_closed_host_unavailable():
    engine, host = held_host(HealthError("the engine is ill"))
    engine.go.set()
    with serving(host) as running, stub(running) as raw:
        assert refused(raw.ModelInfer, request_of())[:2] == ("INTERNAL", "the engine is ill")
        host.close()
        assert refused(raw.ModelInfer, request_of())[0] == "UNAVAILABLE"
        assert 'kind="HealthError"} 1' in ask(running.url, path="/metrics")[2].decode()


def test_stop_answers_what_is_in_flight_and_takes_nothing_new():
    engine, host = held_host()
    running = serve_in_thread(host, options=Options(grpc_port=0))
    with stub(running) as raw:
        inside = raw.ModelInfer.future(request_of())
        until(lambda: engine.ran == 1)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        until(lambda: is_refused(raw))
        engine.go.set()
        assert inside.result().outputs
        stopping.join(30)
        assert not stopping.is_alive()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address(running.grpc).split(":"), timeout=2)
    host.close()


SERVE_HELD = """
import sys, threading
sys.path[:0] = {path!r}
import test_grpc
from edgekit.runtime.server import Options, serve
engine, host = test_grpc.held_host()
threading.Thread(target=lambda: (sys.stdin.readline(), engine.go.set()), daemon=True).start()
threading.Thread(target=lambda: (test_grpc.until(lambda: engine.ran), print("computes", flush=True))).start()
serve(host, 0, Options(grpc_port=0), on_ready=lambda _, grpc: print(grpc, flush=True))
print("drained", flush=True)
"""


def test_sigterm_drains_what_is_in_flight(tmp_path):
    command = [sys.executable, "-c", SERVE_HELD.format(path=[str(Path(__file__).parent), *sys.path])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        url = child.stdout.readline().strip()
        with grpc.insecure_channel(address(url)) as channel:
            raw = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            inside = raw.ModelInfer.future(request_of())
            assert child.stdout.readline().strip() == "computes"
            child.send_signal(signal.SIGTERM)
            until(lambda: is_refused(raw))
            rest = child.communicate("go\n", timeout=30)[0]
            assert inside.result().outputs
    assert (rest.strip(), child.returncode) == ("drained", 0)


def test_a_second_signal_does_not_wait_for_what_is_in_flight():
    command = [sys.executable, "-c", SERVE_HELD.format(path=[str(Path(__file__).parent), *sys.path])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        url = child.stdout.readline().strip()
        with grpc.insecure_channel(address(url)) as channel:
            raw = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            inside = raw.ModelInfer.future(request_of())
            assert child.stdout.readline().strip() == "computes"
            child.send_signal(signal.SIGTERM)
            until(lambda: is_refused(raw))
            assert not inside.done()
            child.send_signal(signal.SIGTERM)
            assert inside.exception(timeout=20).code().name in ("UNAVAILABLE", "CANCELLED")
        child.communicate("go\n", timeout=30)  # the engine itself cannot be stopped


def is_refused(raw):
    try:
        raw.ServerLive(service_pb2.ServerLiveRequest())
    except grpc.RpcError as error:
        return error.code().name == "UNAVAILABLE"
    return False


def test_swaps_under_load_fail_no_request_and_mix_no_digest(tmp_path):
    values = {}
    for value in (1.0, 2.0):
        values[bundles.null_bundle(tmp_path / str(value), value=value).digest] = value
    host = Host(edgekit.load(tmp_path / "1.0"))
    given = triton.InferInput("image", [1, 3], "FP32")
    given.set_data_from_numpy(np.zeros((1, 3), np.float32))
    wrong, seen, stop = [], [], threading.Event()

    def ask_on(where):
        with triton.InferenceServerClient(where) as client:
            while not stop.is_set():
                try:
                    result = client.infer("null", [given])
                except InferenceServerException as error:
                    wrong.append(error)
                    continue
                digest = result.get_response().parameters["digest"].string_param
                seen.append(digest)
                if (result.as_numpy("scores") != values[digest]).any():
                    wrong.append(result)

    with serving(host) as running:
        threads = [threading.Thread(target=ask_on, args=(address(running.grpc),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            before = len(seen)
            until(lambda: len(seen) > before + 5)  # noqa: B023  # asked before the next turn
            host.swap(edgekit.load(tmp_path / ("1.0", "2.0")[(turn + 1) % 2]), shadow=turn % 3 == 0)
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert set(seen) == set(values)
    assert len(seen) > 100


def test_each_of_several_models_answers_to_its_name_loaded_or_not(tmp_path):
    digests = {}
    models = Repository()
    for name, seed in (("first", 0), ("second", 1)):
        folder = tmp_path / name
        digests[name] = bundles.mlp_bundle(folder, name=name, seed=seed).digest
        models.add(lambda folder=folder: edgekit.load(folder, threads=1))
    image = np.random.default_rng(5).normal(size=(2, 64)).astype(np.float32)
    with serving(models) as running, triton.InferenceServerClient(address(running.grpc)) as client:
        for is_loaded in (True, False):
            index = client.get_model_repository_index(as_json=True)["models"]
            assert [(one["name"], "reason" in one) for one in index] == [("first", False), ("second", not is_loaded)]
            for name, seed in (("first", 0), ("second", 1)):
                result = client.infer(name, [image_input(image)])
                np.testing.assert_allclose(result.as_numpy("scores"), bundles.mlp_numpy(image, seed), atol=1e-5)
                assert result.get_response().parameters["digest"].string_param == digests[name]
            client.unload_model("second")
            assert [host.is_loaded for host in models] == [True, False]
        client.load_model("second")
        assert [host.is_loaded for host in models] == [True, True]
        with pytest.raises(InferenceServerException, match=r"no model 'third'.*'first'"):
            client.unload_model("third")


def test_a_model_that_nobody_can_load_again_is_not_unloaded(client):
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*nobody said how mlp is loaded again"):
        client.unload_model("mlp")
    for move in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="no model is named"):
            move("")
    assert client.is_model_ready("mlp")


def test_a_stream_answers_each_request_and_outlives_a_refusal(mlp, client):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    images = [np.full((1, 64), value, np.float32) for value in (1, 2, 3)]
    client.async_stream_infer("mlp", [image_input(images[0])], request_id="a")
    client.async_stream_infer("nobody", [image_input(images[1])], request_id="b")
    client.async_stream_infer("mlp", [image_input(images[2])], request_id="c")
    first, second, third = (answers.get(timeout=30) for _ in range(3))
    client.stop_stream()
    for (result, error), image, name in ((first, images[0], "a"), (third, images[2], "c")):
        assert error is None
        np.testing.assert_allclose(result.as_numpy("scores"), bundles.mlp_numpy(image), atol=1e-5)
        assert result.get_response().id == name
        assert result.get_response().parameters["digest"].string_param == mlp[1]
    assert "no model 'nobody'" in second[1].message()


def test_a_refusal_in_a_stream_names_its_request(raw):
    sent = [request_of(id="good"), request_of(id="bad", model_name="nobody")]
    good, bad = raw.ModelStreamInfer(iter(sent))
    assert (good.infer_response.id, good.error_message) == ("good", "")
    assert bad.infer_response.id == "bad"
    assert "no model 'nobody'" in bad.error_message


def test_an_idle_stream_does_not_hold_the_server_up():
    engine, host = held_host()
    engine.go.set()
    running = serve_in_thread(host, options=Options(grpc_port=0))
    sent = queue.Queue()
    sent.put(request_of())
    with stub(running) as raw:
        stream = raw.ModelStreamInfer(iter(sent.get, None))
        assert next(stream).infer_response.outputs
        stopping = threading.Thread(target=running.stop, daemon=True)
        stopping.start()
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code().name == "UNAVAILABLE"
        assert "the server stops" in caught.value.details()
        stopping.join(20)  # less than what a stream in flight would be waited for
        assert not stopping.is_alive()
        sent.put(None)
    host.close()


def test_metrics_count_requests_of_both_protocols_together(tmp_path):
    sealed = bundles.mlp_bundle(tmp_path / "b")
    with serving(Host(edgekit.load(tmp_path / "b"))) as running, stub(running) as raw:
        raw.ModelInfer(request_of())
        refused(raw.ModelInfer, request_of(np.zeros((1, 63), np.float32)))
        text = ask(running.url, path="/metrics")[2].decode()
    assert f'edgekit_requests_total{{digest="{sealed.digest}"}} 2' in text
    assert f'edgekit_errors_total{{digest="{sealed.digest}",kind="InputError"}} 1' in text


def test_the_access_log_has_a_line_a_call_with_its_code_and_trace(mlp, raw, caplog):
    import json

    trace = "0af7651916cd43dd8448eb211c80319c"
    caplog.set_level("INFO", "edgekit.access")
    raw.ModelInfer(request_of(), metadata=[("traceparent", f"00-{trace}-b7ad6b7169203331-01")])
    refused(raw.ModelInfer, request_of(model_name="nobody"))
    until(lambda: len(caplog.records) == 2)
    good, bad = (json.loads(record.getMessage()) for record in caplog.records)
    assert (good["method"], good["path"], good["status"], good["trace_id"]) == (
        "GRPC",
        "/inference.GRPCInferenceService/ModelInfer",
        0,
        trace,
    )
    assert bad["status"] == grpc.StatusCode.NOT_FOUND.value[0]


def test_a_taken_port_is_named_and_a_second_server_does_not_share_it(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host, options=Options(grpc_port=0)) as running:
        port = int(running.grpc.rpartition(":")[2])
        with pytest.raises(ResourceError, match=f"port {port} for gRPC") as caught:
            serve_in_thread(host, options=Options(grpc_port=port))
        assert "--grpc-port" in caught.value.hint
    with serve_in_thread(host, options=Options(grpc_port=port)) as again:
        assert again.grpc == running.grpc
    host.close()


def test_a_missing_package_names_the_command_that_installs_it(tmp_path, monkeypatch):
    bundles.null_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    monkeypatch.setitem(sys.modules, "grpc.aio", None)
    with pytest.raises(MissingExtra) as caught:
        serve_in_thread(host, options=Options(grpc_port=0))
    assert "pip install 'edgekit[grpc]'" in caught.value.hint
    host.close()


OFF = """
import sys
sys.path[:0] = {path!r}
import edgekit
from edgekit.runtime.host import Host
from edgekit.runtime.repository import Repository
from edgekit.runtime.server import serve_in_thread
from fakes.requests_to import ask
host = Host(edgekit.load({folder!r}))
with serve_in_thread(host) as running:
    ask(running.url, path="/v2")
print(running.grpc or "off", *sorted(m for m in sys.modules if m.startswith(("grpc", "google")) or "grpc" in m))
"""


def test_without_the_port_nothing_of_it_is_imported(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    code = OFF.format(path=sys.path, folder=str(tmp_path / "b"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["off"]


def test_address_of_version_six_is_served(tmp_path):
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        bundles.null_bundle(tmp_path / "b")
        with serving(Host(edgekit.load(tmp_path / "b")), address="::1") as running, stub(running) as raw:
            assert running.grpc.startswith("grpc://[::1]:")
            assert raw.ServerLive(service_pb2.ServerLiveRequest()).live
        return
    pytest.skip("this machine has no IPv6 loopback")
