"""The messages of the Open Inference Protocol v2 over gRPC, and of gRPC's health checks, field by field. Pure data.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/open_inference_grpc.proto,
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto (streams and the repository),
and https://github.com/grpc/grpc/blob/master/doc/health-checking.md. A field's number is its place.
"""

from __future__ import annotations

import msgspec

from edgekit.runtime.server.protobuf import Blob, Message, Packed

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
SERVING = 1
"""The one state of a service in `HealthStatus`: a server that stops answers no more."""


class Empty(Message, frozen=True):
    """A request that asks nothing in particular."""


class Live(Message, frozen=True):
    """The server lives, or it or a model is ready: ``ServerLiveResponse`` and its like."""

    live: bool = False


class ModelName(Message, frozen=True):
    """``ModelReadyRequest`` and ``ModelMetadataRequest``; an empty version is any."""

    name: str = ""
    version: str = ""


class ServerMetadata(Message, frozen=True):
    """``ServerMetadataResponse``."""

    name: str = ""
    version: str = ""
    extensions: tuple[str, ...] = ()


class TensorMetadata(Message, frozen=True):
    """What a tensor is called, holds and measures; -1 for an axis of any size."""

    name: str = ""
    datatype: str = ""
    shape: tuple[int, ...] = ()


class ModelMetadata(Message, frozen=True):
    """``ModelMetadataResponse``."""

    name: str = ""
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()
    properties: dict[str, str] = msgspec.field(default_factory=dict)


class Parameter(Message, frozen=True):
    """``InferParameter``: one of these."""

    bool_param: bool | None = None
    int64_param: int | None = None
    string_param: str | None = None
    double_param: float | None = None
    uint64_param: int | None = None


class Contents(Message, frozen=True):
    """``InferTensorContents``: the values of a tensor, flat, in the field of its datatype."""

    bool_contents: Packed = Packed()
    int_contents: Packed = Packed()
    int64_contents: Packed = Packed()
    uint_contents: Packed = Packed()
    uint64_contents: Packed = Packed()
    fp32_contents: Packed = Packed()
    fp64_contents: Packed = Packed()
    bytes_contents: tuple[Blob, ...] = ()


class Tensor(Message, frozen=True):
    """``InferInputTensor`` and ``InferOutputTensor``; without contents its bytes are among the raw ones."""

    name: str = ""
    datatype: str = ""
    shape: tuple[int, ...] = ()
    parameters: dict[str, Parameter] = msgspec.field(default_factory=dict)
    contents: Contents | None = None


class RequestedOutput(Message, frozen=True):
    """``InferRequestedOutputTensor``."""

    name: str = ""
    parameters: dict[str, Parameter] = msgspec.field(default_factory=dict)


class InferRequest(Message, frozen=True):
    """``ModelInferRequest``."""

    model_name: str = ""
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Parameter] = msgspec.field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[RequestedOutput, ...] = ()
    raw_input_contents: tuple[Blob, ...] = ()


class Addressed(Message, frozen=True):
    """Whom a ``ModelInferRequest`` is for: its first fields, the rest unread."""

    model_name: str = ""
    model_version: str = ""
    id: str = ""


class InferResponse(Message, frozen=True):
    """``ModelInferResponse``."""

    model_name: str = ""
    model_version: str = ""
    id: str = ""
    parameters: dict[str, Parameter] = msgspec.field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()
    raw_output_contents: tuple[Blob, ...] = ()


class StreamResponse(Message, frozen=True):
    """``ModelStreamInferResponse``: an answer, or why there is none."""

    error_message: str = ""
    infer_response: InferResponse | None = None


class ModelIndex(Message, frozen=True):
    """One model of the repository."""

    name: str = ""
    version: str = ""
    state: str = ""
    reason: str = ""


class RepositoryIndex(Message, frozen=True):
    """``RepositoryIndexResponse``."""

    models: tuple[ModelIndex, ...] = ()


class MovedModel(Message, frozen=True):
    """``RepositoryModelLoadRequest`` and ``RepositoryModelUnloadRequest``: their first fields, the rest unread."""

    repository_name: str = ""
    model_name: str = ""


class HealthQuestion(Message, frozen=True):
    """``HealthCheckRequest``; no service means the whole server."""

    service: str = ""


class HealthStatus(Message, frozen=True):
    """``HealthCheckResponse``."""

    status: int = 0
