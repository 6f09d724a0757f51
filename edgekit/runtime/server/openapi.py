"""The server's own description, as OpenAPI 3.1: made of the types that requests are decoded into. Knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

import edgekit
from edgekit.runtime.server import oip_tensors, openai_requests

if TYPE_CHECKING:
    from edgekit.runtime.repository import Repository

TEMPLATE = "#/components/schemas/{name}"
JSON = "application/json"
ERRORS = {
    "400": "The request does not fit the model, or is malformed",
    "401": "A token is wanted",
    "404": "There is no such model",
    "413": "The body is too long",
    "415": "The body is compressed",
    "429": "Too many wait: come again after Retry-After seconds",
    "500": "The model failed",
    "503": "Nothing serves",
    "504": "No answer in time",
}


class Text(msgspec.Struct, forbid_unknown_fields=True):
    """A body of /v1/classify for a model that reads texts: one, or a pair."""

    text: str | tuple[str, ...]


def document(models: Repository) -> dict[str, Any]:
    """Return the description of a server of these models."""
    contracts = [host.session.contract for host in models]
    asked = (openai_requests.Chat, openai_requests.Completion, openai_requests.Embeddings)
    types = (oip_tensors.InferRequest, *asked, Text)
    found, components = msgspec.json.schema_components(types, ref_template=TEMPLATE)
    infer, chat, completion, embeddings, text = found
    named = {"MODEL_NAME": tuple(one.name for one in contracts)}
    model = {**named, "MODEL_VERSION": tuple(sorted({one.version for one in contracts}))}
    versioned = "/v2/models/{MODEL_NAME}/versions/{MODEL_VERSION}"
    paths = {
        "/v2": _get("Server metadata"),
        "/v2/health/live": _get("Whether the server lives"),
        "/v2/health/ready": _get("Whether the model is ready, and its digest"),
        "/v2/repository/index": _post("The models that are there", {}),
        versioned: _get("The model's inputs and outputs", model),
        f"{versioned}/ready": _get("Whether the model is ready", model),
        f"{versioned}/infer": _post("Tensors in, tensors out", {JSON: infer, "application/octet-stream": {}}, model),
        "/v2/models/{MODEL_NAME}/classify": _post(
            "Labels of a picture, or of a text", {JSON: text, "image/*": {}}, named
        ),
        "/v2/models/{MODEL_NAME}/detect": _post("Objects in a picture", {"image/*": {}}, named),
        "/v2/repository/models/{MODEL_NAME}/load": _post("Load a model that was unloaded", {}, named),
        "/v2/repository/models/{MODEL_NAME}/unload": _post("Free a model until it is asked for", {}, named),
        "/v1/models": _get("The model, as OpenAI lists it"),
        "/v1/chat/completions": _post("A conversation goes on", {JSON: chat}),
        "/v1/completions": _post("A text goes on", {JSON: completion}),
        "/v1/embeddings": _post("A vector for each text", {JSON: embeddings}),
        "/v1/classify": _post("Labels of a picture, or of a text", {JSON: text, "image/*": {}}),
        "/v1/detect": _post("Objects in a picture", {"image/*": {}}),
        "/healthz": _get("Whether the server lives"),
        "/readyz": _get("Whether the model is ready"),
        "/metrics": _get("Counts, as Prometheus reads them", kind="text/plain"),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgekit", "version": edgekit.__version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": components},
    }


def _get(what: str, parameters: dict[str, tuple[str, ...]] | None = None, *, kind: str = JSON) -> dict[str, Any]:
    return {"get": {**_described(what, parameters), "responses": _answers(kind)}}


def _post(what: str, bodies: dict[str, Any], parameters: dict[str, tuple[str, ...]] | None = None) -> dict[str, Any]:
    body = {"requestBody": {"required": True, "content": {kind: {"schema": one} for kind, one in bodies.items()}}}
    return {"post": {**_described(what, parameters), **(body if bodies else {}), "responses": _answers(JSON)}}


def _described(what: str, parameters: dict[str, tuple[str, ...]] | None) -> dict[str, Any]:
    listed = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": values}}
        for name, values in (parameters or {}).items()
    ]
    return {"summary": what, "parameters": listed}


def _answers(kind: str) -> dict[str, Any]:
    done = {"200": {"description": "Done", "content": {kind: {}}}}
    return done | {status: {"description": meaning, "content": {JSON: {}}} for status, meaning in ERRORS.items()}
