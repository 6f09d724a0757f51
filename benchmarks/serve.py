"""The server's latency, throughput, CPU and memory for a small perceptron, beside LitServe, MLServer and BentoML.

Every server runs in a process of its own with one engine thread; the client, the same for all, sends prepared bytes
over kept connections from the last core. Each is measured twice: on the first core, which it has for itself, but where
each request has to wake it from another core, which takes long on a virtual machine; and, with a single client, on that
client's core, where waking costs next to nothing and what is left is the server's own work. The goals for latency and
processor are asked in both places. Servers take turns, several rounds each, while the others are stopped, and medians
count.

Peers run in environments of their own, whose interpreters ``EDGEKIT_LITSERVE``, ``EDGEKIT_MLSERVER`` and
``EDGEKIT_BENTOML`` name; each serves the same ONNX file through ONNX Runtime with its own defaults but for one worker,
and once more, as edgekit with two threads, for two.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
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
    rounds, seconds = (1, 0.5) if quick else (5, 2.0)
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
        echo = running.enter_context(_echo(folder))
        for server in servers:
            with _others_held([*servers, echo], server):
                _measure_idle(server, 0.5 if quick else 5.0)
        for place, server in itertools.product(list(PLACES) * rounds, [*servers, echo]):
            with _others_held([*servers, echo], server):
                _put(server, PLACES[place])
                _measure(server, seconds, place=place)
        alone = _bare(1.0, folder / "model.onnx", np.array([_values()], np.float32))
        rows = [*_of_the_machine(alone, echo), *_rows(servers), *_sizes(servers)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_model(folder)
        rows += _two_workers(folder / "two", min(rounds, 3), seconds)
        rows += [*_picture(folder / "picture", rounds, seconds / 2), *_batches(folder / "wide", rounds, seconds / 2)]
        return [*rows, *_swaps(folder, 50 if quick else 1000), *absent, *_elsewhere()]


def _two_workers(folder: Path, rounds: int, seconds: float) -> list[Row]:
    """Measure all with two workers, edgekit with two threads of the engine, on two cores; one is the client's too."""
    with contextlib.ExitStack() as running:
        folder.mkdir()
        _write_model(folder)
        servers = [running.enter_context(_edgekit(folder, threads=2))]
        rows = []
        for name, variable in PEERS.items():
            if python := os.environ.get(variable, ""):
                try:
                    servers.append(running.enter_context(_peer(name, python, folder, workers=2)))
                except SystemExit as error:  # MLServer's processes want uvloop below 0.22
                    rows.append(Row(f"two workers: {name}", None, str(error)))
        for _ in range(rounds):
            for server in servers:
                with _others_held(servers, server):
                    _measure(server, seconds, ("JSON",))
        ours, *peers = servers
        for what in ("p50 JSON", "throughput JSON", "RSS peak"):
            known = {peer.median(what): peer.name for peer in peers}
            best = (max if what.startswith("throughput") else min)(known, default=None)
            row = Row(f"two workers: {what}", ours.median(what), GOALS[what][0], known.get(best, ""), best)
            rows.append(row)
        return rows


def _elsewhere() -> list[Row]:
    why = "not installed: it comes as a container image, not as a package"
    return [Row("Triton", None, why), Row("OpenVINO Model Server", None, why)]


def _picture(folder: Path, rounds: int, seconds: float) -> list[Row]:
    """Measure what HTTP adds to a network that takes 224 x 224 pixels as 32-bit floats, 0.6 MB a request."""
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    shape = (3, 224, 224)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])
    told = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    weight = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    graph = helper.make_graph(nodes, "picture", [given], [told], [numpy_helper.from_array(weight, "w")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    pixels = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    _export(folder, "picture", {"x": np.repeat(pixels, 4, 0)})
    bare, asked = [], []
    with _edgekit(folder, _oip_binary("picture", pixels)) as server:
        for _ in range(rounds):
            bare.append(_bare(seconds, folder / "model.onnx", pixels))
            asked.append(1e6 * statistics.median(_alone(server, server.requests["binary"], seconds)[0]))
    over = statistics.median(asked) - statistics.median(bare)
    what = f"224 x 224 floats as bytes, over the model alone ({statistics.median(bare):.0f} us)"
    return [Row(what, over / 1000, "ms", goal="value <= 1.5")]


def _batches(folder: Path, rounds: int, seconds: float) -> list[Row]:
    """Measure what batches are worth for a model that gains by them: one matrix of 64 MiB, read once for all."""
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir()
    width = 4096
    weight = np.random.default_rng(0).normal(0, width**-0.5, (width, width)).astype(np.float32)
    given, told = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", width]) for n in ("x", "y"))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "wide", [given], [told], [numpy_helper.from_array(weight, "w")]
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    values = np.random.default_rng(1).normal(size=(1, width)).astype(np.float32)
    _export(folder, "wide", {"x": np.repeat(values, 4, 0)})
    requests = _oip_binary("wide", values)
    lone: dict[str, list[float]] = {"alone": [], "batched": []}
    many: dict[str, list[float]] = {"alone": [], "batched": []}
    with _edgekit(folder, requests) as alone, _edgekit(folder, requests, "--batch", "16") as batched:
        for _ in range(rounds):
            for name, server in (("alone", alone), ("batched", batched)):
                lone[name].append(1e6 * statistics.median(_alone(server, server.requests["binary"], seconds)[0]))
                many[name].append(_together(server, server.requests["binary"], 16, seconds))
    told_many = {name: statistics.median(values) for name, values in many.items()}
    told_lone = {name: statistics.median(values) for name, values in lone.items()}
    return [
        Row("16 clients, 64 MiB in one matrix, --batch 16", told_many["batched"], "a second", "without",
            told_many["alone"], "ratio >= 2"),
        Row("one client of the same, p50", told_lone["batched"], "us", "without", told_lone["alone"],
            "ratio <= 1.1"),
    ]  # fmt: skip


INSTALLED = r"""
import importlib.metadata as m, re, sys
seen, todo = {}, [sys.argv[1]]
while todo:
    text = todo.pop()
    name, extras = re.match(r"([A-Za-z0-9._-]+)(?:\[(.*?)\])?", text).groups()
    key = re.sub(r"[-_.]+", "-", name).lower()
    extras = set(filter(None, (extras or "").replace(" ", "").split(",")))
    if key in seen and extras <= seen[key][1]:
        continue
    try:
        found = m.distribution(name)
    except m.PackageNotFoundError:
        continue
    size = sum(f.locate().stat().st_size for f in found.files or () if f.locate().is_file())
    seen[key] = (size, extras)
    for need in found.requires or ():
        if "extra ==" not in need or any(f'extra == "{e}"' in need.replace("'", '"') for e in extras):
            todo.append(need.split(";")[0])
print(sum(size for size, _ in seen.values()) / 2**20)
"""


def _sizes(servers: list[Server]) -> list[Row]:
    """Tell how much each server and what it needs take on the disk, the engine included."""
    packages = {"edgekit": "edgekit[device,onnx]", "LitServe": "litserve", "MLServer": "mlserver", "BentoML": "bentoml"}
    found = {}
    for server in servers:
        python = os.environ.get(PEERS.get(server.name, ""), sys.executable)
        sizes = [
            float(subprocess.run([python, "-c", INSTALLED, one], check=True, capture_output=True, text=True).stdout)
            for one in ({packages[server.name], "onnxruntime"} if server.name != "edgekit" else {packages["edgekit"]})
        ]
        found[server.name] = sum(sizes)
    source = sum(path.stat().st_size for path in (ROOT / "edgekit").rglob("*.py")) / 2**20  # no copy, where editable
    ours, peers = found.pop("edgekit") + source, sorted(found.items(), key=lambda pair: pair[1])
    least = peers[0] if peers else ("", None)
    return [Row("installed, ONNX Runtime included", ours, "MiB", *least)]


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
    _export(folder, "mlp", {"x": chance.normal(size=(32, SIZES[0])).astype(np.float32)})


def _export(folder: Path, name: str, calibration: dict[str, np.ndarray]) -> None:
    """Make the bundle ``b`` of the ``model.onnx`` in a folder."""
    np.savez(folder / "data.npz", **{f"calibration.{key}": array for key, array in calibration.items()})
    edgekit = [sys.executable, "-m", "edgekit"]
    into = ["--data", str(folder / "data.npz"), "--format", "onnx", "--name", name, "-o", str(folder / "b")]
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


def _oip_binary(name: str, array: np.ndarray | None = None) -> dict[str, bytes]:
    array = np.array([_values()], np.float32) if array is None else array
    data = array.tobytes()
    told = {"parameters": {"binary_data_size": len(data)}}
    tensor = {"name": "x", "shape": array.shape, "datatype": "FP32", **told}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    return {"binary": _message(f"/v2/models/{name}/infer", head + data, "application/octet-stream", **length)}


@contextlib.contextmanager
def _edgekit(folder: Path, requests: dict[str, bytes] | None = None, *flags: str, threads: int = 1) -> Iterator[Server]:
    port = _free_port()
    command = [sys.executable, "-m", "edgekit", "serve", str(folder / "b"), "--port", str(port)]
    requests = requests or {**_oip("mlp"), **_oip_binary("mlp")}
    command += ["--threads", str(threads), *flags]
    with _started("edgekit", _pinned(command, threads), port, requests) as server:
        yield server


def _pinned(command: list[str], workers: int = 1) -> list[str]:
    """Return a command that runs on so many cores, the first of them not the client's."""
    return ["taskset", "-c", ",".join(map(str, CORES[:workers])), *command]


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
    server = ls.LitServer(Api(), accelerator="cpu", workers_per_device={workers})
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
@bentoml.service(workers={workers})
class Mlp:
    def __init__(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession({model!r}, options, providers=["CPUExecutionProvider"])
    @bentoml.api
    def infer(self, x: list[float]) -> list[float]:
        return self.session.run(None, {{"x": np.asarray(x, np.float32)[None]}})[0][0].tolist()
"""


ECHO = """
import asyncio
class Answering(asyncio.Protocol):
    def connection_made(self, transport): self.transport = transport
    def data_received(self, data): self.transport.write({answer!r})
async def main():
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", {port})
    await server.serve_forever()
asyncio.run(main())
"""


@contextlib.contextmanager
def _echo(folder: Path) -> Iterator[Server]:
    """Answer the same requests with as many bytes, always the same ones, without a look at what came."""
    port = _free_port()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n" + b" " * 300
    command = [sys.executable, "-c", ECHO.format(answer=answer, port=port)]
    with _started("echo", _pinned(command), port, _oip("mlp"), folder) as server:
        yield server


@contextlib.contextmanager
def _peer(name: str, python: str, folder: Path, workers: int = 1) -> Iterator[Server]:
    """Write a server as its own documentation has it, and start it."""
    port = _free_port()
    place = folder / name
    place.mkdir()
    told = {"model": str(folder / "model.onnx"), "port": port, "workers": workers}
    if name == "LitServe":
        (place / "app.py").write_text(LITSERVE.format(**told))
        command, requests = [python, "app.py"], {"JSON": _message("/predict", json.dumps({"x": _values()}).encode())}
    elif name == "MLServer":
        (place / "runtime.py").write_text(MLSERVER.format(**told))
        settings = {"http_port": port, "grpc_port": _free_port(), "metrics_port": _free_port(), "host": "127.0.0.1",
                    "parallel_workers": 0 if workers == 1 else workers, "debug": False}  # fmt: skip
        (place / "settings.json").write_text(json.dumps(settings))
        described = {"name": "x", "shape": [-1, SIZES[0]], "datatype": "FP32"}
        (place / "model-settings.json").write_text(
            json.dumps({"name": "mlp", "implementation": "runtime.Mlp", "inputs": [described]})
        )
        command, requests = [python, "-c", "from mlserver.cli import main; main()", "start", "."], _oip("mlp")
    else:
        (place / "service.py").write_text(BENTOML.format(**told))
        command = [python, "-m", "bentoml", "serve", "service:Mlp", "--host", "127.0.0.1", "--port", str(port)]
        requests = {"JSON": _message("/infer", json.dumps({"x": _values()}).encode())}
    with _started(name, _pinned(command, workers), port, requests, place) as server:
        yield server


@contextlib.contextmanager
def _started(
    name: str, command: list[str], port: int, requests: dict[str, bytes], place: Path = ROOT
) -> Iterator[Server]:
    began = time.perf_counter()
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "1", "PYTHONPATH": f"{ROOT}:{place}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, cwd=place, env=environment, **quiet)
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
            link.sendall(next(iter(server.requests.values())))
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


@contextlib.contextmanager
def _others_held(servers: list[Server], one: Server) -> Iterator[None]:
    """Stop all other servers meanwhile: some have threads that wake by themselves, on the same core."""
    others = [server.process.pid for server in servers if server is not one and server.process]
    for group in others:
        os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        for group in others:
            os.killpg(group, signal.SIGCONT)


def _put(server: Server, cores: list[int]) -> None:
    """Let all threads of a server run on these cores from now on."""
    for process in _family(server):
        for task in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)


def _measure(server: Server, seconds: float, kinds: tuple[str, ...] = ("JSON", "binary"), place: str = "") -> None:
    for kind in kinds:
        if kind not in server.requests:
            continue
        times, spent = _alone(server, server.requests[kind], seconds)
        server.note(f"p50 {kind}{place}", 1e6 * statistics.median(times))
        server.note(f"p99 {kind}{place}", 1e6 * statistics.quantiles(times, n=100)[98])
        server.note(f"CPU {kind}{place}", 1e6 * spent / len(times))
        if server.name != "echo" and not place:  # the echo answers twice what comes in two pieces
            server.note(f"throughput {kind}", _together(server, server.requests[kind], 8, seconds))
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


def _bare(seconds: float, model: Path, array: np.ndarray) -> float:
    """Return the microseconds of the model alone, in this process."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    given = {"x": array}
    times, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        session.run(None, given)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


PLACES = {"": CORES[:1], ", on the client's core": CORES[-1:]}
IN_EACH_PLACE = {
    "p50 JSON": ("us", "value <= 145"),
    "p50 binary": ("us", "value <= 120"),
    "p99 JSON": ("us", "value <= 400"),
    "p99 binary": ("us", "value <= 400"),
    "CPU JSON": ("us a request", "value <= 130"),
    "CPU binary": ("us a request", ""),
}
GOALS = {
    **{f"{what}{place}": goal for place in PLACES for what, goal in IN_EACH_PLACE.items()},
    "throughput JSON": ("a second, 8 clients", "value >= 7500"),
    "throughput binary": ("a second, 8 clients", "value >= 13000"),
    "RSS idle": ("MiB", "value <= 75"),
    "RSS peak": ("MiB", ""),
    "CPU at 5 a second": ("ms a request", "value <= 3"),
}


def _of_the_machine(alone: float, echo: Server) -> list[Row]:
    """Tell what nothing that answers over HTTP with this model from Python's event loop can go below here."""
    named = [
        (f"{what} JSON{place}", unit) for place in PLACES for what, unit in (("p50", "us"), ("CPU", "us a request"))
    ]
    rows = [Row(f"the same bytes, answered unread: {what}", echo.median(what), unit) for what, unit in named]
    return [Row("the model alone", alone, "us"), *rows]


def _rows(servers: list[Server]) -> list[Row]:
    ours, *peers = servers
    rows = []
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
