"""Runs ONNX files in ONNX Runtime. One session serves all threads: ONNX Runtime allows concurrent runs.

Tries the execution providers of the hardware class in their order; the processor serves where none of them can.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from edgekit.errors import HealthError, UsageError
from edgekit.plugins import extra
from edgekit.runtime import memory
from edgekit.runtime.backends import SUMS, SUMS_CHECKED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnxruntime

    from edgekit.runtime.backends import Backend, EngineOptions
    from edgekit.tensors import Array

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
NUMPY = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(string)": "object"} | {
    f"tensor({kind})": kind
    for kind in ("float16", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
}
"""From ONNX Runtime's names of types to NumPy's."""
OPENVINO = {"device_type": "CPU", "precision": "ACCURACY"}
"""In float as the file has it, not in bfloat16 where that is quicker."""
USUAL = ("cuda", "openvino")
"""Tried where the class says nothing: who has one of them installed another package than the plain one, for its sake.

Not TensorRT, which builds for minutes while nobody is served, nor Core ML, which is in every package for macOS and
computes in float16, nor XNNPACK, which takes a few float operators only: a class names those.
"""


class OnnxEngine:
    """A loaded ONNX file."""

    def __init__(self, session: onnxruntime.InferenceSession, engine: str) -> None:
        self.engine = engine
        self.provider: str = session.get_providers()[0]
        self._session: onnxruntime.InferenceSession | None = session
        self._outputs = [o.name for o in session.get_outputs()]
        self.shapes = {i.name: tuple(n if isinstance(n, int) else -1 for n in i.shape) for i in session.get_inputs()}
        """Of the inputs; -1 for an axis of any size."""
        self._types = {i.name: NUMPY.get(i.type) for i in session.get_inputs()}
        self._errors = engine_errors()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; safe to call from several threads at once.

        Raises:
            HealthError: ONNX Runtime fails on an input that fits the manifest.
        """
        session = self._session
        if session is None:
            raise UsageError("this ONNX engine is closed", "load the bundle again")
        # No I/O binding: `run` reads NumPy's memory as it lies, and its answers lie in memory of their own. Measured on
        # the CPU, 1.31.1, one thread, medians: Relu of 100 MB in and out 18.7 ms, bound to outputs that ONNX Runtime
        # allocates 54.6, to fresh arrays 35.1, to one array again and again, which two callers would share, 19.1;
        # EfficientNet-Lite0 12.8, 12.7, 13.1 and 12.9.
        try:
            return dict(zip(self._outputs, session.run(self._outputs, inputs), strict=True))
        except self._errors as error:
            raise HealthError(f"ONNX Runtime failed: {_first_line(error)}") from error

    def zeros(self) -> dict[str, Array] | None:
        """Return one sample of zeros, ``None`` where the file leaves the size of more than the batch open."""
        import numpy as np

        if any(-1 in shape[1:] for shape in self.shapes.values()) or None in self._types.values():
            return None
        sizes = {name: tuple(abs(n) for n in shape) for name, shape in self.shapes.items()}
        return {n: np.full(sizes[n], "" if kind == "object" else 0, kind) for n, kind in self._types.items()}

    def close(self) -> None:
        """Free the session once the runs in flight are done."""
        self._session = None


class OnnxBackend:
    """Opens ONNX files on the providers of the class, else on the CPU."""

    extra = "onnx"

    def open(self, main: Path, options: EngineOptions) -> OnnxEngine:
        """Load a file.

        Raises:
            MissingExtra: ONNX Runtime is not installed.
            HealthError: ONNX Runtime refuses the file.
        """
        named = options.runtime.providers
        return open_with(main, options, USUAL if named is None else named, tell_absent=named is not None)


def open_with(main: Path, options: EngineOptions, wanted: Sequence[str], *, tell_absent: bool = True) -> OnnxEngine:
    """Load a file on the first of the providers that starts and runs it on zeros, else on the CPU.

    The engine's name says why one was not taken; with ``tell_absent`` also of those that are not installed.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        HealthError: ONNX Runtime refuses the file on the CPU as well.
    """
    with extra("onnx"):
        import onnxruntime
    present = onnxruntime.get_available_providers()
    refused: list[str] = []
    for name in wanted:
        if PROVIDERS[name] not in present:
            refused += [f"{name}: not in this ONNX Runtime"] if tell_absent else []
            continue
        try:
            engine = _open(main, options, name)
        except HealthError as error:
            log.warning("%s is not served by %s: %s", main.name, PROVIDERS[name], error.message)
            refused.append(f"{name}: {error.message}")
            continue
        return _noted(engine, refused)
    return _noted(_session(main, options, CPU), refused)


def _noted(engine: OnnxEngine, refused: Sequence[str]) -> OnnxEngine:
    if refused:
        engine.engine += f" ({'; '.join(refused)})"
    return engine


def _open(main: Path, options: EngineOptions, name: str) -> OnnxEngine:
    """Open a file on a provider other than the CPU, and run it once.

    Raises:
        HealthError: the provider does not start, or does not compute the file, or not rightly.
    """
    if name == "openvino" and options.cuts_sums:
        raise HealthError("it may add products of 8-bit integers in 16 bits on this processor")
    engine = _session(main, options, PROVIDERS[name])
    if engine.provider != PROVIDERS[name]:  # what ONNX Runtime does where a library of the provider is missing
        raise HealthError("it does not start here; what it lacks stands on standard error")
    zeros = engine.zeros()
    if zeros is not None:
        engine.run(zeros)
    return engine


def _session(main: Path, options: EngineOptions, provider: str) -> OnnxEngine:
    import onnxruntime

    settings = _settings(options)
    providers = [(provider, _provider_options(provider, options)), CPU] if provider != CPU else [CPU]
    try:
        session = onnxruntime.InferenceSession(str(main), settings, providers=providers)
        if options.cuts_sums and session.get_modelmeta().custom_metadata_map.get(SUMS) != SUMS_CHECKED:
            settings.add_session_config_entry("session.x64quantprecision", "1")  # some 10 % slower, and right
            session = onnxruntime.InferenceSession(str(main), settings, providers=providers)
    except engine_errors() as error:
        raise HealthError(
            f"ONNX Runtime {onnxruntime.__version__} refuses {main.name}: {_first_line(error)}",
            "the file is damaged or too new for this ONNX Runtime",
        ) from error
    # Weights in a file beside the graph are mapped by ONNX Runtime itself. A mapped .ort file would take 7 MiB of
    # EfficientNet-Lite0 in place of 21 and 12 ms of CPU in place of 60, and run as quickly, but it is made for one
    # version and one processor: each device would have to convert. Without prepacking 2 MiB, and a third slower.
    memory.give_back()
    return OnnxEngine(session, f"onnxruntime {onnxruntime.__version__} {session.get_providers()[0]}")


def _settings(options: EngineOptions) -> onnxruntime.SessionOptions:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.workers
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Spinning threads burn 25 times the CPU of a request at 5 requests a second (measured, two threads).
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # EfficientNet-Lite0, MiB of its own: 52 to 59 for single pictures, after a batch of 32 it keeps 312 to 323; with
    # neither arena nor pattern 257 at most in place of 332, and 54 again after it. A single picture takes as long
    # (12.0 and 12.2 ms), batches of 8 a fifth longer. Shrinking the arena after each run keeps as little, needs as
    # much at most, and costs a batch a third.
    settings.enable_cpu_mem_arena = settings.enable_mem_pattern = options.runtime.arena
    return settings


def _provider_options(provider: str, options: EngineOptions) -> dict[str, str]:
    if provider == PROVIDERS["openvino"]:
        return {**OPENVINO, "num_of_threads": str(options.workers)}
    return {"intra_op_num_threads": str(options.workers)} if provider == PROVIDERS["xnnpack"] else {}


def engine_errors() -> tuple[type[Exception], ...]:
    """List what ONNX Runtime raises; its errors share no class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail", "EngineError", "NoModel", "ModelLoaded")  # fmt: skip
    return (*(getattr(state, name) for name in names if hasattr(state, name)), RuntimeError, ValueError)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


PLUGIN: Backend = OnnxBackend()
