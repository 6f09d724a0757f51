"""Runs the s8-symmetric ONNX file that TensorRT takes: on TensorRT or CUDA where ONNX Runtime has them, else the CPU.

The name of the engine says which one it is. Builds no plan of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.plugins import extra
from edgekit.runtime.backends.onnx import OnnxEngine, open_with

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions

PREFERRED = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


class TensorRtBackend:
    """Opens ONNX files for NVIDIA hardware."""

    extra = "onnx"

    def open(self, main: Path, options: EngineOptions) -> OnnxEngine:
        """Load a file on the best execution provider there is.

        Raises:
            MissingExtra: ONNX Runtime is not installed.
            HealthError: ONNX Runtime refuses the file.
        """
        with extra("onnx"):
            import onnxruntime
        present = onnxruntime.get_available_providers()
        engine = open_with(main, options, [name for name in PREFERRED if name in present])
        if "CPU" in engine.engine:
            engine.engine += " (ONNX Runtime has no TensorRT or CUDA here)"
        return engine


PLUGIN: Backend = TensorRtBackend()
