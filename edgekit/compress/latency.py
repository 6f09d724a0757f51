"""How much faster a network became on this machine: both in turns, one thread, the ratio of medians.

Measures float networks, through ONNX Runtime or PyTorch itself. Decides nothing.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgekit.errors import CompressionError
from edgekit.plugins import extra
from edgekit.sources import first_line
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgekit.model import Model

Engine = Literal["onnx", "torch"]
ROUNDS = 31
"""Pairs of runs; more where the network is quicker than a millisecond."""


@dataclass(frozen=True)
class Compared:
    """Milliseconds of one sample before and after."""

    before_ms: float
    after_ms: float

    @property
    def fraction(self) -> float:
        """What is left of the latency."""
        return self.after_ms / self.before_ms


class Stopwatch:
    """Compares candidates with one original, which is prepared once."""

    def __init__(self, original: Model, engine: Engine = "onnx") -> None:
        self._engine = engine
        self._before = _runner(original, engine)

    def compare(self, candidate: Model) -> Compared:
        """Run both in turns.

        Raises:
            CompressionError: the candidate cannot be written as ONNX.
        """
        after = _runner(candidate, self._engine)
        with _one_thread():
            for run in (self._before, after, self._before, after):
                run()  # warm caches, and memory that is claimed once
            rounds = max(ROUNDS, min(500, int(0.2 / max(1e-6, _seconds(self._before)))))
            pairs = [(_seconds(self._before), _seconds(after)) for _ in range(rounds)]
        before, now = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        return Compared(before, now)


def _runner(model: Model, engine: Engine) -> Callable[[], object]:
    if model.data is None:
        raise CompressionError(f"the latency of {model.name} needs a sample", "give data")
    sample = model.data.calibration.head(1)
    if engine == "torch":
        return lambda: model.network.run(sample.inputs)
    with extra("onnx"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_onnx(model), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(sample.inputs))


def _onnx(model: Model) -> bytes:
    with extra("compress"):
        import torch
    program = trace(model)
    names = [[spec.name for spec in side] for side in (model.inputs, model.outputs)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            with _quiet():
                torch.onnx.export(
                    program,
                    f=path,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                    input_names=names[0],
                    output_names=names[1],
                )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            raise CompressionError(
                f"the latency of {model.name} cannot be measured as ONNX: {first_line(error)}", 'set timed = "torch"'
            ) from error
        return path.read_bytes()


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice to itself."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
