"""The routes, and what becomes of an error. A raw ASGI application; the model computes in threads of its own.

An idle FastAPI costs 15 MiB and 244 us a request more than this does (measured), so there is no framework.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import EdgekitError, InputError, MissingExtra, UsageError
from edgekit.runtime.server import access_log, metrics, oip, openai, openapi
from edgekit.runtime.server.access import Access
from edgekit.runtime.server.exchange import (
    JSON,
    Disconnected,
    HttpError,
    Request,
    Response,
    as_json,
    read_request,
    send_response,
)
from edgekit.runtime.server.gate import Gate, Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from edgekit.runtime.host import Host
    from edgekit.runtime.server.exchange import Receive, Scope, Send

    Answer = Callable[[Request], Awaitable[Response]]


class App:
    """Serves one host, within limits."""

    def __init__(self, host: Host, limits: Limits | None = None, access: Access | None = None) -> None:
        self.host = host
        self._access = access or Access()
        self._gate = Gate(limits or Limits())
        self._routes = self._table()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (the ASGI interface)."""
        if scope["type"] != "http":
            return
        started, headers = time.perf_counter(), dict(scope["headers"])
        trace = access_log.trace_of(headers) if b"traceparent" in headers else None
        response = await self._responded(scope, receive, headers)
        if response is None:
            return
        if trace:
            response = replace(response, headers=(*response.headers, trace.answer))
        await send_response(send, response)
        if access_log.LOG.isEnabledFor(logging.INFO):
            access_log.write(scope["method"], scope["path"], response.status, started=started, trace=trace)

    async def _responded(self, scope: Scope, receive: Receive, headers: dict[bytes, bytes]) -> Response | None:
        try:
            self._access.refuse_stranger(scope["path"], headers)
            request = await read_request(scope, receive, self._gate.limits.body)
            return await self._answer(request)
        except Disconnected:
            return None
        except HttpError as error:
            return _failed(scope["path"], error)

    def close(self) -> None:
        """End the threads once they are idle."""
        self._gate.close()

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._route(request)
        except EdgekitError as error:
            text = f"{error.message}; {error.hint}" if error.hint else error.message
            raise HttpError(_status(error), text) from error

    async def _route(self, request: Request) -> Response:
        if request.path[:2] == ("v2", "models") and len(request.path) > 2:
            return await self._model(request, request.path[2:])
        if request.path not in self._routes:
            raise _nothing_at(request)
        method, answer = self._routes[request.path]
        _refuse_other_method(request, method)
        return await answer(request)

    async def _model(self, request: Request, path: tuple[str, ...]) -> Response:
        name, version, action = path[0], None, path[1:]
        if len(path) > 2 and path[1] == "versions":
            version, action = path[2], path[3:]
        oip.refuse_other_model(self.host, name, version)
        if action == ("infer",):
            _refuse_other_method(request, "POST")
            named = (name, version or self.host.session.contract.version)
            return await self._gate.compute(lambda: oip.infer(self.host, request, named), len(request.body))
        _refuse_other_method(request, "GET")
        if action == ("ready",):
            return as_json({"name": name, "ready": True})
        if action:
            raise _nothing_at(request)
        return oip.model_metadata(self.host)

    async def _chat(self, request: Request) -> Response:
        return await openai.chat(self.host, request, self._gate)

    async def _complete(self, request: Request) -> Response:
        return await openai.completions(self.host, request, self._gate)

    async def _classify(self, request: Request) -> Response:
        def work() -> Response:
            texts = _texts(request)
            labels, digest = self.host.run_raw(request.body) if texts is None else self.host.run_text(texts)
            listed = [{"label": name, "probability": share} for name, share in labels]
            return as_json({"labels": listed, "digest": digest})

        return await self._gate.compute(work, len(request.body))

    async def _detect(self, request: Request) -> Response:
        def work() -> Response:
            found, digest = self.host.detect(request.body)
            listed = [{"label": one.label, "score": one.score, "box": one.box} for one in found]
            return as_json({"objects": listed, "digest": digest})

        return await self._gate.compute(work, len(request.body))

    async def _embed(self, request: Request) -> Response:
        return await self._gate.compute(lambda: openai.embeddings(self.host, request), len(request.body))

    def _table(self) -> dict[tuple[str, ...], tuple[str, Answer]]:
        live = _at_once(lambda: as_json({"live": True}))
        ready = _at_once(lambda: as_json({"ready": True, "digest": self.host.digest}))
        return {
            ("v2",): ("GET", _at_once(oip.server_metadata)),
            ("v2", "repository", "index"): ("POST", _at_once(lambda: oip.repository_index(self.host))),
            ("v2", "health", "live"): ("GET", live),
            ("v2", "health", "ready"): ("GET", ready),
            ("v1", "models"): ("GET", _at_once(lambda: openai.models(self.host))),
            ("v1", "chat", "completions"): ("POST", self._chat),
            ("v1", "completions"): ("POST", self._complete),
            ("v1", "embeddings"): ("POST", self._embed),
            ("v1", "classify"): ("POST", self._classify),
            ("v1", "detect"): ("POST", self._detect),
            ("openapi.json",): ("GET", _at_once(lambda: as_json(openapi.document(self.host)))),
            ("healthz",): ("GET", live),
            ("readyz",): ("GET", ready),
            ("metrics",): ("GET", _at_once(lambda: Response(metrics.text(self.host, self._gate), kind=metrics.KIND))),
        }


def _at_once(answer: Callable[[], Response]) -> Answer:
    async def answered(_: Request) -> Response:
        return answer()

    return answered


def _texts(request: Request) -> tuple[str, ...] | None:
    """Return the text, or the pair, of a JSON body; None for a picture's bytes."""
    if request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != JSON:
        return None
    try:
        text = msgspec.json.decode(request.body, type=openapi.Text).text
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, f'the body is not {{"text": "…"}}: {error}') from error
    return (text,) if isinstance(text, str) else text


def _refuse_other_method(request: Request, method: str) -> None:
    if request.method != method and (request.method, method) != ("HEAD", "GET"):
        allowed = b"GET, HEAD" if method == "GET" else method.encode()
        headers = ((b"allow", allowed),)
        raise HttpError(405, f"{request.method} is not taken here: use {method}", "", headers)


def _nothing_at(request: Request) -> HttpError:
    return HttpError(404, f"there is nothing at /{'/'.join(request.path)}")


def _status(error: EdgekitError) -> int:
    if isinstance(error, InputError):
        return 400
    return 503 if isinstance(error, UsageError | MissingExtra) else 500


def _failed(path: str, error: HttpError) -> Response:
    if path.startswith("/v1/"):
        return as_json(openai.error_document(error), error.status, error.headers)
    return as_json({"error": error.message}, error.status, error.headers)
