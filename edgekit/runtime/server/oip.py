"""The Open Inference Protocol v2: server and model health, metadata, inference. Knows no engine.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

import edgekit
from edgekit.errors import InputError
from edgekit.runtime.server import oip_tensors as wire
from edgekit.runtime.server.exchange import HttpError, Request, Response, as_json

if TYPE_CHECKING:
    from edgekit.runtime.host import Host
    from edgekit.runtime.repository import Repository
    from edgekit.tensors import TensorSpec

LENGTH = b"inference-header-content-length"
_decoder = msgspec.json.Decoder(wire.InferRequest)


def server_metadata() -> Response:
    """Answer ``GET /v2``."""
    return as_json({"name": "edgekit", "version": edgekit.__version__, "extensions": ["binary_tensor_data"]})


def repository_index(models: Repository) -> Response:
    """Answer ``POST /v2/repository/index`` (Triton's extension): the models that are there, loaded or not."""
    return as_json(
        [
            {
                "name": host.session.contract.name,
                "version": host.session.contract.version,
                "state": "READY",
                "reason": "" if host.is_loaded else "loaded when it is asked for",
            }
            for host in models
        ]
    )


def model_metadata(host: Host) -> Response:
    """Answer ``GET /v2/models/{name}``."""
    session = host.session
    contract = session.contract
    return as_json(
        {
            "name": contract.name,
            "versions": [contract.version],
            "platform": session.engine,
            "inputs": [_described(spec) for spec in contract.inputs],
            "outputs": [_described(spec) for spec in contract.outputs],
            "parameters": {"digest": session.digest, "variant": session.variant.name},
        }
    )


def find(models: Repository, name: str, version: str | None) -> Host:
    """Return the host of a model.

    Raises:
        HttpError: 404, it does not serve here in that version.
    """
    host = models.get(name)
    if host is not None and version in (None, host.session.contract.version):
        return host
    asked = name if version is None else f"{name} version {version}"
    served = ", ".join(f"{one.session.contract.name!r} {one.session.contract.version}" for one in models)
    raise HttpError(404, f"there is no model {asked!r} here; served: {served}")


def infer(host: Host, request: Request, model: tuple[str, str]) -> Response:
    """Answer ``POST /v2/models/{name}/infer``: tensors in, tensors out, each as JSON or as bytes.

    Raises:
        HttpError, InputError: the request is malformed or does not fit the model.
    """
    parsed, binary = _parse(request)
    answer = host.run(wire.read_tensors(parsed.inputs, binary))
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    asked: list[tuple[str, wire.WireOutput | None]] = [(output.name, output) for output in parsed.outputs]
    for name, output in asked or [(name, None) for name in answer.outputs]:
        array = answer.outputs.get(name)
        if array is None:
            raise InputError(f"the model has no output {name!r}", f"it gives {', '.join(answer.outputs)}")
        described: dict[str, Any] = {"name": name, "datatype": wire.datatype(array.dtype), "shape": array.shape}
        if wire.wants_binary(parsed, output):
            blobs.append(wire.binary_data(array))
            described["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            described["data"] = wire.json_data(array)
        outputs.append(described)
    return _written(parsed, model, answer.digest, (outputs, blobs))


def _written(
    parsed: wire.InferRequest,
    model: tuple[str, str],
    digest: str,
    results: tuple[list[dict[str, Any]], list[bytes]],
) -> Response:
    outputs, blobs = results
    document = {
        "model_name": model[0],
        "model_version": model[1],
        "parameters": {"digest": digest},
        "outputs": outputs,
    }
    if parsed.id is not None:
        document["id"] = parsed.id
    head = msgspec.json.encode(document)
    if not blobs:
        return Response(head)
    length = (b"Inference-Header-Content-Length", str(len(head)).encode())
    return Response(b"".join([head, *blobs]), kind=b"application/octet-stream", headers=(length,))


def _parse(request: Request) -> tuple[wire.InferRequest, memoryview]:
    body = memoryview(request.body)
    head = request.headers.get(LENGTH)
    length = len(body)
    if head is not None:
        if not head.isdigit() or int(head) > len(body):
            raise HttpError(400, f"Inference-Header-Content-Length is {head!r}, the body has {len(body)} bytes")
        length = int(head)
    try:
        return _decoder.decode(body[:length]), body[length:]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"this is no inference request: {error}") from error


def _described(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": wire.NAMES.get(spec.dtype, spec.dtype), "shape": spec.shape}
