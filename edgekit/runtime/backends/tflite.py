"""Runs LiteRT files through ai-edge-litert, or the older tflite-runtime that many Raspberry Pi images still carry.

The interpreter is not thread-safe and the batch is the file's: a lock orders the calls, `Session` loops. A class may
name a delegate; XNNPACK serves on the CPU where that does not load or does not run the file.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

from edgekit.errors import HealthError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import ModuleType

    from edgekit.runtime.backends import Backend, EngineOptions
    from edgekit.tensors import Array

log = logging.getLogger(__name__)

LIBRARIES = {
    "gpu": "libtensorflowlite_gpu_delegate.so",
    "edgetpu": "libedgetpu.1.dylib" if sys.platform == "darwin" else "libedgetpu.so.1",
}
"""Which library each delegate lies in; the system's loader finds it."""


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
    """Opens LiteRT files with the delegate of the class, else on the CPU, where XNNPACK runs what it can."""

    extra = "tflite"

    def open(self, main: Path, options: EngineOptions) -> TfliteEngine:
        """Load a file.

        Raises:
            MissingExtra: neither ai-edge-litert nor tflite-runtime is installed.
            HealthError: the engine refuses the file.
        """
        package, engine = _package()
        wanted = options.runtime.delegate
        refused = ""
        if wanted:
            try:
                return TfliteEngine(_delegated(package, main, wanted), f"{engine} {wanted}")
            except (OSError, ValueError, RuntimeError, AttributeError) as error:  # the last: no delegate's library
                refused = f" ({wanted}: {LIBRARIES[wanted]}: {_last_line(error)})"
                log.warning("%s is not served by a delegate%s", main.name, refused)
        try:
            interpreter = package.Interpreter(model_path=str(main), num_threads=options.workers)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise HealthError(f"{engine} refuses {main.name}: {error}", "the file is damaged or too new") from error
        return TfliteEngine(interpreter, f"{engine} XNNPACK{refused}")


def _package() -> tuple[ModuleType, str]:
    from importlib.metadata import version

    try:
        return importlib.import_module("ai_edge_litert.interpreter"), f"ai-edge-litert {version('ai-edge-litert')}"
    except ModuleNotFoundError:
        with extra("tflite"):
            return importlib.import_module("tflite_runtime.interpreter"), f"tflite-runtime {version('tflite-runtime')}"


def _delegated(package: ModuleType, main: Path, name: str) -> Any:  # noqa: ANN401  # neither package is typed
    """Return an interpreter that has run once, on what its memory held, with a delegate."""
    # Asked for first: where it fails in LiteRT's own hands, that prints another error while it cleans up.
    _ = ctypes.CDLL(LIBRARIES[name]).tflite_plugin_create_delegate
    delegate = package.load_delegate(LIBRARIES[name])
    interpreter = package.Interpreter(model_path=str(main), experimental_delegates=[delegate])
    interpreter.allocate_tensors()
    interpreter.invoke()
    return interpreter


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]  # the first names the library


def _indices(interpreter: Any) -> tuple[dict[str, int], dict[str, int]]:  # noqa: ANN401  # neither package is typed
    inputs = {detail["name"]: detail["index"] for detail in interpreter.get_input_details()}
    outputs = {detail["name"]: detail["index"] for detail in interpreter.get_output_details()}
    for signature in interpreter.get_signature_list():
        runner = interpreter.get_signature_runner(signature)
        inputs.update({name: detail["index"] for name, detail in runner.get_input_details().items()})
        outputs.update({name: detail["index"] for name, detail in runner.get_output_details().items()})
    return inputs, outputs


PLUGIN: Backend = TfliteBackend()
