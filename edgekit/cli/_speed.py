"""How fast a compressed model is here beside its original: both as the ONNX files that export would write, in turns.

Integers count: a plan is lowered into the file. One thread, so that a busy machine troubles both alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit import device_profiles, plugins
from edgekit.errors import UsageError
from edgekit.plugins import extra
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.compress.latency import Compared
    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Exporter
    from edgekit.model import Model

ROUNDS = (15, 300)
"""Fewest and most pairs of runs."""
SECONDS = 0.5
"""What the pairs may take together, but for the fewest."""


class Speed:
    """Compares candidates with one original, whose file is written once: for ``profile``, else for this machine."""

    def __init__(self, original: Model, profile: DeviceProfile | None = None) -> None:
        found = profile or device_profiles.detect()
        self._profile = found if found and found.format == "onnx" else device_profiles.load("x86-64")
        self._original = original
        self._before: Callable[[], object] | None = None

    @property
    def note(self) -> str:
        """Say what is measured."""
        return (
            f"of one sample, as an ONNX file for {self._profile.name}, one thread, median of runs in turns with the "
            "original"
        )

    def compare(self, candidate: Model) -> Compared:
        """Return the milliseconds of one sample before and after.

        Raises:
            EdgekitError: a model cannot be written as ONNX, or there is no sample to run.
        """
        from edgekit.compress.latency import Compared

        if self._before is None:
            self._before = self._runner(replace(self._original, plan=None))
        before, after = self._before, self._runner(candidate)
        for run in (before, after, before, after):
            run()  # warm caches, and memory that is claimed once
        pair = _seconds(before) + _seconds(after)
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / max(pair, 1e-6))))
        times = [(_seconds(before), _seconds(after)) for _ in range(rounds)]
        one, two = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
        return Compared(one, two)

    def _runner(self, model: Model) -> Callable[[], object]:
        with extra("onnx"):
            import onnxruntime
        if model.data is None or not len(model.data.calibration):
            raise UsageError(f"the latency of {model.name} needs a sample", "give --data")
        exporter = cast("Exporter", plugins.load("edgekit.export.targets", "onnx", "format"))
        with tempfile.TemporaryDirectory() as folder:
            artifact = exporter.export(model, self._profile, Path(folder), silent)
            content = (Path(folder) / artifact.main).read_bytes()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        sample = model.data.calibration.head(max(1, artifact.batch))
        inputs = {port.key: sample.inputs[port.name] for port in artifact.inputs}
        return lambda: session.run(None, inputs)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
