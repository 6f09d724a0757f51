"""Runs LiteRT files through ai-edge-litert, or the older tflite-runtime that many Raspberry Pi images still carry.

The interpreter is not thread-safe and the batch is the file's: a lock orders the calls, `Session` loops.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from edgekit.errors import HealthError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions
    from edgekit.tensors import Array


class TfliteEngine:
    """A loaded LiteRT file. Tensors go by their name in the signature or, failing that, in the graph."""

    def __init__(self, interpreter: Any, engine: str) -> None:  # noqa: ANN401  # two packages, neither typed
        self.engine = engine
        self._interpreter = interpreter
        self._lock = threading.Lock()
        self._inputs, self._outputs = _indices(interpreter)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; callers queue.

        Raises:
            HealthError: a tensor does not fit the file, or the engine fails.
        """
        with self._lock:
            interpreter = self._interpreter
            if interpreter is None:
                raise UsageError("this LiteRT engine is closed", "load the bundle again")
            try:
                for key, array in inputs.items():
                    interpreter.set_tensor(self._inputs[key], array)
                interpreter.invoke()
                return {key: interpreter.get_tensor(index) for key, index in self._outputs.items()}
            except KeyError as error:
                raise HealthError(f"the LiteRT file has no input {error}; it has {sorted(self._inputs)}") from error
            except (ValueError, RuntimeError) as error:
                raise HealthError(f"LiteRT failed: {error}") from error

    def close(self) -> None:
        """Free the interpreter once the run in flight is done."""
        with self._lock:
            self._interpreter = None


class TfliteBackend:
    """Opens LiteRT files on the CPU; XNNPACK runs what it can."""

    extra = "tflite"

    def open(self, main: Path, options: EngineOptions) -> TfliteEngine:
        """Load a file.

        Raises:
            MissingExtra: neither ai-edge-litert nor tflite-runtime is installed.
            HealthError: the engine refuses the file.
        """
        interpreter_class, engine = _interpreter_class()
        threads = options.threads or len(os.sched_getaffinity(0))
        try:
            interpreter = interpreter_class(model_path=str(main), num_threads=threads)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise HealthError(f"{engine} refuses {main.name}: {error}", "the file is damaged or too new") from error
        return TfliteEngine(interpreter, engine)


def _interpreter_class() -> tuple[Any, str]:
    from importlib.metadata import version

    try:
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError:
        with extra("tflite"):
            from tflite_runtime.interpreter import Interpreter
        return Interpreter, f"tflite-runtime {version('tflite-runtime')} XNNPACK"
    return Interpreter, f"ai-edge-litert {version('ai-edge-litert')} XNNPACK"


def _indices(interpreter: Any) -> tuple[dict[str, int], dict[str, int]]:  # noqa: ANN401  # neither package is typed
    inputs = {detail["name"]: detail["index"] for detail in interpreter.get_input_details()}
    outputs = {detail["name"]: detail["index"] for detail in interpreter.get_output_details()}
    for signature in interpreter.get_signature_list():
        runner = interpreter.get_signature_runner(signature)
        inputs.update({name: detail["index"] for name, detail in runner.get_input_details().items()})
        outputs.update({name: detail["index"] for name, detail in runner.get_output_details().items()})
    return inputs, outputs


PLUGIN: Backend = TfliteBackend()
