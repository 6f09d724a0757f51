"""Asks any server whether it speaks the Open Inference Protocol v2 over gRPC. Knows nothing of ours but the messages.

Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md.
Codes of refusals are not specified: those are taken that tell the caller's fault.
"""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edgekit.errors import InputError, TransferError, UsageError
from edgekit.plugins import extra
from edgekit.runtime.conformance import FORMS, SECONDS, Check, Wrong, checked, expect
from edgekit.runtime.server import oip_messages as messages
from edgekit.runtime.server.oip_contents import FIELDS
from edgekit.runtime.server.protobuf import Message, Packed, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Answer = TypeVar("Answer", bound=Message)

PROTOCOL = "Open Inference Protocol v2, gRPC"
REFUSALS = ("INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION")
UNREACHED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
ANY_SIZE = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
FLOATS = {"FP32": 4, "FP64": 8}


class Refused(Wrong):
    """A call that ended with another code than OK."""

    def __init__(self, procedure: str, code: str, details: str) -> None:
        super().__init__(f"{procedure} answered {code}: {details}")
        self.code = code


class Caller:
    """A connection to a server, over which procedures are called by their names."""

    def __init__(self, channel: Any, token: str) -> None:  # noqa: ANN401  # grpcio has no types
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def ask(self, procedure: str, given: Message | bytes, kind: type[Answer]) -> Answer:
        """Call a procedure.

        Raises:
            Refused: it ended in an error.
            TransferError: the server cannot be reached.
            Wrong: the answer is no message of that kind.
        """
        data = given if isinstance(given, bytes) else encode(given)
        call = self._channel.unary_unary(f"/{messages.SERVICE}/{procedure}")
        with _told(procedure):
            return _read(call(data, timeout=SECONDS, metadata=self._metadata), kind)

    def stream(self, given: list[messages.InferRequest]) -> list[messages.StreamResponse]:
        """Send requests down a stream, and return what came back."""
        call = self._channel.stream_stream(f"/{messages.SERVICE}/ModelStreamInfer")
        with _told("ModelStreamInfer"):
            answers = call(map(encode, given), timeout=SECONDS, metadata=self._metadata)
            return [_read(data, messages.StreamResponse) for data in answers]


def run(url: str, model: str, token: str) -> Iterator[Check]:
    """Ask the server at ``grpc://HOST:PORT`` or ``grpcs://HOST:PORT``; ``model`` empty takes the first that it names.

    Raises:
        MissingExtra: grpcio is not installed.
        TransferError: the server cannot be reached.
        UsageError: no model is named, and the server names none.
    """
    with extra("grpc"):
        import grpc
    scheme, _, where = url.partition("://")
    opened = (
        grpc.secure_channel(where, grpc.ssl_channel_credentials(), ANY_SIZE)
        if scheme == "grpcs"
        else grpc.insecure_channel(where, ANY_SIZE)
    )
    with opened as channel:
        caller = Caller(channel, token)
        about = _Inference(caller, model or _named(caller))
        with contextlib.suppress(Wrong):
            if not about.described().inputs:
                yield Check(PROTOCOL, "the model describes its tensors", holds=None, told="it takes none")
                return
        yield from checked(PROTOCOL, _questions(about))


class _Inference:
    """The questions to one model."""

    def __init__(self, caller: Caller, model: str) -> None:
        self.caller = caller
        self.model = model

    def described(self) -> messages.ModelMetadata:
        """Ask for the model's inputs and outputs."""
        found = self.caller.ask("ModelMetadata", messages.ModelName(name=self.model), messages.ModelMetadata)
        expect(found.name == self.model, f"the model calls itself {found.name!r}")
        for tensor in (*found.inputs, *found.outputs):
            expect(tensor.name and tensor.datatype, f"a tensor is {tensor.name!r} of {tensor.datatype!r}")
        return found

    def typed(self, **fields: Any) -> messages.InferRequest:  # noqa: ANN401  # fields of the message
        """Make a request of zeros in typed contents: one sample, and one where an axis may have any size."""
        inputs = tuple(_zeros(spec) for spec in self.described().inputs)
        made = messages.InferRequest(model_name=self.model, inputs=inputs)
        return msgspec.structs.replace(made, **fields)

    def raw(self) -> messages.InferRequest:
        """Make the same request in raw contents."""
        typed = self.typed()
        inputs = tuple(msgspec.structs.replace(one, contents=None) for one in typed.inputs)
        blobs = tuple(bytes(math.prod(one.shape) * _size(one.datatype)) for one in inputs)
        return msgspec.structs.replace(typed, inputs=inputs, raw_input_contents=blobs)

    def usual(self) -> messages.InferRequest:
        """Make a request in the form that the model's datatypes allow."""
        is_half = any(spec.datatype not in FIELDS for spec in self.described().inputs)
        return self.raw() if is_half else self.typed()

    def infer(self, request: messages.InferRequest) -> messages.InferResponse:
        """Ask for an inference, and judge the answer."""
        return _judged(self.caller.ask("ModelInfer", request, messages.InferResponse))

    def health(self) -> None:
        """Ask whether server and model live and are ready."""
        for procedure in ("ServerLive", "ServerReady"):
            expect(self.caller.ask(procedure, b"", messages.Live).live, f"{procedure} says no")
        ready = self.caller.ask("ModelReady", messages.ModelName(name=self.model), messages.Live).live
        expect(ready, "ModelReady says no")

    def metadata(self) -> None:
        """Ask for the server's name and version."""
        found = self.caller.ask("ServerMetadata", b"", messages.ServerMetadata)
        expect(found.name and found.version, f"the server is {found.name!r} of version {found.version!r}")

    def all_outputs(self) -> None:
        """Ask without naming outputs: all come, with the type that the metadata says."""
        wanted, got = (
            sorted((one.name, one.datatype) for one in told.outputs)
            for told in (self.described(), self.infer(self.usual()))
        )
        expect(got == wanted, f"outputs are {got}, the metadata say {wanted}")

    def typed_contents(self) -> str | None:
        """Ask with typed contents."""
        if any(spec.datatype not in FIELDS for spec in self.described().inputs):
            return "an input has no typed contents"
        self.infer(self.typed())
        return None

    def raw_contents(self) -> None:
        """Ask with raw contents."""
        self.infer(self.raw())

    def one_output(self) -> None:
        """Ask for the last output alone."""
        name = self.described().outputs[-1].name
        asked = msgspec.structs.replace(self.usual(), outputs=(messages.RequestedOutput(name=name),))
        found = [one.name for one in self.infer(asked).outputs]
        expect(found == [name], f"asked for {name!r} alone, got {found}")

    def identity(self) -> None:
        """Ask with an identifier, which comes back."""
        found = self.infer(msgspec.structs.replace(self.usual(), id="a 1")).id
        expect(found == "a 1", f"the identifier came back as {found!r}")

    def versions(self) -> str | None:
        """Ask the same of a version."""
        versions = self.described().versions
        if not versions:
            return "the model names no version"
        self.infer(msgspec.structs.replace(self.usual(), model_version=versions[0]))
        return None

    def stream(self) -> str | None:
        """Send a good request, a bad one and a good one down a stream; each gets its answer."""
        good = self.usual()
        bad = msgspec.structs.replace(good, model_name="no-such-model-here")
        try:
            found = self.caller.stream([good, bad, good])
        except Refused as error:
            if error.code == "UNIMPLEMENTED":
                return "the server has no ModelStreamInfer"
            raise
        expect([bool(one.error_message) for one in found] == [False, True, False], f"{len(found)} answers, or errors")
        for one in (found[0], found[2]):
            _judged(one.infer_response or messages.InferResponse())
        return None

    def refusal(self, change: Callable[[messages.Tensor], tuple[messages.Tensor, ...]]) -> None:
        """Ask with something wrong in the first input."""
        made = self.usual()
        inputs = (*change(made.inputs[0]), *made.inputs[1:])
        self.refused(msgspec.structs.replace(made, inputs=inputs), *REFUSALS)

    def refused(self, request: messages.InferRequest | bytes, *codes: str) -> None:
        """Ask with what has to be refused with one of the codes."""
        try:
            self.caller.ask("ModelInfer", request, messages.InferResponse)
        except Refused as error:
            if error.code not in codes:
                raise
        else:
            raise Wrong("it was answered")


def _questions(about: _Inference) -> dict[str, Callable[[], object]]:
    stranger = msgspec.structs.replace
    return {
        "server and model live and are ready": about.health,
        "the server names itself": about.metadata,
        "the model describes its tensors": lambda: about.described() and None,
        "an inference without names of outputs gives all": about.all_outputs,
        "typed contents are taken": about.typed_contents,
        "raw contents are taken": about.raw_contents,
        "an inference gives the output that is asked for": about.one_output,
        "an identifier comes back": about.identity,
        "a version answers as the model does": about.versions,
        "a stream answers each request and outlives a refusal": about.stream,
        **{what: functools.partial(about.refusal, change) for what, change in WRONG.items()},
        "bytes that are no message are refused": lambda: about.refused(b"\xff" * 20, *REFUSALS, "INTERNAL"),
        "an unknown model is refused": lambda: about.refused(
            stranger(about.usual(), model_name="no-such-model-here"), *REFUSALS
        ),
        "after all that it still answers": about.all_outputs,
    }


WRONG: dict[str, Callable[[messages.Tensor], tuple[messages.Tensor, ...]]] = {
    "an unknown input is refused": lambda one: (msgspec.structs.replace(one, name="no such input"),),
    "a missing input is refused": lambda _: (),
    "an unknown datatype is refused": lambda one: (msgspec.structs.replace(one, datatype="FP7"),),
    "a shape that the data does not fill is refused": lambda one: (
        msgspec.structs.replace(one, shape=(*one.shape[:-1], one.shape[-1] + 1)),
    ),
    "a shape that no memory holds is refused": lambda one: (
        msgspec.structs.replace(one, shape=(1 << 62, *one.shape[1:])),
    ),
    "an input given twice is refused": lambda one: (one, one),
}
"""What makes inputs wrong, by what is asked with them."""


def _named(caller: Caller) -> str:
    """Ask for the models that are there: Triton's extension."""
    try:
        found = caller.ask("RepositoryIndex", b"", messages.RepositoryIndex).models
    except Refused as error:
        raise UsageError(f"the server names no model: {error}", "give --model NAME") from error
    if not found:
        raise UsageError("the server names no model", "give --model NAME")
    return found[0].name


def _zeros(spec: messages.TensorMetadata) -> messages.Tensor:
    shape = tuple(max(1, size) for size in spec.shape)
    count, field = math.prod(shape), FIELDS.get(spec.datatype)
    contents = messages.Contents()
    if field == "bytes_contents":
        contents = messages.Contents(bytes_contents=(b"",) * count)
    elif field:
        zeros = Packed((bytes(count * FLOATS.get(spec.datatype, 1)),))
        contents = msgspec.structs.replace(contents, **{field: zeros})
    return messages.Tensor(name=spec.name, datatype=spec.datatype, shape=shape, contents=contents)


def _size(datatype: str) -> int:
    """Return how many bytes one zero takes among raw ones; an empty string its length alone."""
    return 4 if datatype == "BYTES" else struct.calcsize(FORMS.get(datatype, "B"))


def _judged(answer: messages.InferResponse) -> messages.InferResponse:
    """Look whether each output has the values that its shape needs, all raw or all typed."""
    raw = answer.raw_output_contents
    expect(answer.outputs, "the answer has no outputs")
    expect(not raw or len(raw) == len(answer.outputs), f"{len(raw)} raw contents for {len(answer.outputs)} outputs")
    for at, one in enumerate(answer.outputs):
        count, found = math.prod(one.shape), None
        if raw and one.datatype in FORMS:
            found = len(raw[at]) / _size(one.datatype)
        elif not raw:
            found = _count(one)
        expect(found in (None, count), f"{one.name!r} of shape {one.shape} has {found} values")
    return answer


def _count(tensor: messages.Tensor) -> float:
    """Count the values in the field of a datatype, 0 where they lie in another."""
    contents, field = tensor.contents or messages.Contents(), FIELDS.get(tensor.datatype, "bytes_contents")
    if field == "bytes_contents":
        return len(contents.bytes_contents)
    data = b"".join(getattr(contents, field).pieces)
    return len(data) / FLOATS[tensor.datatype] if tensor.datatype in FLOATS else sum(byte < 0x80 for byte in data)


def _read(data: bytes, kind: type[Answer]) -> Answer:
    try:
        return decode(data, kind)
    except InputError as error:
        raise Wrong(f"the answer cannot be read: {error.message}") from error


@contextlib.contextmanager
def _told(procedure: str) -> Iterator[None]:
    """Tell an error of gRPC as what it means for the check."""
    import grpc

    try:
        yield
    except grpc.RpcError as error:
        code, details = error.code().name, str(error.details())
        if code in UNREACHED:
            raise TransferError(f"{procedure}: {code}: {details}", "is the server up?") from error
        raise Refused(procedure, code, details) from error
