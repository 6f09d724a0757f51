"""How long a candidate takes on its target: measured where this machine is one, else told from the float model's time.

The file is written as `edgekit export` would write it; candidate and float model take turns, so that a noisy machine is
noisy for both.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from edgekit.cli._speed import Speed
from edgekit.durable import write_file
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.compress.rungs import Times
    from edgekit.device_profiles import DeviceProfile
    from edgekit.model import Model


class _Measurement(msgspec.Struct, frozen=True):
    precision: str
    p50_ms: float


class _Bench(msgspec.Struct, frozen=True):
    measurements: tuple[_Measurement, ...]


class TargetLatency:
    """Measures candidates as ONNX files for the class, one sample on one thread, as ``edgekit bench`` does.

    ``scale`` is how much slower the target ran the float model, 1 where this machine is the target.

    Raises:
        UsageError: this machine is not of the class and there is no ``told`` file; the class runs no ONNX.
    """

    def __init__(self, model: Model, profile: DeviceProfile, told: Path | None) -> None:
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
        self._speed = Speed(model, profile)
        self.scale = 1.0
        if self.is_estimate and told is not None:
            there = _float_seconds(told)
            self.scale = there / (self._speed.compare(replace(model, plan=None)).before_ms / 1e3)

    def __call__(self, candidate: Model) -> float:
        """Return the median seconds of one sample on the target.

        Raises:
            EdgekitError: the candidate cannot be written as ONNX.
        """
        return self._speed.compare(candidate).after_ms / 1e3 * self.scale

    def times(self, candidates: Mapping[int, Model], folder: Path) -> Times:
        """Measure what each layer takes by width, and write it for mixed_precision; a search that goes on reads it.

        The file is named by what was measured, for times are never the same twice.

        Raises:
            EdgekitError: a candidate cannot be written as ONNX, or its layers cannot be told apart in it.
        """
        from edgekit.compress.rungs import Times

        path = folder / f"times-{self._name(candidates)}.json"
        try:
            table = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[int, float]])
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            table = self._speed.layers(candidates)
            write_file(path, msgspec.json.format(msgspec.json.encode(table)))
        return Times(str(path), sum(max(times.values()) for times in table.values()) / 1e3 * self.scale)

    def _name(self, candidates: Mapping[int, Model]) -> str:
        from edgekit.compress import fingerprint

        models = {str(bits): fingerprint.of_model(model) for bits, model in candidates.items()}
        told = models, self._profile.name, fingerprint.machine(), fingerprint.tools()
        return hashlib.sha256(msgspec.json.encode(told, order="sorted")).hexdigest()[:16]


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
