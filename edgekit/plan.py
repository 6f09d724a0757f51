"""What `compress` decided and every exporter lowers: bits, scheme, granularity and range, tensor by tensor.

Weights are named by their parameter (``features.0.weight``) or ONNX initializer; activations by the node of
`workload.trace` or the ONNX value that holds them (``conv2d_3``), inputs and outputs by their public names.
Knows no file format and no engine; the arithmetic of a rule lies in `grid`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

FILE = "plan.json"
"""What the plan is called where it is a file of its own."""

Granularity = Literal["channel", "tensor", "group"]
Scheme = Literal["static", "dynamic", "weight-only", "float16"]
Cover = Literal["all", "inputs"]


class WeightRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one weight is stored: integers of ``bits``, one scale per channel of ``axis``, per tensor or per group.

    A group is ``group`` neighbours of one channel, the rest of the weight flattened in row order; the last may be
    shorter. ``scales`` are little-endian float32, channel by channel; empty means the largest value over the largest
    integer. ``zeros`` are little-endian int32, one a scale, and make the integers unsigned; empty means symmetric.
    """

    bits: Annotated[int, msgspec.Meta(ge=2, le=8)] = 8
    granularity: Granularity = "channel"
    axis: int = 0
    group: Annotated[int, msgspec.Meta(ge=0)] = 0
    scales: bytes = b""
    zeros: bytes = b""


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The values an activation took on the calibration data, after the observer had its say; stored in 8 bits."""

    low: float
    high: float


class QuantizationPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decisions of the passes that quantize.

    ``static``: activations are integers of the ranges in ``activations``. ``dynamic``: the inputs of planned weights
    are rounded to 8 bits by the range they have at that moment. ``weight-only``: activations stay float.
    ``float16``: everything is a half, and nothing else is planned. ``cover``: whether a static plan makes integers of
    every activation, or of those alone that meet a weight (`inputs`). ONNX files
    follow it; LiteRT measures what the plan lacks, Core ML has no integer activations.
    """

    bits: int
    observer: str
    weights: dict[str, WeightRule]
    activations: dict[str, Range]
    scheme: Scheme = "static"
    cover: Cover = "all"

    @property
    def precision(self) -> str:
        """The name that tables and manifests use: ``int8``, ``int4-weights``, ``int8-dynamic``, ``w4a8``, ``fp16``.

        ``mixed`` stands in the place of the bits where weights of several widths are planned.
        """
        if self.scheme == "float16":
            return "fp16"
        # 7-bit weights are stored as int8: only their values are kept from the ends (no VNNI: `saturation`)
        widths = {8 if rule.bits == 7 else rule.bits for rule in self.weights.values()} or {self.bits}
        if self.scheme == "static":
            return "int8" if widths == {8} else f"w{_width(widths)}a8"
        return f"{_kind(widths)}-{'weights' if self.scheme == 'weight-only' else 'dynamic'}"


def halves() -> QuantizationPlan:
    """Return the plan of a network in 16-bit floats: nothing but that is decided."""
    return QuantizationPlan(bits=16, observer="none", weights={}, activations={}, scheme="float16")


def _width(widths: set[int]) -> str:
    return str(next(iter(widths))) if len(widths) == 1 else "mixed"


def _kind(widths: set[int]) -> str:
    return f"int{next(iter(widths))}" if len(widths) == 1 else "mixed"
