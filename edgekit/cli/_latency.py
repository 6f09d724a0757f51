"""How long a candidate takes on its target: measured where this machine is one, else told from the float model's time.

The file is written as `edgekit export` would write it; candidate and float model take turns, so that a noisy machine is
noisy for both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from edgekit.errors import UsageError

if TYPE_CHECKING:
    import onnxruntime

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Exporter
    from edgekit.model import Model
    from edgekit.progress import Progress

ROUNDS = 31
WARM = 3
TARGETS = "edgekit.export.targets"


class _Measurement(msgspec.Struct, frozen=True):
    precision: str
    p50_ms: float


class _Bench(msgspec.Struct, frozen=True):
    measurements: tuple[_Measurement, ...]


class TargetLatency:
    """Measures candidates through ONNX Runtime, one sample, with the threads of the class that this machine has.

    ``scale`` is how much slower the target ran the float model, 1 where this machine is the target.

    Raises:
        UsageError: this machine is not of the class and there is no ``told`` file; the class runs no ONNX.
    """

    def __init__(self, model: Model, profile: DeviceProfile, told: Path | None, progress: Progress) -> None:
        from edgekit.device_profiles import machine

        if profile.format != "onnx":
            raise UsageError(
                f"the latency of {profile.format} files for {profile.name} cannot be measured here",
                "drop --latency, and measure on the device: edgekit bench",
            )
        self.is_estimate = not _is_here(profile)
        if self.is_estimate and told is None:
            raise UsageError(
                f"this machine is no {profile.name}, so a latency on it cannot be measured here",
                "run on the device; or bench the float bundle there (edgekit bench BUNDLE --json > there.json) "
                "and give --latency-of there.json",
            )
        self._profile = profile
        self._progress = progress
        self._threads = min(profile.threads, machine.describe().cores)
        self._sample = _sample(model)
        self._float = self._session(model)
        self.scale = 1.0
        if self.is_estimate and told is not None:
            self.scale = _float_seconds(told) / self._in_turns(self._float)[0]

    def __call__(self, candidate: Model) -> float:
        """Return the median seconds of one sample on the target."""
        return self._in_turns(self._session(candidate))[1] * self.scale

    def _in_turns(self, session: onnxruntime.InferenceSession) -> tuple[float, float]:
        for _ in range(WARM):
            self._seconds(self._float), self._seconds(session)
        pairs = [(self._seconds(self._float), self._seconds(session)) for _ in range(ROUNDS)]
        before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
        return before, after

    def _seconds(self, session: onnxruntime.InferenceSession) -> float:
        started = time.perf_counter()
        session.run(None, self._sample)
        return time.perf_counter() - started

    def _session(self, model: Model) -> onnxruntime.InferenceSession:
        from edgekit import plugins

        exporter = cast("Exporter", plugins.load(TARGETS, self._profile.format, "format"))
        with plugins.extra("onnx"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory(prefix="edgekit-latency-") as folder:
            artifact = exporter.export(model, self._profile, Path(folder), self._progress)
            return onnxruntime.InferenceSession(
                str(Path(folder) / artifact.main), options, providers=["CPUExecutionProvider"]
            )


def _is_here(profile: DeviceProfile) -> bool:
    """Say whether this machine is of the class: by the signs it names, else by its instructions."""
    from edgekit import device_profiles
    from edgekit.device_profiles import machine

    here, found = machine.describe(), device_profiles.detect()
    if profile.detect is not None:
        return found is not None and found.name == profile.name
    dot = set(machine.INTEGER_DOT_PRODUCT)
    has_dot = bool(dot & set(profile.isa)) == bool(here.integer_dot_product)
    return profile.arch == here.arch and set(profile.isa) <= set(here.flags) and has_dot


def _sample(model: Model) -> dict[str, object]:
    if model.data is None:
        raise UsageError(f"{model.name} has no data to run with", "give --data file.py:function")
    return dict(model.data.calibration.head(max(1, model.inputs[0].shape[0])).inputs)


def _float_seconds(path: Path) -> float:
    """Read what the float model took on the target from what ``edgekit bench --json`` printed there."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Bench).measurements
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--latency-of {path} cannot be read: {error}", "write it on the device: edgekit bench BUNDLE --json"
        ) from error
    times = [m.p50_ms / 1e3 for m in found if m.precision == "fp32"]
    if not times or not times[0] > 0:
        raise UsageError(f"{path} holds no measurement of a float model", "bench the bundle of the float model there")
    return times[0]
