"""The routes, and what becomes of an error. Knows no socket; the models compute in threads of their own.

An idle FastAPI costs 15 MiB and 244 us a request more than this does (measured), so there is no framework.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import EdgekitError
from edgekit.runtime.decisions import TRACE
from edgekit.runtime.repository import Repository
from edgekit.runtime.server import access_log, metrics, oip, openai, openai_requests, openapi
from edgekit.runtime.server.access import Access
from edgekit.runtime.server.exchange import (
    JSON,
    HttpError,
    Request,
    Response,
    as_json,
    refusal,
)
from edgekit.runtime.server.gate import AT_ONCE_BYTES, Gate, Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from edgekit.runtime.host import Host

    Reply = Response | Awaitable[Response]
    Answer = Callable[[Request], Reply]


class _Named(msgspec.Struct):
    """What a body of OpenAI's API says of its model."""

    model: str = ""


class App:
    """Serves the models of a repository, each through a gate of its own: a slow one holds up nobody else."""

    def __init__(self, models: Host | Repository, limits: Limits | None = None, access: Access | None = None) -> None:
        self.models = models if isinstance(models, Repository) else Repository.of(models)
        self.limits = limits or Limits()
        self._access = access or Access()
        self._gates: dict[Host, Gate] = {}
        self._routes = self._table()

    def admit(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Look at a request whose body has not arrived.

        Raises:
            HttpError: 401 where a token is wanted and none of those taken is given.
        """
        self._access.refuse_stranger(path, headers)

    def respond(self, request: Request) -> Reply:
        """Answer a request: at once where that takes no time, else later."""
        started = time.perf_counter()
        trace = access_log.trace_of(request.headers) if b"traceparent" in request.headers else None
        TRACE.set(trace.trace_id if trace else "")
        try:
            answer = self._route(request)
        except (HttpError, EdgekitError) as error:
            answer = _failed(request, error)
        if not isinstance(answer, Response):
            return self._later(request, answer, started, trace)
        return _told(request, answer, started, trace)

    def refuse(self, request: Request, error: HttpError) -> Response:
        """Answer a request, whose body may be missing, with an error."""
        return _told(request, _failed(request, error), time.perf_counter(), None)

    def gate(self, host: Host) -> Gate:
        """Return what lets requests in to a model."""
        found = self._gates.get(host)
        if found is None:
            found = self._gates.setdefault(
                host, Gate(self.limits, lambda: host.session.is_isolated)
            )  # two protocols may ask at once
        return found

    def close(self) -> None:
        """End the threads once they are idle."""
        for gate in self._gates.values():
            gate.close()

    async def _later(
        self, request: Request, answer: Awaitable[Response], started: float, trace: access_log.Trace | None
    ) -> Response:
        try:
            response = await answer
        except (HttpError, EdgekitError) as error:
            response = _failed(request, error)
        return _told(request, response, started, trace)

    def _route(self, request: Request) -> Reply:
        if request.path[:2] == ("v2", "models") and len(request.path) > 2:
            return self._model(request, request.path[2:])
        if request.path[:3] == ("v2", "repository", "models") and len(request.path) == 5:
            return self._move(request, *request.path[3:])
        if request.path not in self._routes:
            raise _nothing_at(request)
        method, answer = self._routes[request.path]
        _refuse_other_method(request, method)
        return answer(request)

    def _model(self, request: Request, path: tuple[str, ...]) -> Reply:
        name, version, action = path[0], None, path[1:]
        if len(path) > 2 and path[1] == "versions":
            version, action = path[2], path[3:]
        host = oip.find(self.models, name, version)
        if action == ("infer",):
            _refuse_other_method(request, "POST")
            named = (name, version or host.session.contract.version)
            return self._compute(host, request, lambda: oip.infer(host, request, named))
        if action in (("classify",), ("detect",)):
            _refuse_other_method(request, "POST")
            return self._classify(request, host) if action == ("classify",) else self._detect(request, host)
        _refuse_other_method(request, "GET")
        if action == ("ready",):
            return as_json({"name": name, "ready": True})
        if action:
            raise _nothing_at(request)
        return oip.model_metadata(host)

    def _move(self, request: Request, name: str, action: str) -> Reply:
        """Load or unload a model (Triton's extension)."""
        if action not in ("load", "unload"):
            raise _nothing_at(request)
        _refuse_other_method(request, "POST")
        host = oip.find(self.models, name, None)
        move = self.models.load if action == "load" else self.models.unload

        def work() -> Response:
            move(host)
            return as_json({})

        return self.gate(host).compute(work, AT_ONCE_BYTES + 1)

    def _compute(self, host: Host, request: Request, work: Callable[[], Response]) -> Reply:
        """Compute; a model that has to be loaded first never does so on the event loop."""
        size = len(request.body) if host.is_loaded else AT_ONCE_BYTES + 1
        return self.gate(host).compute(work, size)

    def _classify(self, request: Request, host: Host | None = None) -> Reply:
        asked = host or self.models.default

        def work() -> Response:
            texts = _texts(request)
            labels, digest = asked.run_raw(request.body) if texts is None else asked.run_text(texts)
            listed = [{"label": name, "probability": share} for name, share in labels]
            return as_json({"labels": listed, "digest": digest})

        return self._compute(asked, request, work)

    def _detect(self, request: Request, host: Host | None = None) -> Reply:
        asked = host or self.models.default

        def work() -> Response:
            found, digest = asked.detect(request.body)
            listed = [{"label": one.label, "score": one.score, "box": one.box} for one in found]
            return as_json({"objects": listed, "digest": digest})

        return self._compute(asked, request, work)

    def _chat(self, request: Request) -> Reply:
        host = self._named(request)
        return openai.chat(host, request, self.gate(host))

    def _complete(self, request: Request) -> Reply:
        host = self._named(request)
        return openai.completions(host, request, self.gate(host))

    def _embed(self, request: Request) -> Reply:
        host = self._named(request)
        return self._compute(host, request, lambda: openai.embeddings(host, request))

    def _named(self, request: Request) -> Host:
        """Return the model that a body names; the default one where it names none of ours, which says so then."""
        default, *others = self.models
        if not others or len(request.body) > openai_requests.MAX_BODY:
            return default
        try:
            return self.models.get(msgspec.json.decode(request.body, type=_Named).model) or default
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return default

    def _ready(self) -> Response:
        session = self.models.default.session
        condition = session.condition()
        is_up = condition is None or condition.pid is not None
        return as_json({"ready": is_up, "digest": session.digest}, 200 if is_up else 503)

    def _table(self) -> dict[tuple[str, ...], tuple[str, Answer]]:
        live = _at_once(lambda: as_json({"live": True}))
        ready = _at_once(self._ready)
        return {
            ("v2",): ("GET", _at_once(oip.server_metadata)),
            ("v2", "repository", "index"): ("POST", _at_once(lambda: oip.repository_index(self.models))),
            ("v2", "health", "live"): ("GET", live),
            ("v2", "health", "ready"): ("GET", ready),
            ("v1", "models"): ("GET", _at_once(lambda: openai.models(self.models))),
            ("v1", "chat", "completions"): ("POST", self._chat),
            ("v1", "completions"): ("POST", self._complete),
            ("v1", "embeddings"): ("POST", self._embed),
            ("v1", "classify"): ("POST", self._classify),
            ("v1", "detect"): ("POST", self._detect),
            ("openapi.json",): ("GET", _at_once(lambda: as_json(openapi.document(self.models)))),
            ("healthz",): ("GET", live),
            ("readyz",): ("GET", ready),
            ("metrics",): ("GET", _at_once(lambda: Response(self._metrics(), kind=metrics.KIND))),
        }

    def _metrics(self) -> bytes:
        return metrics.text(self.models, [self.gate(host) for host in self.models])


def _at_once(answer: Callable[[], Response]) -> Answer:
    return lambda _: answer()


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


def _failed(request: Request, error: HttpError | EdgekitError) -> Response:
    """Give an error the shape of the protocol that is spoken at a path."""
    if isinstance(error, EdgekitError):
        error = refusal(error)
    document = openai.error_document(error) if request.path[:1] == ("v1",) else {"error": error.message}
    return as_json(document, error.status, error.headers)


def _told(request: Request, response: Response, started: float, trace: access_log.Trace | None) -> Response:
    """Write the line of the access log, and tell the caller its trace."""
    if access_log.LOG.isEnabledFor(logging.INFO):
        access_log.write(request.method, request.path, response.status, started=started, trace=trace)
    if trace is None:
        return response
    return msgspec.structs.replace(response, headers=(*response.headers, trace.answer))
