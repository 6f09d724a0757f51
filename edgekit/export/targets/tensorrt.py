"""ONNX as TensorRT reads it: symmetric s8, zero points 0, float biases. The engine itself is built on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.export import qdq

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Artifact, Exporter
    from edgekit.model import Model
    from edgekit.progress import Progress

NOTE = "the TensorRT engine is built on the device from this file; until then ONNX Runtime serves it"


class TensorrtExporter:
    """Writes one ``model.onnx`` with explicit quantization. Reads ``options.opset``."""

    extra = "export"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file for one hardware class.

        Raises:
            ExportError: an operator has no ONNX form, or the plan asks for other than 8 bits.
            MissingExtra: torch, onnx, onnxscript or onnxruntime is not installed.
        """
        artifact = qdq.write_artifact(model, profile, folder / "model.onnx", scheme=qdq.SIGNED, progress=progress)
        return replace(artifact, notes=(*artifact.notes, NOTE))


PLUGIN: Exporter = TensorrtExporter()
