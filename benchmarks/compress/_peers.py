"""Who else quantizes: ONNX Runtime, NNCF, torchao; and edgekit, each in a process of its own, timed alike.

A job names a float model, calibration arrays and the file to write. Its time runs from the start of the process to
the file on disk, imports and all; its memory is the process's high-water mark. What a peer writes as ONNX is judged by
the caller in ONNX Runtime; torchao's converted graph has no such file and scores the judged pictures itself, after
its clock was stopped. Knows no accuracy and no goal.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

    from edgekit.tensors import Array

BATCH = 16
MISSING = 3


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one contender has to do. ``calibration`` and ``judged`` are .npy files, samples on the first axis.

    ``samples`` lets a peer calibrate on the first so many; edgekit's recipe says so itself.
    """

    contender: str
    onnx: str
    workload: str
    checkpoint: str | None
    input: str
    calibration: str
    judged: str
    out: str
    samples: int | None = None
    options: dict[str, Any] = {}


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: seconds of wall and of CPU, the part of the wall that went into imports, and the peak."""

    seconds: float = 0
    cpu_seconds: float = 0
    import_seconds: float = 0
    peak_mib: float = 0
    bytes: int = 0
    layers: tuple[int, int] = (0, 0)
    """How many convolutions and matrix products take integers on both sides, and how many there are."""
    scores: str = ""
    error: str = ""


class Stopped(msgspec.Struct):
    """The clock of one process."""

    began: float
    imported: float = 0
    finished: float = 0
    cpu: float = 0
    layers: tuple[int, int] = (0, 0)


def run_apart(job: Job, timeout_s: float = 3600) -> Done:
    """Do a job in a process of its own on one thread; an error is a result, too."""
    command = [sys.executable, str(Path(__file__).resolve()), msgspec.json.encode(job).decode(), str(time.time())]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NNCF_EXTENSION_LOAD_TIMEOUT": "0",
        "NNCF_CI": "1",
        "TQDM_DISABLE": "1",
    }
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Done(error=f"not done in {timeout_s:.0f} s")
    lines = found.stdout.strip().splitlines()
    if found.returncode or not lines:
        said = (found.stderr.strip().splitlines() or ["no word"])[-1]
        return Done(error="not installed" if found.returncode == MISSING else said[:160])
    return msgspec.json.decode(lines[-1], type=Done)


def onnxruntime_static(job: Job, clock: Stopped) -> None:
    """Run `quantize_static` after the preparation that its manual asks for."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    clock.imported = time.time()
    options = dict(job.options)
    for key, kind in (
        ("activation_type", QuantType),
        ("weight_type", QuantType),
        ("calibrate_method", CalibrationMethod),
    ):
        if key in options:
            options[key] = kind[options[key]]
    prepared = Path(job.out).with_suffix(".prepared.onnx")
    quant_pre_process(job.onnx, str(prepared))
    quantize_static(str(prepared), job.out, _Reader(job), **options)
    prepared.unlink()


class _Reader:
    """What quantize_static reads its calibration from, each batch once."""

    def __init__(self, job: Job) -> None:
        self._feeds = iter([{job.input: batch} for batch in _batches(job)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Array]:
        return next(self._feeds)


def nncf_onnx(job: Job, clock: Stopped) -> None:
    """Run NNCF's post-training quantization on the ONNX file.

    By itself it takes the mean of the samples' extremes, one sample at a time as its manual asks; ``minmax`` makes it
    take the extremes of all, and leaves out the 7-bit weights of the first layer, which VNNI does without.
    """
    import logging

    import nncf
    import onnx
    from nncf.quantization import advanced_parameters, range_estimator

    clock.imported = time.time()
    nncf.set_log_level(logging.ERROR)
    options = dict(job.options)
    if "preset" in options:
        options["preset"] = nncf.QuantizationPreset[options["preset"]]
    if options.pop("minmax", False):
        options["advanced_parameters"] = advanced_parameters.AdvancedQuantizationParameters(
            overflow_fix=advanced_parameters.OverflowFix.DISABLE,
            activations_range_estimator_params=range_estimator.RangeEstimatorParametersSet.MINMAX,
            disable_bias_correction=options.pop("uncorrected", False),
        )
    feeds = [{job.input: sample} for sample in _batches(job, int(options.pop("batch", 1)))]
    onnx.save(nncf.quantize(onnx.load(job.onnx), nncf.Dataset(feeds), subset_size=len(feeds), **options), job.out)


def torchao_pt2e(job: Job, clock: Stopped) -> None:
    """Prepare, calibrate and convert with the x86 quantizer; save the graph, then score the judged pictures."""
    import numpy as np
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    from edgekit import workload
    from edgekit.model import Data, Split

    clock.imported = time.time()
    checkpoint, samples = Path(job.checkpoint) if job.checkpoint else None, np.load(job.calibration)
    module = _as_it_reads(workload.load(job.workload, checkpoint, Data(Split({job.input: samples}))).network.module)
    dim = torch.export.Dim("batch", min=1, max=4096)
    example = torch.as_tensor(samples[:2])
    exported = torch.export.export(module, (example,), dynamic_shapes=({0: dim},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in _batches(job):
            prepared(torch.as_tensor(batch))
    converted = convert_pt2e(prepared)
    torch.export.save(torch.export.export(converted, (example,), dynamic_shapes=({0: dim},)), job.out)
    _stop(clock)
    products = [n for n in converted.graph.nodes if str(n.target) in ("aten.conv2d.default", "aten.linear.default")]
    is_integer = [all("dequantize" in str(source.target) for source in n.args[:2]) for n in products]
    clock.layers = (sum(is_integer), len(products))
    judged = np.load(job.judged, mmap_mode="r")
    with torch.no_grad():
        parts = [
            converted(torch.as_tensor(np.ascontiguousarray(judged[i : i + 50]))).numpy()
            for i in range(0, len(judged), 50)
        ]
    np.save(job.out + ".scores.npy", np.concatenate(parts))


def _as_it_reads(module: nn.Module) -> nn.Module:
    """Lay EfficientNet out as torchao's patterns have it, which pass over its convolutions else: 0 of 49.

    They know no subclass of Conv2d, such as the package's with its padding inside, and no ReLU6 that serves twice.
    """
    from torch import nn

    class Clamp(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return nn.functional.hardtanh(values, 0.0, 6.0)

    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
            shape = child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding
            plain = nn.Conv2d(*shape, child.dilation, child.groups, bias=child.bias is not None)
            plain.load_state_dict(child.state_dict())
            setattr(module, name, nn.Sequential(child.static_padding, plain).eval())
        elif isinstance(child, nn.ReLU6):
            setattr(module, name, Clamp())
        else:
            _as_it_reads(child)
    return module


def edgekit(job: Job, clock: Stopped) -> None:
    """Compress by a recipe and write the ONNX file, from the ONNX file or from the Python workload."""
    import numpy as np

    from edgekit import device_profiles, plugins, workload
    from edgekit.compress import compress, recipe
    from edgekit.export import PACKAGE
    from edgekit.model import Data, Split
    from edgekit.progress import silent

    if job.options.get("torch"):
        import torch  # noqa: F401  # counted as an import, as the peers' are

    clock.imported = time.time()
    data = Data(Split({job.input: np.load(job.calibration)}))
    source, checkpoint = (job.workload, job.checkpoint) if job.options.get("torch") else (job.onnx, None)
    model = workload.load(source, Path(checkpoint) if checkpoint else None, data)
    profile = device_profiles.load(job.options.get("profile", "x86-64"))
    smaller = compress(model, recipe.decode(job.options["recipe"]))
    folder = Path(job.out).with_suffix(".folder")
    folder.mkdir(exist_ok=True)
    made = plugins.load(PACKAGE, "onnx", "format").export(smaller, profile, folder, silent)
    (folder / made.main).replace(job.out)


def _batches(job: Job, size: int = BATCH) -> Iterator[Array]:
    import numpy as np

    samples = np.load(job.calibration)[: job.samples]
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _integer_layers(path: str) -> tuple[int, int]:
    import onnx

    graph = onnx.load(path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    integer = [node for node in products if all(made_by.get(i) == "DequantizeLinear" for i in node.input[:2])]
    return len(integer), len(products)


def _stop(clock: Stopped) -> None:
    if not clock.finished:
        clock.finished, clock.cpu = time.time(), time.process_time()


def _peak_mib() -> float:
    """Read the high-water mark of this program: ru_maxrss would hold that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


CONTENDERS: dict[str, Callable[[Job, Stopped], None]] = {
    "onnxruntime": onnxruntime_static,
    "nncf": nncf_onnx,
    "torchao": torchao_pt2e,
    "edgekit": edgekit,
}


def main(job: Job, began: float) -> Done:
    """Do one job here, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    clock = Stopped(began)
    with contextlib.redirect_stdout(sys.stderr):
        CONTENDERS[job.contender](job, clock)
    _stop(clock)
    peak = _peak_mib()
    rated = Path(job.out + ".scores.npy")
    return Done(
        seconds=clock.finished - began,
        cpu_seconds=clock.cpu,
        import_seconds=clock.imported - began,
        peak_mib=peak,
        bytes=Path(job.out).stat().st_size,
        layers=clock.layers if rated.is_file() else _integer_layers(job.out),
        scores=str(rated) if rated.is_file() else "",
    )


if __name__ == "__main__":
    try:
        print(msgspec.json.encode(main(msgspec.json.decode(sys.argv[1], type=Job), float(sys.argv[2]))).decode())
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
