"""Finds the layers that a plan hurts most, and says what about them is to blame.

One walk measures what rounding a layer's weight and input costs at that layer; the worst are then left float one by
one, and what the network's outputs win by that is what the layer is blamed for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit.compress.rounding import planned_weight, round_dynamically, round_value
from edgekit.compress.walking import walk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.compress.saturation import Saturation
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan, Range
    from edgekit.progress import Progress

Cause = Literal["input channels", "input outlier", "weight channels", "weights", "input", "saturation"]

SAMPLES = 64
SUSPECTS = 5
SPREAD = 8.0
"""From how many times the median on a channel's range is what makes the others coarse."""
OUTLIER = 3.0
"""From how many times the 99.9th percentile on the largest value is one that stretches the range."""
PASSED_ON = 0.5
"""Which share of what the worst layer wins another wins that may have passed the outlier on to it."""
AS_BAD = 3.0
"""Or how many decibels clearer it is by itself: floats there win little while the next layer is as coarse."""


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A layer by the name of its weight: the decibels that its rounding leaves there, and why.

    ``spread`` is the widest channel's range over the median's, ``outlier`` the largest value over the 99.9th
    percentile, both of the layer's input where that is to blame, else of its weight. ``won`` are the decibels that the
    network's outputs win when this layer alone stays float. ``share`` of its sums of two products leave 16 bits on the
    target, which costs the layer so much that ``sqnr`` is left.
    """

    layer: str
    source: str
    cause: Cause
    sqnr: float
    spread: float
    outlier: float
    channel: int
    won: float = 0.0
    share: float = 0.0

    @property
    def told(self) -> str:
        """One sentence for a person."""
        told: dict[Cause, str] = {
            "input channels": f"channel {self.channel} of its input {self.source} is {self.spread:.0f} times as wide "
            "as the median one, so the others get few integers",
            "input outlier": f"rare values of its input {self.source} are {self.outlier:.1f} times as large as 99.9 % "
            "of all, so the rest gets few integers",
            "weight channels": f"channel {self.channel} of the weight is {self.spread:.0f} times as wide as the median "
            "one, and all share a scale",
            "weights": "the weight has too few integers",
            "input": f"its input {self.source} has too few integers",
            "saturation": "",
        }
        if self.cause == "saturation":
            return (
                f"{self.layer}: {100 * self.share:.2g} % of its sums of two products leave 16 bits on the target "
                f"and are cut off ({self.sqnr:.1f} dB of the layer are left)"
            )
        return f"{self.layer}: {told[self.cause]} ({self.won:.1f} dB of the outputs)"


def blame(model: Model, fidelity: Callable[[Model], float], progress: Progress, most: int = 3) -> tuple[Suspect, ...]:
    """Return the layers that a planned model suffers from most, the worst first; none where it has no plan.

    ``fidelity`` gives the SQNR of a candidate's outputs in decibels.

    Raises:
        CompressionError: the network cannot be walked through.
    """
    if model.plan is None or model.data is None or model.plan.scheme == "float16":
        return ()
    suspects = _suspects(model, model.data.calibration.head(SAMPLES), progress)[:SUSPECTS]
    now = fidelity(model)
    blamed = []
    for done, suspect in enumerate(suspects):
        progress("blame: leave a layer float", done, len(suspects))
        without = fidelity(replace(model, plan=_without(model.plan, suspect)))
        blamed.append(msgspec.structs.replace(suspect, won=without - now))
    return tuple(_ranked([suspect for suspect in blamed if suspect.won > 0])[:most])


def _ranked(blamed: Sequence[Suspect]) -> list[Suspect]:
    """Put first what wins most; of layers that one outlier goes through, the one where it is largest: it fades."""
    ordered = sorted(blamed, key=lambda suspect: -suspect.won)
    if not ordered or ordered[0].cause != "input outlier":
        return ordered
    worst = ordered[0]
    touched = [
        s
        for s in ordered
        if s.cause == "input outlier" and (s.won >= PASSED_ON * worst.won or s.sqnr <= worst.sqnr + AS_BAD)
    ]
    first = max(touched, key=lambda suspect: suspect.outlier)
    return [first, *(suspect for suspect in ordered if suspect is not first)]


def cut_off(found: Sequence[Saturation], most: int = 3) -> tuple[Suspect, ...]:
    """Return the layers that the target's arithmetic spoils, the worst first."""
    return tuple(
        Suspect(
            layer=one.weight,
            source="",
            cause="saturation",
            sqnr=one.sqnr_db,
            spread=1.0,
            outlier=1.0,
            channel=0,
            share=one.share,
        )
        for one in sorted(found, key=lambda one: one.sqnr_db)[:most]
    )


def _suspects(model: Model, samples: Split, progress: Progress) -> list[Suspect]:
    found: list[Suspect] = []
    plan = model.plan

    def visit(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> None:
        del planned  # what earlier layers spoiled is not this layer's fault
        if plan is not None and layer.weight in plan.weights:
            found.append(_suspect(layer, floats, plan))

    walk(model, samples, visit, progress, what="blame: rounding of each layer")
    return sorted(found, key=lambda suspect: suspect.sqnr)


def _suspect(layer: Layer, floats: Sequence[torch.Tensor], plan: QuantizationPlan) -> Suspect:
    import torch

    weight = torch.as_tensor(layer.values)
    rounded = torch.as_tensor(planned_weight(layer, plan))
    limits = plan.activations.get(layer.source)
    signal = by_weight = by_input = 0.0
    for inputs in floats:
        exact = layer.compute(inputs, weight, None)
        signal += _power(exact)
        by_weight += _power(layer.compute(inputs, rounded, None) - exact)
        by_input += _power(layer.compute(_rounded(inputs, limits, plan), weight, None) - exact)
    sqnr = 10 * math.log10(max(signal, 1e-30) / max(by_weight + by_input, 1e-30))
    if by_input > by_weight:
        spread, channel = _spread(_channels_of_input(layer, floats))
        outlier = _outlier(floats)
        shared: Cause = "input outlier" if outlier >= OUTLIER else "input"
        cause: Cause = "input channels" if spread >= SPREAD else shared
    else:
        spread, channel = _spread(weight.flatten(1).abs().amax(1))
        outlier = _outlier([weight])
        together = plan.weights[layer.weight].granularity == "tensor"
        cause = "weight channels" if together and spread >= SPREAD else "weights"
    return Suspect(
        layer=layer.weight,
        source=layer.source,
        cause=cause,
        sqnr=sqnr,
        spread=spread,
        outlier=outlier,
        channel=channel,
    )


def _power(values: torch.Tensor) -> float:
    return float((values.double() ** 2).sum())


def _rounded(inputs: torch.Tensor, limits: Range | None, plan: QuantizationPlan) -> torch.Tensor:
    if plan.scheme == "dynamic":
        return round_dynamically(inputs)
    return inputs if limits is None else round_value(inputs, limits)


def _channels_of_input(layer: Layer, floats: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return how large 99 % of the values of each input channel are: a rare one is an outlier, not a wide channel."""
    import torch

    axis = -1 if layer.kind == "linear" else 1
    flat = torch.cat([inputs.movedim(axis, 0).flatten(1) for inputs in floats], dim=1).abs()
    return flat.sort(dim=1).values[:, int(0.99 * (flat.shape[1] - 1))]


def _spread(ranges: torch.Tensor) -> tuple[float, int]:
    """Return the widest channel's range over the median's of those that are not zero, and its number."""
    alive = ranges[ranges > 0]
    if not len(alive):
        return 1.0, 0
    return float(ranges.max() / alive.median()), int(ranges.argmax())


def _outlier(values: Sequence[torch.Tensor]) -> float:
    """Return the largest value over the 99.9th percentile of those that are not zero."""
    import torch

    flat = torch.cat([v.flatten() for v in values]).abs()
    alive = flat[flat > 0].sort().values
    if not len(alive):
        return 1.0
    return float(alive[-1] / alive[int(0.999 * (len(alive) - 1))])


def _without(plan: QuantizationPlan, suspect: Suspect) -> QuantizationPlan:
    """Return the plan that leaves a layer's weight and input float."""
    return msgspec.structs.replace(
        plan,
        weights={name: rule for name, rule in plan.weights.items() if name != suspect.layer},
        activations={name: limits for name, limits in plan.activations.items() if name != suspect.source},
    )
