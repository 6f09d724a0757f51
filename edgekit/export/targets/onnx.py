"""ONNX for ONNX Runtime on CPUs: float as it is, a plan as u8 activations beside s8 weights. Knows no other format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.export import lowering, qdq

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Artifact, Exporter
    from edgekit.model import Model
    from edgekit.progress import Progress

_SCHEMES = {"uint8": qdq.UNSIGNED, "int8": qdq.SHIFTED}


class OnnxExporter:
    """Writes one ``model.onnx``. Reads ``options.opset`` and ``options.activations`` (uint8 or int8)."""

    extra = "export"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file for one hardware class.

        Raises:
            ExportError: an operator has no ONNX form, or the plan asks for what ONNX cannot hold.
            MissingExtra: torch, onnx, onnxscript or onnxruntime is not installed.
        """
        kind = str(profile.options.get("activations", "uint8"))
        if kind not in _SCHEMES:
            raise UsageError(f"{profile.name}: options.activations is {kind!r}", f"use {' or '.join(_SCHEMES)}")
        return lowering.write_artifact(model, profile, folder / "model.onnx", scheme=_SCHEMES[kind], progress=progress)


PLUGIN: Exporter = OnnxExporter()
