"""TensorRT: the variant's file is ONNX, of which the device builds its own engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.guards.onnx import check

if TYPE_CHECKING:
    from edgekit.guards import Guard

PLUGIN: Guard = check
