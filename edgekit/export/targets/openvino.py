"""OpenVINO's IR for Intel CPUs, GPUs and NPUs: made from the ONNX that the plan is lowered to, u8 beside s8."""

from __future__ import annotations

import re
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError
from edgekit.export import lowering, qdq
from edgekit.export.onnx_file import located
from edgekit.export.quiet import silence
from edgekit.export.refusal import REFUSALS, reason
from edgekit.plugins import extra

if TYPE_CHECKING:
    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Artifact, Exporter
    from edgekit.model import Model
    from edgekit.progress import Progress

SCHEME = replace(qdq.UNSIGNED, onnxruntime=False)
MAIN, WEIGHTS = "model.xml", "model.bin"


class OpenvinoExporter:
    """Writes ``model.xml`` and ``model.bin``. Reads ``options.opset``, of the ONNX that they are made from."""

    extra = "openvino"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the files for one hardware class.

        Raises:
            ExportError: an operator has no ONNX or no OpenVINO form, or the plan asks for what ONNX cannot hold.
            MissingExtra: openvino, torch, onnx or onnxscript is not installed.
        """
        with extra("openvino"), silence():
            import openvino
            from openvino._pyopenvino import OpConversionFailure  # public nowhere; OpenVINO's errors share no class
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "model.onnx")
            artifact = lowering.write_artifact(model, profile, path, scheme=SCHEME, progress=progress)
            try:
                with silence():
                    made = openvino.convert_model(str(path))
                    _name(made, [spec.name for spec in model.outputs])
                    openvino.save_model(made, folder / MAIN, compress_to_fp16=False)
            except (*REFUSALS, OpConversionFailure) as error:
                raise located(
                    ExportError(
                        f"{model.name} has no OpenVINO form: {_reason(error)}",
                        "replace that operator, or export to onnx",
                    ),
                    model,
                    _lacking(error),
                ) from error
        _forget_this_run(folder / MAIN)
        operators = Counter(operator.get_type_name() for operator in made.get_ordered_ops())
        return replace(artifact, main=MAIN, files=(WEIGHTS, MAIN), operators=operators, requires={"openvino_ir": "11"})


def _reason(error: BaseException) -> str:
    """Return the line that names the operators, which OpenVINO writes last."""
    told = [line.removeprefix("-- ") for line in str(error).splitlines() if "No conversion rule found" in line]
    return told[0][:300] if told else reason(error)


def _lacking(error: BaseException) -> set[str]:
    """Return the types of ONNX operators that OpenVINO has no rule for."""
    listed = re.findall(r"operations: ([\w., :-]+)", str(error))
    return {word.rpartition(".")[2] for one in listed for word in re.split(r"[ ,]+", one.strip()) if word}


def _name(made: Any, outputs: list[str]) -> None:  # noqa: ANN401  # openvino's model has no types here
    """Name the outputs as the model does, and every operator by its place: OpenVINO counts on through a process."""
    for number, operator in enumerate(made.get_ordered_ops()):
        operator.set_friendly_name(f"{operator.get_type_name()}_{number}")
    for output, name in zip(made.outputs, outputs, strict=True):
        output.get_tensor().set_names({name})


def _forget_this_run(path: Path) -> None:
    """Drop where the file was made from, and by which build: the same network gives the same bytes."""
    tree = ET.parse(path)  # noqa: S314  # OpenVINO has just written it
    root = tree.getroot()
    for told in root.findall("rt_info"):
        root.remove(told)
    root.set("name", "model")
    tree.write(path, encoding="utf-8", xml_declaration=True)


PLUGIN: Exporter = OpenvinoExporter()
