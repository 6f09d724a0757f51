"""Weighs a candidate: what it lost, its bytes, its latency where somebody measures that, and how near its outputs are.

Reads validation only: calibration samples flatter what was calibrated on them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekit.compress import metrics
from edgekit.compress.budget import Reached
from edgekit.compress.evaluate import Judge, stored_bytes
from edgekit.compress.saturation import may_saturate, saturations
from edgekit.compress.simulation import planned_network
from edgekit.errors import UsageError
from edgekit.model import run_batched, whole_batches
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.compress.saturation import Saturation
    from edgekit.device_profiles import DeviceProfile
    from edgekit.model import Model
    from edgekit.tensors import Array

FIDELITY_SAMPLES = 64
PERFECT = 200.0
"""Decibels of outputs that are the same to the last bit."""

SPOILT = 35.0
"""Decibels of a layer's output that cut-off sums leave: above lies the noise that rounding to 8 bits makes anyway."""


class Scales:
    """Weighs candidates of one model by one metric; the model itself is weighed once.

    ``latency`` measures a candidate in seconds. Where ``profile`` adds products of integers in 16 bits, sums that leave
    them are looked for.

    Raises:
        UsageError: no validation split, or one that the metric cannot judge.
    """

    def __init__(
        self,
        model: Model,
        metric: metrics.Metric | str | None,
        latency: Callable[[Model], float] | None = None,
        profile: DeviceProfile | None = None,
    ) -> None:
        if model.data is None or model.data.validation is None or not len(model.data.validation):
            raise UsageError(
                f"{model.name} has no validation split to choose by",
                "give --data with one: file.py:function that returns validation=Split(…), or validation.* in the .npz",
            )
        self._judge = Judge(model, model.data.validation, metric)
        self.metric = self._judge.metric
        self._latency = latency
        self._saturates = profile is not None and may_saturate(profile)
        self._samples, self._size = whole_batches(model, model.data.validation)
        self._samples = self._samples.head(max(self._size, FIDELITY_SAMPLES // self._size * self._size))
        self._wanted = run_batched(planned_network(model), self._samples, self._size)
        self.before = self._judge.score(model).value
        self.model = model

    def weigh(self, candidate: Model) -> Reached:
        """Return what a candidate reached.

        Raises:
            CompressionError: it gives NaN or infinity.
        """
        value = self._judge.score(candidate).value
        return Reached(
            drop=metrics.drop(self.metric, self.before, value),
            value=value,
            bytes=stored_bytes(candidate),
            latency=None if self._latency is None else self._latency(candidate),
            fidelity=self.fidelity(candidate),
            saturated=max((one.share for one in self.saturations(candidate)), default=0.0),
        )

    def fidelity(self, candidate: Model) -> float:
        """Return the SQNR in decibels of a candidate's outputs on the first validation samples."""
        found = run_batched(planned_network(candidate), self._samples, self._size)
        return sqnr(found, self._wanted)

    def saturations(self, candidate: Model) -> tuple[Saturation, ...]:
        """Return the layers that the target's cut-off sums spoil; none where it has a dot product of integers."""
        if not self._saturates:
            return ()
        return tuple(one for one in saturations(candidate, self._samples, silent) if one.sqnr_db < SPOILT)


def sqnr(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """Return the signal to noise ratio of all outputs together, in decibels."""
    signal = sum(float((array.astype("f8") ** 2).sum()) for array in wanted.values())
    noise = sum(float(((found[name].astype("f8") - array) ** 2).sum()) for name, array in wanted.items())
    return PERFECT if not noise else 10 * math.log10(max(signal, 1e-30) / noise)
