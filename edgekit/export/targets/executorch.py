"""ExecuTorch programs for XNNPACK: batch 1, the plan's own numbers, float inputs and outputs.

What XNNPACK does not take runs in ExecuTorch's own kernels, in float; a note says how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import ExportError, UsageError
from edgekit.export import pte_file, xnnpack_forms, xnnpack_graph
from edgekit.export.quiet import silence
from edgekit.export.refusal import REFUSALS, refused, traced
from edgekit.export.targets import Artifact, Exporter
from edgekit.manifest import Port
from edgekit.model import TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.xnnpack_graph import Written
    from edgekit.model import Model
    from edgekit.progress import Progress


class ExecutorchExporter:
    """Writes one ``model.pte``. Reads no option."""

    extra = "executorch"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file for one hardware class.

        Raises:
            ExportError: no PyTorch network, an operator without an ExecuTorch form, or a plan that XNNPACK cannot hold.
            MissingExtra: executorch is not installed.
        """
        del profile
        if not isinstance(model.network, TorchNetwork):
            raise ExportError(
                f"{model.name} is no PyTorch network; ExecuTorch is made from one", "give the Python workload"
            )
        _refuse(model)
        progress("executorch: trace", 0, 2)
        program, written = _program(model)
        progress("executorch: lower for XNNPACK", 1, 2)
        lowered = pte_file.lower(program, model)
        (folder / "model.pte").write_bytes(lowered.content)
        return Artifact(
            main="model.pte",
            files=("model.pte",),
            precision=model.precision,
            inputs=tuple(Port(name=s.name, key=f"input_{i}", dtype=s.dtype) for i, s in enumerate(model.inputs)),
            outputs=tuple(Port(name=s.name, key=f"output_{i}", dtype=s.dtype) for i, s in enumerate(model.outputs)),
            batch=1,
            operators=lowered.operators,
            requires={"executorch": ">=1.5"},
            notes=(lowered.note(), *_notes(written)),
        )


def _refuse(model: Model) -> None:
    scheme = model.plan.scheme if model.plan else ""
    if scheme == "weight-only":
        raise ExportError(
            f"{model.name} is planned with integer weights and float activations, for which XNNPACK has no kernels",
            'quantize with activations = "dynamic"',
        )
    if scheme == "float16":
        raise ExportError(
            f"{model.name} is planned as 16-bit floats, which this target does not write",
            "export with --precision fp32, or quantize to int8",
        )


def _notes(written: Written) -> tuple[str, ...]:
    told = {
        f"{written.layers} of {written.total} convolutions and linear layers run as integer kernels": written.layers,
        f"{written.narrow} weights are stored in 4 bits": written.narrow,
        f"{written.widened} weights of 4 bits are stored in 8: XNNPACK has 4-bit kernels for linear layers "
        "of even width": written.widened,
        f"{written.grouped} weights have their scales rounded to bfloat16, as XNNPACK keeps those of groups": (
            written.grouped
        ),
        f"activation ranges: {written.integers} from the plan": written.integers,
    }
    return tuple(note for note, holds in told.items() if holds)


def _program(model: Model) -> tuple[torch.export.ExportedProgram, Written]:
    """Return the network with its plan as a program of batch 1."""
    if model.data is None:
        raise UsageError(f"{model.name} has no data", "give --data file.py:function or data.npz")
    with extra("executorch"):
        import torch
    one = model.data.calibration.head(1).inputs
    example = tuple(torch.as_tensor(one[spec.name]) for spec in model.inputs)
    module = traced(model).module(check_guards=False)
    names = {s.name: node.name for s, node in zip(model.inputs, module.graph.find_nodes(op="placeholder"), strict=True)}
    gone = xnnpack_forms.rewrite(module.graph)
    renamed = {public: node for public, node in names.items() if public != node}
    written = xnnpack_graph.Written()
    if model.plan:
        written = xnnpack_graph.write(module, model.plan, {**gone, **renamed})
    module.graph.lint()
    module.recompile()
    try:
        with silence():
            return torch.export.export(module, example), written
    except REFUSALS as error:
        raise refused(model, "ExecuTorch", error) from error


PLUGIN: Exporter = ExecutorchExporter()
