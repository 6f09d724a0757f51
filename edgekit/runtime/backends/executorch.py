"""Runs ExecuTorch programs through the executorch package, whose tensors are PyTorch's (docs/adr/0010).

The threads belong to the whole process, and so does the lock that orders the calls; the batch is the file's, `Session`
loops.
"""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING, Any

from edgekit.errors import HealthError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions
    from edgekit.tensors import Array

MAGIC = b"ET"
"""At byte 4 of every program, before two digits of the format's version."""
_PROCESS = threading.Lock()


class ExecutorchEngine:
    """A loaded program. Tensors go by their place: ``input_0``, ``output_0``."""

    def __init__(self, program: Any, method: Any, engine: str) -> None:  # noqa: ANN401  # executorch is untyped
        self.engine = engine
        self._program = program  # a method reads the program's bytes, and does not keep them
        self._method = method

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; callers queue.

        Raises:
            HealthError: a tensor does not fit the file, or the engine fails.
        """
        import numpy as np
        import torch

        keys = sorted(inputs, key=_place)
        with _PROCESS:
            if self._method is None:
                raise UsageError("this ExecuTorch engine is closed", "load the bundle again")
            try:
                # it reads memory as it lies, and torch warns of arrays that may not be written
                given = [torch.from_numpy(np.require(inputs[key], requirements=("C", "W"))) for key in keys]
                found = self._method.execute(given)
            except (RuntimeError, ValueError, TypeError) as error:
                raise HealthError(f"ExecuTorch failed: {error}") from error
        return {f"output_{place}": tensor.numpy() for place, tensor in enumerate(found)}

    def close(self) -> None:
        """Free the program once the run in flight is done."""
        with _PROCESS:
            self._method = self._program = None


class ExecutorchBackend:
    """Opens ExecuTorch programs on the CPU; XNNPACK runs what was lowered for it."""

    extra = "executorch"

    def open(self, main: Path, options: EngineOptions) -> ExecutorchEngine:
        """Load a file.

        Raises:
            MissingExtra: executorch is not installed.
            HealthError: the runtime refuses the file.
        """
        with extra("executorch"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls its own interface experimental
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        from importlib.metadata import version

        engine = f"executorch {version('executorch')} XNNPACK"
        content = main.read_bytes()
        if content[4:6] != MAGIC:  # its own check of what is no program reads beyond the file's end
            raise HealthError(f"{main.name} is no ExecuTorch program", "fetch or export the bundle again")
        threads = options.workers
        with _PROCESS:
            try:
                if portable_lib._threadpool_get_thread_count() != threads:  # noqa: SLF001  # the only way to it
                    portable_lib._unsafe_reset_threadpool(threads)  # noqa: SLF001  # nothing runs: the lock is ours
                program = Runtime.get().load_program(content)
                method = program.load_method("forward")
            except (RuntimeError, ValueError) as error:
                raise HealthError(f"{engine} refuses {main.name}: {error}", "the file is damaged or too new") from error
        if method is None:
            raise HealthError(f"{main.name} has no method 'forward'", "fetch or export the bundle again")
        return ExecutorchEngine(program, method, engine)


def _place(key: str) -> int:
    """Return 0 for ``input_0``.

    Raises:
        HealthError: the manifest names a tensor that no program has.
    """
    number = key.removeprefix("input_")
    if not number.isdecimal():
        raise HealthError(f"an ExecuTorch program has no input {key!r}", "its inputs are input_0, input_1, …")
    return int(number)


PLUGIN: Backend = ExecutorchBackend()
