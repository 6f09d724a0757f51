"""Builds a TensorRT engine of an ONNX file: the child process of `tensorrt_tools`. Knows no cache and opens no engine.

Works with ``tensorrt`` of JetPack or PyPI, 8.5 and later, and with ``tensorrt_rtx``, which has the same interface.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit import durable
from edgekit.errors import EdgekitError, HealthError
from edgekit.manifest import EngineBuild

if TYPE_CHECKING:
    from collections.abc import Sequence

NICE = 10
"""The model that serves meanwhile goes first."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be built of what, by which module, into which file; ``timing`` keeps what kernels took."""

    module: str
    onnx: str
    engine: str
    timing: str
    how: EngineBuild


def build(job: Job) -> None:
    """Parse the file, build the engine, and write it and the timing cache.

    Raises:
        HealthError: TensorRT refuses the file or an option; says why.
    """
    trt = importlib.import_module(job.module)
    told: list[str] = []
    logger = _logger(trt, told)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, job.how))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        raise HealthError(f"TensorRT does not parse {Path(job.onnx).name}: {_why(told)}")
    config = _settings(trt, builder, network, job.how)
    timing = _with_timing(config, Path(job.timing))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise HealthError(f"TensorRT builds no engine of {Path(job.onnx).name}: {_why(told)}")
    durable.write_file(Path(job.engine), bytes(engine))
    if timing:
        kept = config.get_timing_cache()
        durable.write_file(Path(job.timing), bytes(kept.serialize() if kept else b""))


def _is_typed(trt: Any, how: EngineBuild) -> bool:  # noqa: ANN401  # TensorRT has no types
    """Say whether the engine keeps the file's own types; a DLA and half floats need a builder that may choose."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") and how.dla_core < 0 and not how.fp16


def _network_flags(trt: Any, how: EngineBuild) -> int:  # noqa: ANN401  # TensorRT has no types
    flags = trt.NetworkDefinitionCreationFlag
    if _is_typed(trt, how):
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0  # 8.x asks for it, later ones not


def _settings(trt: Any, builder: Any, network: Any, how: EngineBuild) -> Any:  # noqa: ANN401  # TensorRT has no types
    config = builder.create_builder_config()
    if how.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, how.workspace_mb << 20)
    if not _is_typed(trt, how):
        # explicit integers need the flag on the builders that may choose types
        for flag in ("INT8", "FP16") if how.dla_core >= 0 or how.fp16 else ("INT8",):
            _set(trt, config, flag)
    if how.dla_core >= 0:
        if how.dla_core >= builder.num_DLA_cores:
            raise HealthError(f"this device has {builder.num_DLA_cores} DLA cores, dla_core is {how.dla_core}")
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = how.dla_core
        if how.gpu_fallback:
            _set(trt, config, "GPU_FALLBACK")
    shapes = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        if -1 in tuple(tensor.shape):
            smallest, largest = sizes_of(tuple(tensor.shape), how.max_batch)
            shapes.set_shape(tensor.name, smallest, largest, largest)
    config.add_optimization_profile(shapes)
    return config


def sizes_of(shape: Sequence[int], max_batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the smallest and the largest shape of an input whose first axis alone is open.

    Raises:
        HealthError: another axis is open too.
    """
    if -1 in shape[1:]:
        raise HealthError(f"an input of shape {list(shape)} is open beyond its batch: ONNX Runtime computes it")
    fixed = tuple(shape[1:])
    return (1, *fixed), (max_batch, *fixed)


def _set(trt: Any, config: Any, flag: str) -> None:  # noqa: ANN401  # TensorRT has no types
    if not hasattr(trt.BuilderFlag, flag):
        raise HealthError(f"this TensorRT builds strongly typed engines only, it has no {flag}", "leave fp16, dla_core")
    config.set_flag(getattr(trt.BuilderFlag, flag))


def _with_timing(config: Any, path: Path) -> bool:  # noqa: ANN401  # TensorRT has no types
    """Begin with what earlier builds measured; TensorRT refuses what another version or GPU wrote."""
    for start in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(start)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
    return False


def _logger(trt: Any, told: list[str]) -> Any:  # noqa: ANN401  # TensorRT has no types
    class Logger(trt.ILogger):  # type: ignore[misc]  # an untyped base
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401  # TensorRT's signature
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                told.append(message)

    return Logger()


def _why(told: Sequence[str]) -> str:
    return told[0].strip().replace("\n", " ")[:300] if told else "it does not say why"


def _end_with_parent() -> None:
    """End when the pipe of the process that started this one breaks, so that no build outlives its server."""
    while os.read(0, 1):  # not through sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Be the child: build what the file ``arguments[0]`` says; the last line on stderr tells why not."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(NICE)
    try:
        build(msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Job))
    except EdgekitError as error:
        sys.stderr.write(f"\n{error.message}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
