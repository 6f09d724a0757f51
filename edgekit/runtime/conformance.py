"""Asks any server whether it speaks the Open Inference Protocol v2 and OpenAI's API. Knows nothing of ours.

A client of the standard library: what a kinder client would mend by itself is seen. Specifications:
https://github.com/kserve/open-inference-protocol and https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import functools
import http.client
import json
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edgekit.errors import TransferError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SECONDS = 60.0
INFERENCE = "Open Inference Protocol v2"
LENGTH = "Inference-Header-Content-Length"
FORMS = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
"""How a datatype lies in bytes, little-endian, as `struct` writes it."""


@dataclass(frozen=True)
class Check:
    """One question, and what came of it: ``holds`` is None where it could not be asked, and ``told`` says why."""

    protocol: str
    what: str
    holds: bool | None
    told: str = ""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:  # noqa: ANN401  # any JSON; None where it is none
        """The body as JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Wrong(Exception):
    """An answer that is not what the specification says."""


@dataclass
class Server:
    """A server by its URL, and the headers that each request carries."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:  # noqa: ANN401  # JSON, or bytes as they are
        """Send one request over a connection of its own.

        Raises:
            TransferError: the server cannot be reached, or breaks the connection off.
        """
        where = urlsplit(self.url)
        if where.scheme not in ("http", "https") or not where.netloc:
            raise UsageError(f"{self.url!r} is no URL of a server", "give http://HOST:PORT or https://HOST:PORT")
        kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        told = {"Content-Type": "application/json", **self.headers, **(headers or {})}
        connection = kind(where.netloc, timeout=SECONDS)
        try:
            connection.request(method, f"{where.path.rstrip('/')}{path}", data, told)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        except (OSError, http.client.HTTPException) as error:
            raise TransferError(f"{self.url}{path}: {error or type(error).__name__}", "is the server up?") from error
        finally:
            connection.close()


def run(server: Server, model: str) -> Iterator[Check]:
    """Ask all that the server says it speaks, one check after the other; ``model`` empty takes what it names itself.

    Raises:
        TransferError: the server cannot be reached.
        UsageError: no model is named, and the server names none.
    """
    metadata = server.ask("GET", "/v2")
    listed = server.ask("GET", "/v1/models")
    if metadata.status != 200 and listed.status != 200:
        raise UsageError(
            f"{server.url} answers neither /v2 ({metadata.status}) nor /v1/models ({listed.status})",
            "give the URL of a server of the Open Inference Protocol or of OpenAI's API",
        )
    if metadata.status == 200:
        yield from _inference(server, model or _named(server))
    if listed.status == 200:
        yield from _openai(server, model or str(_first(listed.document)))


def _named(server: Server) -> str:
    """Ask for the models that are there: Triton's extension, which has become common."""
    found = server.ask("POST", "/v2/repository/index", {})
    names = [one.get("name") for one in found.document or () if isinstance(one, dict)] if found.status == 200 else []
    if not names:
        raise UsageError("the server names no model", "give --model NAME")
    return str(names[0])


def _first(document: Any) -> Any:  # noqa: ANN401  # JSON of a stranger
    data = document.get("data") if isinstance(document, dict) else None
    return data[0].get("id", "") if isinstance(data, list) and data and isinstance(data[0], dict) else ""


def checked(protocol: str, checks: Mapping[str, Callable[[], object]]) -> Iterator[Check]:
    """Ask each, and tell what came of it: it holds, unless `Wrong` says why not or a text why it was not asked."""
    for what, ask in checks.items():
        try:
            told = ask()
        except Wrong as error:
            yield Check(protocol, what, holds=False, told=str(error))
        except IndexError:  # a stranger's list, of outputs or of choices
            yield Check(protocol, what, holds=False, told="a list is empty that names at least one in the protocol")
        except TransferError as error:
            yield Check(protocol, what, holds=False, told=f"the connection broke: {error.message}")
        else:
            yield Check(protocol, what, holds=None if isinstance(told, str) else True, told=str(told or ""))


def expect(is_so: object, told: str) -> None:
    """Raise `Wrong` unless something is so."""
    if not is_so:
        raise Wrong(told)


def _expect_status(reply: Reply, *wanted: int) -> Reply:
    said = reply.body[:120].decode(errors="replace")
    expect(reply.status in wanted, f"answered {reply.status}, not {' or '.join(map(str, wanted))}: {said}")
    return reply


def _expect_fields(document: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str) -> None:  # noqa: ANN401  # JSON of a stranger
    expect(isinstance(document, dict), f"{where} is no JSON object")
    for name, kind in kinds.items():
        expect(isinstance(document.get(name), kind), f"{where} has {document.get(name)!r} as {name!r}")


class _Inference:
    """The questions of the Open Inference Protocol to one model."""

    def __init__(self, server: Server, model: str) -> None:
        self.server = server
        self.model = model
        self.path = f"/v2/models/{model}"

    def described(self) -> dict[str, Any]:
        """Ask for the model's inputs and outputs."""
        found = _expect_status(self.server.ask("GET", self.path), 200).document
        _expect_fields(found, {"name": str, "platform": str, "inputs": list, "outputs": list}, "the model's metadata")
        for tensor in (*found["inputs"], *found["outputs"]):
            _expect_fields(tensor, {"name": str, "datatype": str, "shape": list}, "a tensor's metadata")
        expect(found["name"] == self.model, f"the model calls itself {found['name']!r}")
        return dict(found)

    def given(self) -> list[dict[str, Any]]:
        """Make inputs of zeros: one sample, and one where an axis may have any size."""
        made = []
        for spec in self.described()["inputs"]:
            shape = [max(1, int(size)) for size in spec["shape"]]
            count = 1
            for size in shape:
                count *= size
            zero: object = {"BOOL": False, "BYTES": ""}.get(spec["datatype"], 0)
            made.append({"name": spec["name"], "datatype": spec["datatype"], "shape": shape, "data": [zero] * count})
        return made

    def infer(self, body: Any, headers: Mapping[str, str] | None = None, version: str = "") -> Reply:  # noqa: ANN401  # JSON of a stranger
        """Ask for an inference."""
        return self.server.ask("POST", f"{self.path}{version}/infer", body, headers)

    def answered(self, reply: Reply) -> dict[str, Any]:
        """Judge an answer in JSON."""
        document = _expect_status(reply, 200).document
        _expect_fields(document, {"model_name": str, "outputs": list}, "the answer")
        for output in document["outputs"]:
            _expect_fields(output, {"name": str, "datatype": str, "shape": list, "data": list}, "an output")
            count = 1
            for size in output["shape"]:
                count *= size
            expect(_size(output["data"]) == count, f"{output['name']!r} of shape {output['shape']} has other data")
        return dict(document)

    def health(self) -> None:
        """Ask whether server and model live and are ready."""
        for path in ("/v2/health/live", "/v2/health/ready", f"{self.path}/ready"):
            _expect_status(self.server.ask("GET", path), 200)

    def metadata(self) -> None:
        """Ask for the server's name, version and extensions."""
        found = _expect_status(self.server.ask("GET", "/v2"), 200).document
        _expect_fields(found, {"name": str, "version": str, "extensions": list}, "the server's metadata")

    def versions(self) -> str | None:
        """Ask the same of a version."""
        versions = self.described().get("versions") or []
        if not versions:
            return "the model names no version"
        _expect_status(self.server.ask("GET", f"{self.path}/versions/{versions[0]}/ready"), 200)
        self.answered(self.infer({"inputs": self.given()}, version=f"/versions/{versions[0]}"))
        return None

    def all_outputs(self) -> None:
        """Ask without naming outputs: all come, with the type that the metadata says."""
        found = self.answered(self.infer({"inputs": self.given()}))
        wanted, got = (
            sorted((one["name"], one["datatype"]) for one in told["outputs"]) for told in (self.described(), found)
        )
        expect(got == wanted, f"outputs are {got}, the metadata say {wanted}")

    def one_output(self) -> None:
        """Ask for the last output alone."""
        name = self.described()["outputs"][-1]["name"]
        found = self.answered(self.infer({"inputs": self.given(), "outputs": [{"name": name}]}))
        expect([one["name"] for one in found["outputs"]] == [name], f"asked for {name!r} alone")

    def identity(self) -> None:
        """Ask with an identifier, which comes back."""
        found = self.answered(self.infer({"id": "a 1", "inputs": self.given()}))
        expect(found.get("id") == "a 1", f"the identifier came back as {found.get('id')!r}")

    def nested(self) -> str | None:
        """Ask with data nested by rows, as the specification allows."""
        given = self.given()
        if any(len(one["shape"]) != 2 or one["shape"][0] != 1 for one in given):
            return "no input is a row"
        for one in given:
            one["data"] = [one["data"]]
        self.answered(self.infer({"inputs": given}))
        return None

    def binary(self) -> str | None:
        """Ask with tensors as bytes, both ways, where the extension is announced."""
        told = self.server.ask("GET", "/v2").document
        if "binary_tensor_data" not in (told.get("extensions") or []):
            return "the server does not announce binary_tensor_data"
        given = self.given()
        if any(one["datatype"] not in FORMS for one in given):
            return "an input has no fixed size"
        blobs = [struct.pack(f"<{len(one['data'])}{FORMS[one['datatype']]}", *one.pop("data")) for one in given]
        for one, blob in zip(given, blobs, strict=True):
            one["parameters"] = {"binary_data_size": len(blob)}
        head = json.dumps({"inputs": given, "parameters": {"binary_data_output": True}}).encode()
        reply = _expect_status(self.infer(head + b"".join(blobs), {LENGTH: str(len(head))}), 200)
        length = reply.headers.get(LENGTH.lower(), "")
        expect(length.isdigit() and int(length) <= len(reply.body), f"the answer has {length!r} as {LENGTH}")
        document = json.loads(reply.body[: int(length)])
        sizes = [one.get("parameters", {}).get("binary_data_size", -1) for one in document["outputs"]]
        expect(sum(sizes) == len(reply.body) - int(length), f"outputs of {sizes} bytes, {len(reply.body)} came")
        return None

    def refusals(self, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """Ask with something wrong in it: an error of the caller, told in JSON."""
        given = self.given()
        change(given)
        reply = _expect_status(self.infer({"inputs": given}), 400, 404, 422)
        _expect_fields(reply.document, {"error": str}, "the refusal")

    def noise(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Ask with what is no request."""
        reply = _expect_status(self.infer(body, headers), 400, 413, 415, 422)
        _expect_fields(reply.document, {"error": str}, "the refusal")

    def stranger(self) -> None:
        """Ask a model that is not there."""
        reply = self.server.ask("POST", "/v2/models/no-such-model-here/infer", {"inputs": self.given()})
        _expect_status(reply, 400, 404)


def _as_texts(given: list[dict[str, Any]]) -> None:
    numbers = next((one for one in given if one["datatype"] != "BYTES"), given[0])
    numbers["data"] = [{"no": "number"}] * len(numbers["data"])


WRONG: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "an unknown input is refused": lambda given: given[0].update(name="no such input"),
    "no input is refused": lambda given: given.clear(),
    "an unknown datatype is refused": lambda given: given[0].update(datatype="FP7"),
    "a shape that the data does not fill is refused": lambda given: given[0]["data"].append(given[0]["data"][0]),
    "data that are no numbers are refused": _as_texts,
}
"""What makes inputs wrong, by what is asked with them."""


def _size(data: Any) -> int:  # noqa: ANN401  # JSON of a stranger
    return sum(map(_size, data)) if isinstance(data, list) else 1


def _inference(server: Server, model: str) -> Iterator[Check]:
    about = _Inference(server, model)
    told = server.ask("GET", about.path).document
    if isinstance(told, dict) and told.get("inputs") == []:
        yield Check(
            INFERENCE, "the model describes its tensors", holds=None, told=f"{model} takes none: a language model?"
        )
        return

    checks: dict[str, Callable[[], object]] = {
        "server and model live and are ready": about.health,
        "the server names itself and its extensions": about.metadata,
        "the model describes its tensors": lambda: about.described() and None,
        "an inference without names of outputs gives all": about.all_outputs,
        "an inference gives the output that is asked for": about.one_output,
        "an identifier comes back": about.identity,
        "data may be nested by rows": about.nested,
        "a version answers as the model does": about.versions,
        "tensors travel as bytes": about.binary,
        **{what: functools.partial(about.refusals, change) for what, change in WRONG.items()},
        "broken JSON is refused": lambda: about.noise(b'{"inputs": ['),
        "JSON of another kind is refused": lambda: about.noise(b'["inputs"]'),
        "a header's length beyond the body is refused": lambda: about.noise(b"{}", {LENGTH: "1000"}),
        "an unknown model is refused": about.stranger,
        "after all that it still answers": about.all_outputs,
    }
    yield from checked(INFERENCE, checks)


class _OpenAi:
    """The questions of OpenAI's API to one model."""

    def __init__(self, server: Server, model: str) -> None:
        self.server = server
        self.model = model

    def models(self) -> None:
        """Ask for the models."""
        found = _expect_status(self.server.ask("GET", "/v1/models"), 200).document
        _expect_fields(found, {"object": str, "data": list}, "the list of models")
        for one in found["data"]:
            _expect_fields(one, {"id": str, "object": str, "created": int, "owned_by": str}, "a model")

    def chat(self, **more: object) -> Reply:
        """Ask for a short answer."""
        messages = [{"role": "user", "content": "Say hi"}]
        asked = {"model": self.model, "messages": messages, "max_tokens": 4, "temperature": 0, **more}
        return self.server.ask("POST", "/v1/chat/completions", asked)

    def whole(self) -> None:
        """Ask for a whole answer."""
        found = _expect_status(self.chat(), 200).document
        _expect_fields(
            found, {"id": str, "object": str, "created": int, "model": str, "choices": list, "usage": dict}, "a chat"
        )
        expect(found["object"] == "chat.completion", f"the object is {found['object']!r}")
        _expect_fields(found["choices"][0].get("message"), {"role": str, "content": str}, "the message")
        expect(found["choices"][0].get("finish_reason") in ("stop", "length"), "no reason of its end")
        counts = found["usage"]
        _expect_fields(counts, {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}, "the usage")
        expect(
            counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"], "the usage does not add up"
        )

    def stream(self) -> None:
        """Ask for a stream with usage."""
        reply = _expect_status(self.chat(stream=True, stream_options={"include_usage": True}), 200)
        kind = reply.headers.get("content-type", "")
        expect(kind.startswith("text/event-stream"), f"the stream is {kind!r}")
        lines = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")]
        expect(lines and lines[-1] == "[DONE]", "the stream does not end with [DONE]")
        events = [json.loads(line) for line in lines[:-1]]
        for event in events:
            expect(event.get("object") == "chat.completion.chunk", f"an event is {event.get('object')!r}")
        expect(isinstance(events[-1].get("usage"), dict) and events[-1].get("choices") == [], "no usage at the end")
        text = "".join(c.get("delta", {}).get("content") or "" for e in events for c in e["choices"])
        whole = self.chat().document["choices"][0]["message"]["content"]
        expect(text == whole, f"streamed {text!r}, whole {whole!r}")

    def completion(self) -> None:
        """Ask for a continuation."""
        asked = {"model": self.model, "prompt": "one, two,", "max_tokens": 4, "temperature": 0}
        found = _expect_status(self.server.ask("POST", "/v1/completions", asked), 200).document
        expect(found.get("object") == "text_completion", f"the object is {found.get('object')!r}")
        _expect_fields(found["choices"][0], {"text": str, "finish_reason": str}, "a choice")

    def refusal(self, reply: Reply, *wanted: int) -> None:
        """Judge a refusal: its status, and OpenAI's shape of an error."""
        found = _expect_status(reply, *wanted).document
        _expect_fields(found, {"error": dict}, "the refusal")
        _expect_fields(found["error"], {"message": str, "type": str}, "the error")


def _openai(server: Server, model: str) -> Iterator[Check]:
    about = _OpenAi(server, model)
    yield from checked("OpenAI", {"models are listed": about.models})
    first = about.chat()
    if first.status != 200:
        told = f"{model} answers a chat with {first.status}: a model of tensors?"
        yield Check("OpenAI", "a chat is answered whole", holds=None, told=told)
        return
    broken = b'{"model": "x", "messages": ['
    checks: dict[str, Callable[[], object]] = {
        "a chat is answered whole": about.whole,
        "a chat is streamed, with usage, and alike": about.stream,
        "a text is continued": about.completion,
        "an unknown model is refused": lambda: about.refusal(about.chat(model="no-such-model-here"), 404),
        "a temperature of 9 is refused": lambda: about.refusal(about.chat(temperature=9), 400, 422),
        "no message is refused": lambda: about.refusal(about.chat(messages=[]), 400, 422),
        "broken JSON is refused": lambda: about.refusal(server.ask("POST", "/v1/chat/completions", broken), 400, 422),
        "after all that it still answers": about.whole,
    }
    yield from checked("OpenAI", checks)
