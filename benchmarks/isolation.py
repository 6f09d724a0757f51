"""What an engine in a process of its own costs: latency of small and large inputs, over HTTP, memory, and its restart.

Both ways take turns in one process; memory is measured in fresh ones. Peer is the engine in the server's own process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _report import Row, run
from serve import CORES, _alone, _await, _cpu, _free_port, _oip, _oip_binary, _pinned, _started, _write_model

import edgekit
from edgekit import bundle
from edgekit.errors import EngineCrashed
from edgekit.manifest import Manifest, Parity, Variant
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from serve import Server

    from edgekit.runtime import Session
    from edgekit.tensors import Array

PICTURE = (224, 224, 3)
HERE = "in process"
MEMORY = """
import sys, edgekit, numpy as np
from pathlib import Path
session = edgekit.load(sys.argv[1], threads=1, isolated=sys.argv[2] == "True")
session.run({"x": np.zeros((1, 64), np.float32)})
condition = session.condition()
for field in ("Rss", "Pss"):
    total = 0
    for process in ("self", *([condition.pid] if condition else [])):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += int(next(line for line in lines if line.startswith(field + ":")).split()[1])
    print(total / 1024)
"""


def main(quick: bool) -> list[Row]:
    rounds = 3 if quick else 15
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_model(folder)
        _write_pictures(folder / "pictures")
        return [
            *_latency(folder / "b", np.zeros((1, 64), np.float32), "perceptron", rounds),
            *_latency(folder / "pictures", np.zeros((1, *PICTURE), np.float32), "224x224x3 float picture", rounds),
            *_http(folder, 0.5 if quick else 3.0),
            *_memory(folder / "b"),
            _restart(folder / "b", rounds),
        ]


def _latency(path: Path, given: Array, what: str, rounds: int) -> list[Row]:
    with edgekit.load(path, threads=1) as here, edgekit.load(path, threads=1, isolated=True) as apart:
        times: dict[Session, list[float]] = {here: [], apart: []}
        for _ in range(rounds):
            for session, found in times.items():
                found.extend(_times(session, given, 0.2))
    rows = []
    for name, rank in (("p50", 0.5), ("p99", 0.99)):
        ours, theirs = (1e6 * sorted(found)[int(rank * len(found))] for found in (times[apart], times[here]))
        rows.append(Row(f"{name} of session.run, {what}", ours, "us", HERE, theirs))
    return rows


def _times(session: Session, given: Array, seconds: float) -> list[float]:
    times, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        session.run({"x": given})
        times.append(time.perf_counter() - began)
    return times


def _http(folder: Path, seconds: float) -> list[Row]:
    os.sched_setaffinity(0, {CORES[-1]})
    found: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        servers = {flag: stack.enter_context(_server(folder, flag)) for flag in ("--no-isolate", "--isolate")}
        for _ in range(3):
            for flag, server in servers.items():
                for kind, request in server.requests.items():
                    before = _cpu(server)
                    times, _ = _alone(server, request, seconds)
                    note = found.setdefault(kind, {}).setdefault(flag, [])
                    note.append(1e6 * statistics.median(times))
                    cpu = found.setdefault(f"CPU {kind}", {}).setdefault(flag, [])
                    cpu.append(1e6 * (_cpu(server) - before) / (len(times) + 200))
    os.sched_setaffinity(0, CORES)
    return [
        Row(
            f"{'' if kind.startswith('CPU') else 'p50 '}{kind} over HTTP, perceptron",
            statistics.median(by["--isolate"]),
            "us a request",
            HERE,
            statistics.median(by["--no-isolate"]),
        )
        for kind, by in found.items()
    ]


@contextlib.contextmanager
def _server(folder: Path, flag: str) -> contextlib.AbstractContextManager[Server]:
    port = _free_port()
    command = [sys.executable, "-m", "edgekit", "serve", str(folder / "b"), "--port", str(port), "--threads", "1", flag]
    with _started(flag, _pinned(command), port, {**_oip("mlp"), **_oip_binary("mlp")}) as server:
        _await(server, time.perf_counter())
        yield server


def _memory(path: Path) -> list[Row]:
    told = {}
    for isolated in (True, False):
        command = [sys.executable, "-c", MEMORY, str(path), str(isolated)]
        told[isolated] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    meanings = ("RSS of all processes", "PSS of all processes (shared pages once)")
    both = zip(meanings, told[True], told[False], strict=True)
    return [Row(what, float(ours), "MiB", HERE, float(theirs)) for what, ours, theirs in both]


def _restart(path: Path, rounds: int) -> Row:
    """Kill the process, and wait until a request is answered again."""
    from edgekit.runtime.isolation import crashes

    pause, crashes.FIRST_SECONDS, crashes.LONGEST_SECONDS = crashes.FIRST_SECONDS, 0.0, 0.0
    given, times = {"x": np.zeros((1, 64), np.float32)}, []
    with edgekit.load(path, threads=1, isolated=True) as session:
        for _ in range(rounds):
            os.kill(session.condition().pid, signal.SIGKILL)
            began = time.perf_counter()
            while True:
                with contextlib.suppress(EngineCrashed):
                    session.run(given)
                    break
                time.sleep(0.001)
            times.append(time.perf_counter() - began)
    return Row(
        f"from a crash to the next answer, without the pause of {pause:g} s", 1e3 * statistics.median(times), "ms"
    )


def _write_pictures(folder: Path) -> None:
    """Seal a model that gives the mean of each channel: all that it does is to read its input."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        "channels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *PICTURE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    main = "any/model.onnx"
    parity = Parity(status="unverified", reason="a benchmark's")
    variant = Variant(name="any", format="onnx", precision="fp32", main=main, files=(main,), parity=parity)
    specs = {
        "inputs": (TensorSpec("x", "float32", (-1, *PICTURE)),),
        "outputs": (TensorSpec("y", "float32", (-1, 3)),),
    }
    draft = Manifest(name="channels", version="1", task="tensor", variants=(variant,), files=(), **specs)
    bundle.seal(folder, draft, {main: made.SerializeToString()})


if __name__ == "__main__":
    run("An engine in a process of its own", main)
