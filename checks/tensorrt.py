"""Builds and runs TensorRT engines on this machine's GPU by edgekit's own way, and says whether they answer right.

    pip install -e '.[device,export,tensorrt]'        (on a Jetson: an environment with --system-site-packages)
    python checks/tensorrt.py

A small convolutional network, in float and as int8, is exported for the Jetson class, served by ONNX Runtime, and
swapped to the engine that was built meanwhile. Asked are: the golden inputs, a request larger than the engine's batch,
a second start, which must find the engine in the cache, and the time of one picture. Exit code 0 where all of it holds,
1 where something does not, 11 where there is no GPU or no TensorRT.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekit import bundle, device_profiles, load, workload
from edgekit.cli._terminal import markdown_table
from edgekit.compress.passes.quantize import Quantize
from edgekit.errors import HealthError
from edgekit.export import export
from edgekit.model import Data, Model, Split
from edgekit.progress import silent
from edgekit.runtime import tensorrt_tools

BUILD_SECONDS = 1800
RUNS = 200
LEAST_DB = {"fp32": 40.0, "int8": 20.0}
"""Between the engine and ONNX Runtime: TensorRT may compute floats as TF32, and rounds integers by itself."""


def network() -> nn.Module:
    """Make a residual network of some layers, with seeded weights."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.way = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.relu(x + self.way(x))

    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    ).eval()


def main() -> int:
    try:
        tools = tensorrt_tools.find()
    except HealthError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    print(f"{tools.gpu.name}, {tools.gpu.driver}, {tools.builder}\n")
    images = np.random.default_rng(0).normal(size=(32, 3, 64, 64)).astype(np.float32)
    model = workload.from_module("check", network(), Data(Split({"image": images})))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for precision, one in (("fp32", model), ("int8", Quantize().apply(model, silent))):
            rows += checked(precision, one, images, Path(scratch))
    print(markdown_table(("precision", "what", "found", "wanted", "holds"), rows))
    return 0 if all(row[-1] == "yes" for row in rows) else 1


def checked(precision: str, model: Model, images: np.ndarray, scratch: Path) -> list[tuple[str, ...]]:
    """Export, serve, swap, compare, start again."""
    profile = device_profiles.load("jetson-orin-nano")
    folder, engines = scratch / precision, scratch / f"{precision}-engines"
    result = export(model, [profile], folder)
    if result.first_error:
        return [(precision, "export", result.first_error.message, "", "no")]
    name = bundle.read(folder).manifest.variants[0].name
    with load(folder, variant=name) as plain:
        wanted = plain.run({"image": images})["scores"]
    rows = []
    for start in ("built", "from the cache"):
        began = time.monotonic()
        with load(folder, variant=name, engines=engines) as session:
            while "getting ready" in session.engine and time.monotonic() - began < BUILD_SECONDS:
                time.sleep(0.05)
            seconds = time.monotonic() - began
            engine = session.engine
            found = session.run({"image": images})["scores"]  # twice the engine's batch
            took = []
            for _ in range(RUNS):
                before = time.perf_counter()
                session.run({"image": images[:1]})
                took.append(1e3 * (time.perf_counter() - before))
        noise = float(np.mean((found - wanted) ** 2))
        decibels = 200.0 if not noise else 10 * np.log10(float(np.mean(wanted**2)) / noise)
        serves = engine.startswith("tensorrt")
        rows += [
            (precision, f"engine, {start}, {seconds:.1f} s", engine, "tensorrt …", yes(serves)),
            (precision, "SQNR to ONNX Runtime, dB", f"{decibels:.1f}", f">= {LEAST_DB[precision]:g}",
             yes(decibels >= LEAST_DB[precision])),
            (precision, "one picture, median ms", f"{np.median(took):.3f}", "", "yes"),
        ]  # fmt: skip
    return rows


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


if __name__ == "__main__":
    sys.exit(main())
