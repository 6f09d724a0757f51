"""The Open Inference Protocol v2 over gRPC: what each procedure answers. Knows the messages, not how they travel.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md; the
repository and the stream are Triton's extensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import edgekit
from edgekit.errors import InputError
from edgekit.runtime.server import oip, oip_contents
from edgekit.runtime.server import oip_messages as messages
from edgekit.runtime.server import oip_tensors as wire
from edgekit.runtime.server.exchange import HttpError
from edgekit.runtime.server.protobuf import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekit.runtime.host import Host
    from edgekit.runtime.repository import Repository
    from edgekit.runtime.server.protobuf import Blob, Message
    from edgekit.tensors import Array, TensorSpec

    Answer = Callable[[Repository, bytes], Message]


def infer(host: Host, data: bytes) -> messages.InferResponse:
    """Answer ``ModelInfer``: raw tensors where raw ones came, or where a type has no other form; else typed ones.

    Raises:
        InputError: the request is malformed, or does not fit the model.
    """
    request = decode(data, messages.InferRequest)
    answer = host.run(_arrays(request))
    names = [output.name for output in request.outputs] or list(answer.outputs)
    for name in names:
        if name not in answer.outputs:
            raise InputError(f"the model has no output {name!r}", f"it gives {', '.join(answer.outputs)}")
    arrays = {name: answer.outputs[name] for name in names}
    types = {name: wire.datatype(array.dtype) for name, array in arrays.items()}
    raw = bool(request.raw_input_contents) or "FP16" in types.values()
    return messages.InferResponse(
        model_name=request.model_name,
        model_version=request.model_version or host.session.contract.version,
        id=request.id,
        parameters={"digest": messages.Parameter(string_param=answer.digest)},
        outputs=tuple(
            messages.Tensor(
                name=name,
                datatype=types[name],
                shape=tuple(array.shape),
                contents=None if raw else oip_contents.typed(types[name], array),
            )
            for name, array in arrays.items()
        ),
        raw_output_contents=tuple(map(wire.binary_data, arrays.values())) if raw else (),
    )


def find(models: Repository, data: bytes) -> Host:
    """Return the host of the model that a request is for.

    Raises:
        HttpError: 404, it does not serve here in that version.
        InputError: the request is malformed.
    """
    asked = decode(data, messages.Addressed)
    return oip.find(models, asked.model_name, asked.model_version or None)


def moved(models: Repository, data: bytes, *, load: bool) -> tuple[Host, Callable[[], None]]:
    """Return the host that a request names, and what loads or unloads its model, which may take its time.

    Raises:
        HttpError: 404, there is no such model.
        InputError: the request is malformed, or names none.
    """
    name = decode(data, messages.MovedModel).model_name
    if not name:
        raise InputError("no model is named")
    host = oip.find(models, name, None)
    move = models.load if load else models.unload
    return host, lambda: move(host)


def identity_of(data: bytes) -> str:
    """Return what a request calls itself, "" where it cannot be read: an answer in a stream has to be told apart."""
    try:
        return decode(data, messages.Addressed).id
    except InputError:
        return ""


def _arrays(request: messages.InferRequest) -> dict[str, Array]:
    raw: Sequence[Blob] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw_input_contents came for {len(request.inputs)} inputs", "send one for each")
    arrays: dict[str, Array] = {}
    for at, tensor in enumerate(request.inputs):
        if tensor.name in arrays:
            raise InputError(f"input {tensor.name!r} is given twice")
        if "shared_memory_region" in tensor.parameters:
            raise InputError(f"input {tensor.name!r}: shared memory is not supported")
        if raw and tensor.contents is not None:
            raise InputError(f"input {tensor.name!r} has both contents and raw_input_contents")
        data = raw[at] if raw else oip_contents.raw_bytes(tensor)
        given = wire.WireInput(name=tensor.name, shape=tensor.shape, datatype=tensor.datatype)
        arrays[tensor.name] = wire.from_binary(given, memoryview(data))
    return arrays


def _model_ready(models: Repository, data: bytes) -> Message:
    asked = decode(data, messages.ModelName)
    oip.find(models, asked.name, asked.version or None)
    return messages.Live(live=True)


def _server_metadata(_: Repository, __: bytes) -> Message:
    return messages.ServerMetadata(name="edgekit", version=edgekit.__version__)


def _model_metadata(models: Repository, data: bytes) -> Message:
    asked = decode(data, messages.ModelName)
    session = oip.find(models, asked.name, asked.version or None).session
    return messages.ModelMetadata(
        name=session.contract.name,
        versions=(session.contract.version,),
        platform=session.engine,
        inputs=tuple(map(_described, session.contract.inputs)),
        outputs=tuple(map(_described, session.contract.outputs)),
        properties={"digest": session.digest, "variant": session.variant.name},
    )


def _repository_index(models: Repository, _: bytes) -> Message:
    return messages.RepositoryIndex(
        models=tuple(
            messages.ModelIndex(
                name=host.session.contract.name,
                version=host.session.contract.version,
                state="READY",
                reason="" if host.is_loaded else "loaded when it is asked for",
            )
            for host in models
        )
    )


def _health(_: Repository, data: bytes) -> Message:
    service = decode(data, messages.HealthQuestion).service
    if service not in ("", messages.SERVICE):
        raise HttpError(404, f"there is no service {service!r} here")
    return messages.HealthStatus(status=messages.SERVING)


def _described(spec: TensorSpec) -> messages.TensorMetadata:
    return messages.TensorMetadata(
        name=spec.name, datatype=wire.NAMES.get(spec.dtype, spec.dtype), shape=tuple(spec.shape)
    )


INFER = f"/{messages.SERVICE}/ModelInfer"
STREAM = f"/{messages.SERVICE}/ModelStreamInfer"
LOAD, UNLOAD = (f"/{messages.SERVICE}/RepositoryModel{what}" for what in ("Load", "Unload"))
AT_ONCE: Mapping[str, Answer] = {
    f"/{messages.SERVICE}/ServerLive": lambda _, __: messages.Live(live=True),
    f"/{messages.SERVICE}/ServerReady": lambda _, __: messages.Live(live=True),
    f"/{messages.SERVICE}/ModelReady": _model_ready,
    f"/{messages.SERVICE}/ServerMetadata": _server_metadata,
    f"/{messages.SERVICE}/ModelMetadata": _model_metadata,
    f"/{messages.SERVICE}/RepositoryIndex": _repository_index,
    f"/{messages.HEALTH}/Check": _health,
}
"""What is answered without computing, by its path."""
OPEN = frozenset({f"/{messages.SERVICE}/ServerLive", f"/{messages.SERVICE}/ServerReady", f"/{messages.HEALTH}/Check"})
"""What tells no more than that the server is there: it needs no token."""
