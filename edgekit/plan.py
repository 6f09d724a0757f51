"""What `compress` decided and every exporter lowers: bits, scheme, granularity and range, tensor by tensor.

Weights are named by their parameter (``features.0.weight``) or ONNX initializer; activations by the node of
`workload.trace` or the ONNX value that holds them (``conv2d_3``), inputs and outputs by their public names.
Knows no file format and no engine.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class WeightRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one weight is stored: symmetric integers of ``bits``, one scale per channel of ``axis`` or per tensor."""

    bits: int = 8
    granularity: Literal["channel", "tensor"] = "channel"
    axis: int = 0


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The values an activation took on the calibration data, after the observer had its say."""

    low: float
    high: float


class QuantizationPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decisions of a quantize pass. Empty ``activations`` means weight-only."""

    bits: int
    observer: str
    weights: dict[str, WeightRule]
    activations: dict[str, Range]

    @property
    def precision(self) -> str:
        """The name that tables and manifests use: ``int8``, ``int4``."""
        return f"int{self.bits}"
