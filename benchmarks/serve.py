"""The server's latency, throughput, CPU and memory for a small perceptron, beside LitServe, MLServer and BentoML.

Every server runs alone in a process of its own on one core, with one engine thread; the client, the same for all, sends
prepared bytes over kept connections from another core. Peers run in environments of their own, whose interpreters
``EDGEKIT_LITSERVE``, ``EDGEKIT_MLSERVER`` and ``EDGEKIT_BENTOML`` name; each serves the same ONNX file through ONNX
Runtime with its own defaults but for one worker. Servers take turns, several rounds each, and medians count.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _report import ROOT, Row, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES = (64, 64, 64, 10)
CORES = sorted(os.sched_getaffinity(0))
PEERS = {"LitServe": "EDGEKIT_LITSERVE", "MLServer": "EDGEKIT_MLSERVER", "BentoML": "EDGEKIT_BENTOML"}
READY_SECONDS = 60
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A server that runs, and the requests that it takes: whole messages of HTTP by their name."""

    name: str
    process: subprocess.Popen[bytes] | None
    port: int
    requests: dict[str, bytes]
    ready_seconds: float = 0.0
    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, value: float) -> None:
        """Keep a figure of one round."""
        self.figures.setdefault(what, []).append(value)

    def median(self, what: str) -> float | None:
        """Return the median over the rounds; None where it was not measured."""
        found = self.figures.get(what)
        return statistics.median(found) if found else None


def main(quick: bool) -> list[Row]:
    rounds, seconds = (1, 0.5) if quick else (5, 3.0)
    os.sched_setaffinity(0, {CORES[-1]})
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as running:
        folder = Path(scratch)
        _write_model(folder)
        servers, absent = [running.enter_context(_edgekit(folder))], []
        for name, variable in PEERS.items():
            python = os.environ.get(variable, "")
            if python:
                servers.append(running.enter_context(_peer(name, python, folder)))
            else:
                absent.append(Row(name, None, f"not installed: name its interpreter in {variable}"))
        for server in servers:
            _measure_idle(server, 0.5 if quick else 5.0)
        for _ in range(rounds):
            for server in servers:
                _measure(server, seconds)
        return [*_rows(servers), *_swaps(folder, 50 if quick else 1000), *absent]


def _swaps(folder: Path, count: int) -> list[Row]:
    """Swap two models under load so often; count the requests that failed, and those that another model answered."""
    import edgekit
    from edgekit.runtime.host import Host
    from edgekit.runtime.server import serve_in_thread

    os.sched_setaffinity(0, CORES)
    _write_model(folder / "other", seed=1)
    bundles = [folder / "b", folder / "other" / "b"]
    sessions = [edgekit.load(path, threads=1) for path in bundles]
    given = np.array([_values()], np.float32)
    answers = {session.digest: session.run({"x": given})["y"][0] for session in sessions}
    for session in sessions:
        session.close()
    host = Host(edgekit.load(bundles[0], threads=1))
    done, failed, wrong = 0, 0, 0
    ended = threading.Event()

    def load(server: Server) -> None:
        nonlocal done, failed, wrong
        with _connected(server) as link:
            while not ended.is_set():
                link.sendall(server.requests["JSON"])
                head, _, body = _answer(link).partition(b"\r\n\r\n")
                told = json.loads(body)
                good = head.startswith(b"HTTP/1.1 200")
                done, failed = done + 1, failed + (not good)
                wanted = answers[told["parameters"]["digest"]] if good else None
                wrong += good and not np.allclose(told["outputs"][0]["data"], wanted, atol=1e-5)

    with serve_in_thread(host) as running:
        server = Server("edgekit", None, int(running.url.rpartition(":")[2]), _oip("mlp"))
        threads = [threading.Thread(target=load, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        began = time.perf_counter()
        for number in range(count):
            host.swap(edgekit.load(bundles[(number + 1) % 2], threads=1))
        seconds = time.perf_counter() - began
        ended.set()
        for thread in threads:
            thread.join()
    host.close()
    return [
        Row(f"failed of {done} requests during {count} swaps", failed, f"in {seconds:.0f} s", goal="value <= 0"),
        Row("answers that another model computed", wrong, "", goal="value <= 0"),
    ]


def _write_model(folder: Path, seed: int = 0) -> None:
    """Write ``model.onnx`` and a bundle of it, whose weights are always the same for a seed."""
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(exist_ok=True)
    chance = np.random.default_rng(seed)
    nodes, weights, last = [], [], "x"
    for i, (a, b) in enumerate(itertools.pairwise(SIZES)):
        weights.append(numpy_helper.from_array(chance.normal(0, a**-0.5, (a, b)).astype(np.float32), f"w{i}"))
        weights.append(numpy_helper.from_array(np.zeros(b, np.float32), f"b{i}"))
        ends = ("y",) if i == len(SIZES) - 2 else (f"h{i}", f"r{i}")
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [ends[0]]))
        if len(ends) == 2:
            nodes.append(helper.make_node("Relu", [ends[0]], [ends[1]]))
        last = ends[-1]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIZES[0]])
    told = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", SIZES[-1]])
    graph = helper.make_graph(nodes, "mlp", [given], [told], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    np.savez(folder / "data.npz", **{"calibration.x": chance.normal(size=(32, SIZES[0])).astype(np.float32)})
    edgekit = [sys.executable, "-m", "edgekit"]
    into = ["--data", str(folder / "data.npz"), "--format", "onnx", "--name", "mlp", "-o", str(folder / "b")]
    subprocess.run([*edgekit, "export", str(folder / "model.onnx"), *into], check=True, capture_output=True)


def _message(path: str, body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    told = {"Host": "127.0.0.1", "Content-Type": kind, "Content-Length": str(len(body)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in told.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _values() -> list[float]:
    return [round(float(value), 4) for value in np.random.default_rng(1).normal(size=SIZES[0])]


def _oip(name: str) -> dict[str, bytes]:
    """Return a request of the Open Inference Protocol with the tensor as JSON."""
    tensor = {"name": "x", "shape": [1, SIZES[0]], "datatype": "FP32", "data": _values()}
    return {"JSON": _message(f"/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode())}


def _oip_binary(name: str) -> dict[str, bytes]:
    data = np.array(_values(), np.float32).tobytes()
    tensor = {"name": "x", "shape": [1, SIZES[0]], "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    return {"binary": _message(f"/v2/models/{name}/infer", head + data, "application/octet-stream", **length)}


@contextlib.contextmanager
def _edgekit(folder: Path) -> Iterator[Server]:
    port = _free_port()
    command = [sys.executable, "-m", "edgekit", "serve", str(folder / "b"), "--port", str(port), "--threads", "1"]
    with _started("edgekit", command, port, {**_oip("mlp"), **_oip_binary("mlp")}) as server:
        yield server


LITSERVE = """
import litserve as ls, numpy as np, onnxruntime as ort
class Api(ls.LitAPI):
    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession({model!r}, options, providers=["CPUExecutionProvider"])
    def decode_request(self, request): return np.asarray(request["x"], np.float32)[None]
    def predict(self, x): return self.session.run(None, {{"x": x}})[0]
    def encode_response(self, y): return {{"y": y.tolist()}}
if __name__ == "__main__":
    server = ls.LitServer(Api(), accelerator="cpu", workers_per_device=1)
    server.run(port={port}, host="127.0.0.1", generate_client_file=False, log_level="error")
"""
MLSERVER = """
import numpy as np, onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Mlp(MLModel):
    async def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession({model!r}, options, providers=["CPUExecutionProvider"])
        return True
    async def predict(self, payload):
        x = self.decode(payload.inputs[0], default_codec=NumpyCodec).astype(np.float32)
        y = self.session.run(None, {{"x": x}})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
"""
BENTOML = """
import bentoml, numpy as np, onnxruntime as ort
@bentoml.service(workers=1)
class Mlp:
    def __init__(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession({model!r}, options, providers=["CPUExecutionProvider"])
    @bentoml.api
    def infer(self, x: list[float]) -> list[float]:
        return self.session.run(None, {{"x": np.asarray(x, np.float32)[None]}})[0][0].tolist()
"""


@contextlib.contextmanager
def _peer(name: str, python: str, folder: Path) -> Iterator[Server]:
    """Write a server as its own documentation has it, and start it."""
    port = _free_port()
    place = folder / name
    place.mkdir()
    told = {"model": str(folder / "model.onnx"), "port": port}
    if name == "LitServe":
        (place / "app.py").write_text(LITSERVE.format(**told))
        command, requests = [python, "app.py"], {"JSON": _message("/predict", json.dumps({"x": _values()}).encode())}
    elif name == "MLServer":
        (place / "runtime.py").write_text(MLSERVER.format(**told))
        settings = {"http_port": port, "grpc_port": _free_port(), "metrics_port": _free_port(), "host": "127.0.0.1",
                    "parallel_workers": 0, "debug": False}  # fmt: skip
        (place / "settings.json").write_text(json.dumps(settings))
        (place / "model-settings.json").write_text(json.dumps({"name": "mlp", "implementation": "runtime.Mlp"}))
        command, requests = [python, "-c", "from mlserver.cli import main; main()", "start", "."], _oip("mlp")
    else:
        (place / "service.py").write_text(BENTOML.format(**told))
        command = [python, "-m", "bentoml", "serve", "service:Mlp", "--host", "127.0.0.1", "--port", str(port)]
        requests = {"JSON": _message("/infer", json.dumps({"x": _values()}).encode())}
    with _started(name, command, port, requests, place) as server:
        yield server


@contextlib.contextmanager
def _started(
    name: str, command: list[str], port: int, requests: dict[str, bytes], place: Path = ROOT
) -> Iterator[Server]:
    began = time.perf_counter()
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "1", "PYTHONPATH": f"{ROOT}:{place}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    pinned = ["taskset", "-c", str(CORES[0]), *command]
    process = subprocess.Popen(pinned, cwd=place, env=environment, **quiet)
    server = Server(name, process, port, requests)
    try:
        _await(server, began)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def _await(server: Server, began: float) -> None:
    """Ask until an answer comes: that is when a server is ready."""
    while True:
        with contextlib.suppress(OSError, ValueError), _connected(server) as link:
            link.sendall(server.requests["JSON"])
            if _answer(link).startswith(b"HTTP/1.1 200"):
                server.ready_seconds = time.perf_counter() - began
                return
        if server.process.poll() is not None or time.perf_counter() - began > READY_SECONDS:
            raise SystemExit(f"{server.name} did not start: run its command by hand, as {server.process.args}")
        time.sleep(0.01)


def _connected(server: Server) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def _answer(link: socket.socket) -> bytes:
    """Read one response whole."""
    data = b""
    while True:
        piece = link.recv(65536)
        if not piece:
            raise ValueError("the server closed the connection")
        data += piece
        if (length := _length(data)) is not None and len(data) >= length:
            return data


def _length(data: bytes) -> int | None:
    """Return how long the response will be whose beginning was read; None where that is not told yet."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        return None
    at = head.lower().find(b"content-length:")
    if at < 0:  # in chunks
        return len(data) if data.endswith(b"0\r\n\r\n") else len(data) + 1
    return len(head) + 4 + int(head[at + 15 :].partition(b"\r\n")[0])


def _measure_idle(server: Server, seconds: float) -> None:
    """Note memory after load, and what five requests a second cost each."""
    server.note("RSS idle", _rss(server))
    before, count = _cpu(server), max(1, int(5 * seconds))
    with _connected(server) as link:
        for _ in range(count):
            link.sendall(server.requests["JSON"])
            _answer(link)
            time.sleep(0.2)
    server.note("CPU at 5 a second", 1000 * (_cpu(server) - before) / count)


def _measure(server: Server, seconds: float) -> None:
    for kind, request in server.requests.items():
        times, spent = _alone(server, request, seconds)
        server.note(f"p50 {kind}", 1e6 * statistics.median(times))
        server.note(f"p99 {kind}", 1e6 * statistics.quantiles(times, n=100)[98])
        server.note(f"CPU {kind}", 1e6 * spent / len(times))
        server.note(f"throughput {kind}", _together(server, request, 8, seconds))
    server.note("RSS peak", _rss(server, "VmHWM"))


def _alone(server: Server, request: bytes, seconds: float) -> tuple[list[float], float]:
    """Ask one after the other; return the seconds of each, and the processor's seconds of the server for all."""
    times = []
    with _connected(server) as link:
        for _ in range(200):
            link.sendall(request)
            _answer(link)
        before, until = _cpu(server), time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            link.sendall(request)
            _answer(link)
            times.append(time.perf_counter() - began)
    return times, _cpu(server) - before


def _together(server: Server, request: bytes, clients: int, seconds: float) -> float:
    """Keep so many connections asking, each as soon as it has its answer; return the answers a second."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as waiting:
        for _ in range(clients):
            link = stack.enter_context(_connected(server))
            waiting.register(link, selectors.EVENT_READ, bytearray())
            link.sendall(request)
        done, began = 0, time.perf_counter()
        until = began + seconds
        while time.perf_counter() < until:
            for key, _ in waiting.select(1):
                key.data.extend(key.fileobj.recv(65536))
                if (length := _length(bytes(key.data))) is not None and len(key.data) >= length:
                    key.data.clear()
                    done += 1
                    key.fileobj.sendall(request)
        return done / (time.perf_counter() - began)


def _family(server: Server) -> list[int]:
    """Return the server's processes: some start workers, and theirs start more."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [server.process.pid]
    for process in found:
        found += children.get(process, [])
    return found


def _cpu(server: Server) -> float:
    total = 0
    for process in _family(server):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICK


def _rss(server: Server, name: str = "VmRSS") -> float:
    total = 0
    for process in _family(server):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith(name)).split()[1])
    return total / 1024


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _bare(seconds: float) -> float:
    """Return the microseconds of the model alone, in this process."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        _write_model(Path(scratch))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(f"{scratch}/model.onnx", options, providers=["CPUExecutionProvider"])
    given = {"x": np.array([_values()], np.float32)}
    times, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        session.run(None, given)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


GOALS = {
    "p50 JSON": ("us", "value <= 145"),
    "p50 binary": ("us", "value <= 120"),
    "p99 JSON": ("us", "value <= 400"),
    "p99 binary": ("us", "value <= 400"),
    "CPU JSON": ("us a request", "value <= 130"),
    "CPU binary": ("us a request", ""),
    "throughput JSON": ("a second, 8 clients", "value >= 7500"),
    "throughput binary": ("a second, 8 clients", "value >= 13000"),
    "RSS idle": ("MiB", "value <= 75"),
    "RSS peak": ("MiB", ""),
    "CPU at 5 a second": ("ms a request", "value <= 3"),
}


def _rows(servers: list[Server]) -> list[Row]:
    ours, *peers = servers
    rows = [Row("the model alone", _bare(1.0), "us")]
    for what, (unit, goal) in GOALS.items():
        compare: Callable[[list[float]], float] = max if what.startswith("throughput") else min
        known = {peer.median(what): peer.name for peer in peers if peer.median(what) is not None}
        best = compare([value for value in known if value is not None]) if known else None
        rows.append(Row(what, ours.median(what), unit, known.get(best, ""), best, goal))
    fastest = min(peers, key=lambda peer: peer.ready_seconds, default=None)
    told = (fastest.name, fastest.ready_seconds) if fastest else ("", None)
    rows.append(Row("start to the first answer", ours.ready_seconds, "s", *told, "value <= 0.8"))
    rows += [
        Row(f"{peer.name}, {what}", peer.median(what), GOALS[what][0])
        for peer in peers
        for what in ("p50 JSON", "RSS idle")
    ]
    return rows


if __name__ == "__main__":
    run("A small perceptron over HTTP", main)
