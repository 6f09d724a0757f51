"""Runs ONNX files in ONNX Runtime. One session serves all threads: ONNX Runtime allows concurrent runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edgekit.errors import HealthError, UsageError
from edgekit.plugins import extra
from edgekit.runtime.backends import SUMS, SUMS_CHECKED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnxruntime

    from edgekit.runtime.backends import Backend, EngineOptions
    from edgekit.tensors import Array


class OnnxEngine:
    """A loaded ONNX file."""

    def __init__(self, session: onnxruntime.InferenceSession, engine: str) -> None:
        self.engine = engine
        self._session: onnxruntime.InferenceSession | None = session
        self._outputs = [o.name for o in session.get_outputs()]
        self.shapes = {i.name: tuple(n if isinstance(n, int) else -1 for n in i.shape) for i in session.get_inputs()}
        """Of the inputs; -1 for an axis of any size."""
        self._errors = engine_errors()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; safe to call from several threads at once.

        Raises:
            HealthError: ONNX Runtime fails on an input that fits the manifest.
        """
        session = self._session
        if session is None:
            raise UsageError("this ONNX engine is closed", "load the bundle again")
        try:
            return dict(zip(self._outputs, session.run(self._outputs, inputs), strict=True))
        except self._errors as error:
            raise HealthError(f"ONNX Runtime failed: {_first_line(error)}") from error

    def close(self) -> None:
        """Free the session once the runs in flight are done."""
        self._session = None


class OnnxBackend:
    """Opens ONNX files on the CPU."""

    extra = "onnx"

    def open(self, main: Path, options: EngineOptions) -> OnnxEngine:
        """Load a file.

        Raises:
            MissingExtra: ONNX Runtime is not installed.
            HealthError: ONNX Runtime refuses the file.
        """
        return open_with(main, options, ["CPUExecutionProvider"])


def open_with(main: Path, options: EngineOptions, providers: Sequence[str]) -> OnnxEngine:
    """Load a file on the first of the execution providers that takes it.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        HealthError: ONNX Runtime refuses the file.
    """
    with extra("onnx"):
        import onnxruntime
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads or len(os.sched_getaffinity(0))
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Spinning threads burn 25 times the CPU of a request at 5 requests a second (measured, two threads).
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(main), settings, providers=list(providers))
        if options.cuts_sums and session.get_modelmeta().custom_metadata_map.get(SUMS) != SUMS_CHECKED:
            settings.add_session_config_entry("session.x64quantprecision", "1")  # some 10 % slower, and right
            session = onnxruntime.InferenceSession(str(main), settings, providers=list(providers))
    except engine_errors() as error:
        raise HealthError(
            f"ONNX Runtime {onnxruntime.__version__} refuses {main.name}: {_first_line(error)}",
            "the file is damaged or too new for this ONNX Runtime",
        ) from error
    return OnnxEngine(session, f"onnxruntime {onnxruntime.__version__} {session.get_providers()[0]}")


def engine_errors() -> tuple[type[Exception], ...]:
    """List what ONNX Runtime raises; its errors share no class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail", "EngineError", "NoModel", "ModelLoaded")  # fmt: skip
    return (*(getattr(state, name) for name in names if hasattr(state, name)), RuntimeError, ValueError)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


PLUGIN: Backend = OnnxBackend()
