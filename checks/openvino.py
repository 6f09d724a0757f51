"""Runs ONNX Runtime with OpenVINO as its execution provider, and says whether edgekit takes it and leaves it rightly.

    python -m venv apart && apart/bin/pip install numpy msgspec click onnxruntime-openvino   (it replaces onnxruntime)
    PYTHONPATH=. apart/bin/python checks/openvino.py [MODEL.onnx]

A small network of matrices, or MODEL, is opened by edgekit's own backend: by the usual order, by a class that names the
provider, on the processor alone, and on a device of OpenVINO that is not here. Asked are: which provider serves, if
it answers as the processor does, to several threads at once too, and the time of one run. Exit code 0 where all of it
holds or where the package is missing, which it says, 1 where something does not hold.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime

from edgekit.device_profiles import RuntimeSettings
from edgekit.runtime.backends import EngineOptions, onnx

PROVIDER = onnx.PROVIDERS["openvino"]
LEAST_DB = {True: 20.0, False: 60.0}
"""Where the file computes in integers, and where not: each engine rounds between layers by itself."""
RUNS = 30
# y = x @ w + b of [n, 3] and [3, 4]: the package onnx, which could write it, is not needed to run one
MATRIX = bytes.fromhex(
    "08093a9e010a120a01780a01770a0162120179220447656d6d120467656d6d2a3b0803080410014201774a300000a0c0000080c0"
    "000040c0000000c0000080bf000000000000803f0000004000004040000080400000a0400000c0402a19080410014201624a1000"
    "0000000000000000000000000000005a140a0178120f0a0d080112090a0312016e0a02080362140a0179120f0a0d080112090a03"
    "12016e0a02080442040a001011"
)


def opened(main: Path, *providers: str, usual: bool = False) -> onnx.OnnxEngine:
    runtime = RuntimeSettings(providers=None if usual else providers)
    return onnx.PLUGIN.open(main, EngineOptions(threads=1, runtime=runtime))


def noise(engine: onnx.OnnxEngine, seed: int) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    zeros = engine.zeros() or {}
    return {name: chance.standard_normal(array.shape).astype(array.dtype) for name, array in zeros.items()}


def decibels(engine: onnx.OnnxEngine, reference: onnx.OnnxEngine, seed: int) -> float:
    inputs = noise(reference, seed)
    worst = 200.0
    for name, wanted in reference.run(inputs).items():
        error = np.linalg.norm(engine.run(inputs)[name] - wanted)
        worst = min(worst, 20 * np.log10(np.linalg.norm(wanted) / error)) if error else worst
    return float(worst)


def of_many_threads(engine: onnx.OnnxEngine, reference: onnx.OnnxEngine) -> float:
    found: list[float] = []

    def ask(seed: int) -> None:
        found.extend(decibels(engine, reference, seed + 10 * turn) for turn in range(10))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(found) if len(found) == 40 else -1.0


def milliseconds(engine: onnx.OnnxEngine) -> float:
    inputs, times = noise(engine, 0), []
    for _ in range(RUNS):
        began = time.perf_counter()
        engine.run(inputs)
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))


def main() -> int:
    if PROVIDER not in onnxruntime.get_available_providers():
        print(f"skipped: onnxruntime {onnxruntime.__version__} has no {PROVIDER}: it takes onnxruntime-openvino")
        return 0
    if len(sys.argv) > 1:
        return _judge(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "matrix.onnx").write_bytes(MATRIX)
        return _judge(Path(folder) / "matrix.onnx")


def _judge(path: Path) -> int:
    processor = opened(path)
    usual, named = opened(path, usual=True), opened(path, "openvino")
    alone, together = decibels(usual, processor, 1), of_many_threads(named, processor)
    onnx.OPENVINO["device_type"] = "GPU.7"
    left = opened(path, "openvino")
    least = LEAST_DB[b"QuantizeLinear" in path.read_bytes()]
    rows = [
        ("the usual order takes it", usual.provider == PROVIDER, usual.engine),
        ("a class that names it takes it", named.provider == PROVIDER, named.engine),
        ("an empty list is the processor", processor.provider == onnx.CPU, processor.engine),
        ("it answers as the processor does", alone >= least, f"{alone:.0f} dB"),
        ("to four threads at once as well", together >= least, f"{together:.0f} dB"),
        ("a device that is not here is left", left.provider == onnx.CPU and "openvino: " in left.engine, left.engine),
        ("the processor answers then", decibels(left, processor, 2) >= least, ""),
    ]
    for what, holds, told in rows:
        print(f"{'yes' if holds else 'NO '}  {what}  {told}")
    print(f"one run, one thread: {milliseconds(named):.3g} ms, on the processor {milliseconds(processor):.3g} ms")
    return 0 if all(holds for _, holds, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
