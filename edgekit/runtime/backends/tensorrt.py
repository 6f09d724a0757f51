"""Serves the s8-symmetric ONNX file on CUDA or the CPU, and on a TensorRT engine of this device once that is ready.

Where that engine fails later on, the CPU serves. The name of the engine says which one it is, and why there is no
better one. Builds only where it is asked to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.runtime.backends.onnx import open_with
from edgekit.runtime.engine_swap import SwappingEngine

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.runtime.backends import Backend, Engine, EngineOptions


class TensorRtBackend:
    """Opens ONNX files for NVIDIA hardware."""

    extra = "onnx"

    def open(self, main: Path, options: EngineOptions) -> Engine:
        """Load a file on the best execution provider there is; with ``options.own`` an engine is made meanwhile.

        ONNX Runtime's own TensorRT provider is not used: it builds while it loads, and nobody is served.

        Raises:
            MissingExtra: ONNX Runtime is not installed.
            HealthError: ONNX Runtime refuses the file.
        """
        first = open_with(main, options, ("cuda",), tell_absent=False)
        if options.own is None:
            first.engine += " (no TensorRT engine was asked for)"
            return first
        from edgekit.runtime import tensorrt_tools
        from edgekit.runtime.tensorrt_ready import Ready

        def on_the_cpu() -> Engine:
            # what fails on a GPU often goes on failing there until the process ends: CUDA calls such errors sticky
            return open_with(main, options, ())

        return SwappingEngine(first, Ready(main, options.own, tensorrt_tools.find), "TensorRT", on_the_cpu)


PLUGIN: Backend = TensorRtBackend()
