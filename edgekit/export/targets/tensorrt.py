"""ONNX as TensorRT reads it: symmetric s8, zero points 0, float biases. The engine itself is built on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import ExportError
from edgekit.export import lowering, qdq, rtx
from edgekit.export.onnx_file import located
from edgekit.manifest import EngineBuild

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Artifact, Exporter
    from edgekit.model import Model
    from edgekit.progress import Progress

NOTE = (
    "the device builds the TensorRT engine of this file itself, while ONNX Runtime computes the file; without TensorRT"
    " that goes on"
)


class TensorrtExporter:
    """Writes one ``model.onnx`` with explicit quantization.

    Reads ``options.opset``, ``options.gate`` (true), and the fields of `EngineBuild` (``max_batch``, ``dla_core``, …).
    """

    extra = "export"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file for one hardware class.

        Raises:
            ExportError: an operator has no ONNX form, or TensorRT takes the plan or the file not; names the node.
            MissingExtra: torch, onnx, onnxscript or onnxruntime is not installed.
        """
        _refuse(model)
        engine = _engine_of(profile)
        path = folder / "model.onnx"
        artifact = lowering.write_artifact(model, profile, path, scheme=qdq.SIGNED, progress=progress)
        progress("parse and build with TensorRT-RTX", 0, 0)
        try:
            gate = (rtx.note_of(path),) if profile.options.get("gate", True) else ()
        except rtx.Refused as error:
            raise located(error, model, error.nodes) from error
        return replace(artifact, notes=(*artifact.notes, NOTE, *gate), engine=engine)


def _engine_of(profile: DeviceProfile) -> EngineBuild:
    """Take from a profile how its devices build their engines."""
    given = {name: profile.options[name] for name in EngineBuild.__struct_fields__ if name in profile.options}
    try:
        return msgspec.convert(given, EngineBuild)
    except msgspec.ValidationError as error:
        raise ExportError(
            f"{profile.name} cannot build an engine so: {error}",
            f"options of the profile are {', '.join(EngineBuild.__struct_fields__)}",
        ) from error


def _refuse(model: Model) -> None:
    plan = model.plan
    if plan is None:
        return
    if plan.scheme in ("dynamic", "weight-only"):
        raise ExportError(
            f"a {plan.scheme} plan ({model.precision}) has no form here that TensorRT takes",
            'quantize with activations = "static"',
        )
    for name, rule in plan.weights.items():
        if rule.granularity == "group" or rule.zeros:
            raise ExportError(
                f"{name!r} has {'zero points' if rule.zeros else 'a scale a group'}, TensorRT takes symmetric integers "
                "with one a channel",
                'quantize with granularity = "channel"',
            )


PLUGIN: Exporter = TensorrtExporter()
