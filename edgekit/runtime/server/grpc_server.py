"""Runs the procedures on grpcio, in a thread with an event loop of its own. Knows no tensor.

An event loop and not grpcio's threads: a stream that is open and a request that waits cost no thread, and what a client
gives up is dropped before it computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgekitError, HealthError, ResourceError
from edgekit.plugins import extra
from edgekit.runtime.server import access_log, oip_grpc
from edgekit.runtime.server.exchange import HttpError, refusal
from edgekit.runtime.server.gate import AT_ONCE_BYTES
from edgekit.runtime.server.oip_messages import Empty, InferResponse, StreamResponse
from edgekit.runtime.server.protobuf import encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from edgekit.runtime.server.app import App
    from edgekit.runtime.server.serving import Options

DRAIN_SECONDS = 30
CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""gRPC's code for each status that the gate and the routes know; any other is INTERNAL."""
CANCELLED = 1
RETRY, PUSHBACK = "retry-after", "grpc-retry-pushback-ms"
"""When to come again, in seconds as HTTP says it and in milliseconds as gRPC's own retries read it (gRFC A6)."""
IDENTITY_ONLY = 1
"""The set of compressions that are taken: none, as over HTTP; grpcio unpacks up to the limit before it refuses."""


class GrpcServer:
    """Serves an application's models beside HTTP, through the same gates; `start` tells the URL, `stop` drains."""

    def __init__(self, app: App, options: Options) -> None:
        self._app = app
        self._options = options
        self._stopping, self._cutting = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="edgekit-grpc", daemon=True)
        self._port: Future[int] = Future()

    def start(self) -> str:
        """Take the port and answer from now on.

        Raises:
            MissingExtra: grpcio is not installed.
            ResourceError: the port is taken or may not be used.
            UsageError: the files of TLS do not belong together.
        """
        with extra("grpc"):
            import grpc.aio  # noqa: F401  # looked for here, where the caller hears of it
        if self._options.access.tls:
            self._options.access.tls.context()  # says what is wrong with the files; gRPC does not
        self._thread.start()
        port, address = self._port.result(), self._options.address
        scheme = "grpcs" if self._options.access.tls else "grpc"
        return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"

    def stop(self) -> None:
        """Answer what is in flight, take nothing new, and end the thread. The models stay open."""
        self._soon(self._stopping.set)
        self._thread.join()

    def cut(self) -> None:
        """End at once, after or instead of `stop`: what is in flight is given up."""
        self._soon(self._stopping.set)
        self._soon(self._cutting.set)

    def _soon(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(work)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except EdgekitError as error:
            self._port.set_exception(error)
        finally:
            if not self._port.done():
                self._port.set_exception(HealthError("the gRPC server did not start"))

    async def _serve(self) -> None:
        import grpc.aio

        server = grpc.aio.server(
            handlers=(_Calls(self._app, self._options, self._stopping),),
            options=(
                ("grpc.so_reuseport", 0),  # else a second server takes the same port, and half of the requests
                ("grpc.max_receive_message_length", self._app.limits.body),
                ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
            ),
        )
        port = self._bind(server)
        await server.start()
        self._loop = asyncio.get_running_loop()
        self._port.set_result(port)
        await self._stopping.wait()
        draining = asyncio.ensure_future(server.stop(DRAIN_SECONDS))
        cut = asyncio.ensure_future(self._cutting.wait())
        await asyncio.wait({draining, cut}, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()
        await server.stop(None)

    def _bind(self, server: Any) -> int:  # noqa: ANN401  # grpcio has no types
        import grpc

        address, wanted, tls = self._options.address, self._options.grpc_port, self._options.access.tls
        where = f"[{address}]:{wanted}" if ":" in address else f"{address}:{wanted}"
        try:
            if tls is None:
                return int(server.add_insecure_port(where))
            pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
            clients = tls.clients.read_bytes() if tls.clients else None
            secrets = grpc.ssl_server_credentials((pair,), clients, require_client_auth=clients is not None)
            return int(server.add_secure_port(where, secrets))
        except RuntimeError as error:
            raise ResourceError(
                f"cannot listen on {address} port {wanted} for gRPC",
                "stop what listens there, or choose another port with --grpc-port",
            ) from error


class _Calls:
    """Finds the procedure of a call, as `grpc.GenericRpcHandler` does."""

    def __init__(self, app: App, options: Options, stopping: asyncio.Event) -> None:
        self._app = app
        self._access = options.access
        self._stopping = stopping

    def service(self, details: Any) -> Any:  # noqa: ANN401  # grpcio has no types
        """Return what answers a call; a stranger's is refused before its message is read."""
        import grpc

        path, metadata = details.method, dict(details.invocation_metadata)
        try:
            if path not in oip_grpc.OPEN:
                self._access.refuse_stranger(path, {b"authorization": _as_bytes(metadata.get("authorization", b""))})
        except HttpError as error:
            return grpc.stream_stream_rpc_method_handler(self._logged(path, metadata, _refusal(error)))
        if path == oip_grpc.STREAM:
            return grpc.stream_stream_rpc_method_handler(self._logged(path, metadata, self._stream))
        if path == oip_grpc.INFER:
            answer: Callable[[bytes], Awaitable[bytes]] = self._infer
        elif path in (oip_grpc.LOAD, oip_grpc.UNLOAD):
            answer = self._move(load=path == oip_grpc.LOAD)
        elif path in oip_grpc.AT_ONCE:
            answer = self._at_once(path)
        else:
            return None

        async def unary(data: bytes, _: Any) -> bytes:  # noqa: ANN401  # grpcio has no types
            return await answer(data)

        return grpc.unary_unary_rpc_method_handler(self._logged(path, metadata, unary))

    def _logged(self, path: str, metadata: Mapping[str, str | bytes], answer: Any) -> Any:  # noqa: ANN401  # grpcio has no types
        """Return what answers, tells a refusal as gRPC does, and writes the line of the access log."""

        async def answered(data: Any, context: Any) -> Any:  # noqa: ANN401  # grpcio has no types
            started, code = time.perf_counter(), CANCELLED
            try:
                told = await answer(data, context)
            except (EdgekitError, HttpError) as error:
                code = _tell(context, _as_http(error))
            else:
                code = 0
                return told
            finally:
                if access_log.LOG.isEnabledFor(logging.INFO):
                    trace = access_log.trace_of({b"traceparent": _as_bytes(metadata.get("traceparent", b""))})
                    access_log.write("GRPC", tuple(path.split("/")[1:]), code, started=started, trace=trace)

        return answered

    def _at_once(self, path: str) -> Callable[[bytes], Awaitable[bytes]]:
        async def answer(data: bytes) -> bytes:
            return encode(oip_grpc.AT_ONCE[path](self._app.models, data))

        return answer

    def _move(self, *, load: bool) -> Callable[[bytes], Awaitable[bytes]]:
        """Return what loads or unloads a model, through its gate and never on the event loop."""

        async def answer(data: bytes) -> bytes:
            host, work = oip_grpc.moved(self._app.models, data, load=load)
            done = self._app.gate(host).compute(lambda: _done(work), AT_ONCE_BYTES + 1)
            return done if isinstance(done, bytes) else await done

        return answer

    async def _infer(self, data: bytes) -> bytes:
        return await self._computed(data, encode)

    async def _computed(self, data: bytes, written: Callable[[InferResponse], bytes]) -> bytes:
        """Compute; a model that has to be loaded first never does so on the event loop."""
        host = oip_grpc.find(self._app.models, data)
        size = len(data) if host.is_loaded else AT_ONCE_BYTES + 1
        answer = self._app.gate(host).compute(lambda: written(oip_grpc.infer(host, data)), size)
        return answer if isinstance(answer, bytes) else await answer

    async def _stream(self, _: Any, context: Any) -> None:  # noqa: ANN401  # grpcio has no types
        """Answer the requests of a stream one after the other; a refusal ends the request and not the stream."""
        import grpc.aio

        while (data := await self._next(context)) is not grpc.aio.EOF:
            await context.write(await self._of_stream(data))

    async def _of_stream(self, data: bytes) -> bytes:
        try:
            return await self._computed(data, lambda answer: encode(StreamResponse(infer_response=answer)))
        except (EdgekitError, HttpError) as error:
            named = InferResponse(id=oip_grpc.identity_of(data))
            return encode(StreamResponse(error_message=_as_http(error).message, infer_response=named))

    async def _next(self, context: Any) -> Any:  # noqa: ANN401  # bytes, or grpcio's mark of the end
        """Wait for a request, or for the server's end: an idle stream must not hold it up."""
        reading = asyncio.ensure_future(context.read())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not reading.done():
            reading.cancel()
            raise HttpError(503, "the server stops: connect again")
        return reading.result()


def _done(work: Callable[[], None]) -> bytes:
    work()
    return encode(Empty())


def _refusal(error: HttpError) -> Any:  # noqa: ANN401  # grpcio has no types
    async def refuse(_: Any, __: Any) -> None:  # noqa: ANN401  # grpcio has no types
        raise error

    return refuse


def _tell(context: Any, error: HttpError) -> int:  # noqa: ANN401  # grpcio has no types
    """End a call with the error's code, message and headers; return the code's number."""
    import grpc

    code = grpc.StatusCode[CODES.get(error.status, "INTERNAL")]
    context.set_code(code)
    context.set_details(error.message)
    trailing = {name.decode(): value.decode() for name, value in error.headers}
    if RETRY in trailing:
        trailing[PUSHBACK] = f"{1000 * int(trailing[RETRY])}"
    context.set_trailing_metadata(tuple(trailing.items()))
    return int(code.value[0])


def _as_http(error: EdgekitError | HttpError) -> HttpError:
    return error if isinstance(error, HttpError) else refusal(error)


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
