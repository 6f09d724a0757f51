"""What gRPC costs beside HTTP: latency, CPU and memory for a small perceptron, with the port and without.

The servers run alone on one core, with one engine thread; clients ask from another, over a kept connection, with bytes
that were prepared: a socket for HTTP, grpcio's channel for gRPC. Servers take turns; medians count.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
from _report import Row, run
from serve import (
    CORES,
    SIZES,
    Server,
    _alone,
    _cpu,
    _free_port,
    _oip,
    _oip_binary,
    _pinned,
    _rss,
    _started,
    _values,
    _write_model,
)

from edgekit.runtime.server import oip_messages as messages
from edgekit.runtime.server.protobuf import encode

if TYPE_CHECKING:
    from collections.abc import Callable

Timed = tuple[list[float], float]


def main(quick: bool) -> list[Row]:
    rounds, seconds = (1, 0.5) if quick else (5, 3.0)
    os.sched_setaffinity(0, {CORES[-1]})
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        folder = Path(scratch)
        _write_model(folder)
        requests = {**_oip("mlp"), **_oip_binary("mlp")}
        port, ours = _free_port(), [sys.executable, "-m", "edgekit", "serve", str(folder / "b"), "--threads", "1"]
        off, on = (
            running.enter_context(_started(name, _pinned([*ours, *flags, "--port", str(at)]), at, requests))
            for name, flags, at in (("off", [], _free_port()), ("on", ["--grpc-port", str(port)], _free_port()))
        )
        memory = {"RSS": _rss, "private memory": _private}
        idle = {name: (of(off), of(on)) for name, of in memory.items()}
        call = _channel(running, port)
        for _ in range(rounds):
            _note(off, "HTTP", _alone(off, requests["binary"], seconds))
            _note(on, "gRPC", _called(on, call, seconds))
        rows = [
            Row("gRPC, p50", on.median("gRPC p50"), "us", "HTTP, binary tensors", off.median("HTTP p50")),
            Row("gRPC, p99", on.median("gRPC p99"), "us", "HTTP, binary tensors", off.median("HTTP p99")),
            Row("gRPC, CPU a request", on.median("gRPC CPU"), "us", "HTTP, binary tensors", off.median("HTTP CPU")),
        ]
        rows += [Row(f"{name} with the port", on_, "MiB", "without", off_) for name, (off_, on_) in idle.items()]
        more = idle["RSS"][1] - idle["RSS"][0]
        return [*rows, Row("more RSS with the port", more, "MiB", goal="value <= 20")]


def _channel(running: ExitStack, port: int) -> Callable[[], bytes]:
    tensor = messages.Tensor(name="x", datatype="FP32", shape=(1, SIZES[0]))
    raw = np.array(_values(), np.float32).tobytes()
    data = encode(messages.InferRequest(model_name="mlp", inputs=(tensor,), raw_input_contents=(raw,)))
    channel = running.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
    call = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer")
    return lambda: call(data, timeout=60)


def _called(server: Server, call: Callable[[], bytes], seconds: float) -> Timed:
    for _ in range(200):
        call()
    times, before, until = [], _cpu(server), time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        call()
        times.append(time.perf_counter() - began)
    return times, _cpu(server) - before


def _note(server: Server, kind: str, timed: Timed) -> None:
    times, spent = timed
    server.note(f"{kind} p50", 1e6 * statistics.median(times))
    server.note(f"{kind} p99", 1e6 * statistics.quantiles(times, n=100)[98])
    server.note(f"{kind} CPU", 1e6 * spent / len(times))


def _private(server: Server) -> float:
    """Return the MiB that the server shares with nobody."""
    lines = Path(f"/proc/{server.process.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


if __name__ == "__main__":
    run("gRPC beside HTTP", main)
