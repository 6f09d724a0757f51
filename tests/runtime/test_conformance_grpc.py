"""`edgekit conformance grpc://…`: our own server holds every check, and each planted fault is found by its check."""

import hashlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner
from fakes import bundles
from test_oip import echoes_bundle

import edgekit
from edgekit.cli import cli
from edgekit.errors import TransferError, UsageError
from edgekit.runtime.host import Host
from edgekit.runtime.server import Access, Options, serve_in_thread

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402  # after the skip

from edgekit.runtime import conformance_grpc  # noqa: E402  # after the skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    opened = []

    def serve(make, **options):
        folder = tmp_path_factory.mktemp("conformance") / "b"
        make(folder)
        host = Host(edgekit.load(folder))
        opened.append((serve_in_thread(host, options=Options(grpc_port=0, **options)), host))
        return opened[-1][0].grpc

    yield serve
    for running, host in opened:
        running.stop()
        host.close()


@pytest.fixture(scope="module")
def good(served):
    return served(bundles.mlp_bundle)


def test_our_server_holds_every_check(good):
    done = CliRunner().invoke(cli, ["conformance", good, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert {one["holds"] for one in document["checks"]} == {True}
    assert document["held"] == document["asked"] == 19


def test_a_model_of_every_datatype_is_asked_with_raw_contents(served):
    found = {one.what: one for one in conformance_grpc.run(served(echoes_bundle), "", "")}
    assert found["typed contents are taken"].told == "an input has no typed contents"
    assert {one.holds for one in found.values()} == {True, None}


def test_a_token_is_given_with_every_question(served):
    access = Access(tokens=(hashlib.sha256(b"0123456789-0123456789").digest(),))
    url = served(bundles.mlp_bundle, access=access)
    done = CliRunner().invoke(cli, ["conformance", url, "--token", "0123456789-0123456789"])
    assert done.exit_code == 0, done.output
    with pytest.raises(UsageError, match="UNAUTHENTICATED"):
        list(conformance_grpc.run(url, "", ""))


def test_a_language_model_is_not_asked(served):
    (only,) = conformance_grpc.run(served(lambda folder: bundles.null_bundle(folder, text=True)), "", "")
    assert (only.holds, only.told) == (None, "it takes none")


def test_a_server_that_is_not_there_is_a_transfer_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TransferError, match="UNAVAILABLE"):
        list(conformance_grpc.run(f"grpc://127.0.0.1:{port}", "", ""))


class Faulty(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Passes requests on to a good server with Triton's own messages, and spoils the answers of one kind."""

    def __init__(self, good, spoil):
        channel = grpc.insecure_channel(good.partition("://")[2])
        self.good = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.spoil = spoil

    def __getattribute__(self, name):
        if not name.startswith(("Server", "Model", "Repository")) or name == "ModelStreamInfer":
            return super().__getattribute__(name)

        def answer(request, context):
            try:
                reply = getattr(self.good, name)(request)
            except grpc.RpcError as error:
                reply = error
            reply = self.spoil(name, request, reply)
            if isinstance(reply, grpc.RpcError):
                context.abort(reply.code(), reply.details())
            return reply

        return answer

    def ModelStreamInfer(self, requests, context):  # noqa: N802  # the procedure's name
        for request in requests:
            try:
                reply = service_pb2.ModelStreamInferResponse(infer_response=self.good.ModelInfer(request))
            except grpc.RpcError as error:
                reply = service_pb2.ModelStreamInferResponse(error_message=error.details())
            yield self.spoil("ModelStreamInfer", request, reply)


def changed(procedure, change):
    def spoil(name, request, reply):
        if name == procedure and not isinstance(reply, grpc.RpcError):
            change(request, reply)
        return reply

    return spoil


def answered(name, request, reply):
    """Answer what is to be refused."""
    if name == "ModelInfer" and isinstance(reply, grpc.RpcError):
        return service_pb2.ModelInferResponse(model_name=request.model_name)
    return reply


def shorter(_, reply):
    if reply.raw_output_contents:
        reply.raw_output_contents[0] = reply.raw_output_contents[0][:-4]


def other_field(_, reply):
    if not reply.raw_output_contents:
        reply.outputs[0].contents.int_contents.extend([0] * 10)
        reply.outputs[0].contents.ClearField("fp32_contents")


FAULTS = {
    "nothing": (lambda _, __, reply: reply, set()),
    "not ready": (
        changed("ModelReady", lambda _, reply: reply.Clear()),
        {"server and model live and are ready"},
    ),
    "no version": (
        changed("ServerMetadata", lambda _, reply: reply.ClearField("version")),
        {"the server names itself"},
    ),
    "raw contents too short": (changed("ModelInfer", shorter), {"raw contents are taken"}),
    "values in another field": (
        changed("ModelInfer", other_field),
        {
            "an inference without names of outputs gives all",
            "typed contents are taken",
            "an inference gives the output that is asked for",
            "an identifier comes back",
            "a version answers as the model does",
            "after all that it still answers",
        },
    ),
    "no identifier": (
        changed("ModelInfer", lambda _, reply: reply.ClearField("id")),
        {"an identifier comes back"},
    ),
    "another datatype": (
        changed("ModelMetadata", lambda _, reply: setattr(reply.outputs[0], "datatype", "FP64")),
        {"an inference without names of outputs gives all", "after all that it still answers"},
    ),
    "a stream without errors": (
        changed("ModelStreamInfer", lambda _, reply: reply.ClearField("error_message")),
        {"a stream answers each request and outlives a refusal"},
    ),
    "what is wrong is answered": (
        answered,
        {*conformance_grpc.WRONG, "an unknown model is refused"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_found_by_its_check(good, fault):
    spoil, checks = FAULTS[fault]
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Faulty(good, spoil), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        found = list(conformance_grpc.run(f"grpc://127.0.0.1:{port}", "", ""))
    finally:
        server.stop(None).wait()
    assert {one.what for one in found if one.holds is False} == checks
