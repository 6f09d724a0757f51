"""Core ML programs: float16 compute, a plan as integer weights. Computed here by reading the package back.

The quantized activations of Core ML can only be made on macOS, so the plan's activation ranges stay unused.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError, UsageError
from edgekit.export import coreml_weights, mil
from edgekit.export.coreml_forms import FIRST_IOS, Table
from edgekit.export.quiet import silence
from edgekit.export.refusal import REFUSALS, refused
from edgekit.export.targets import Artifact, Exporter
from edgekit.manifest import Port
from edgekit.model import Model, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.coreml_forms import Form
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress
    from edgekit.tensors import Array, TensorSpec

PACKAGE = "model.mlpackage"
MACOS = {12: 15, 13: 16, 14: 17, 15: 18, 26: 26}
"""From a macOS to the iOS with the same operators."""
WORTH = 0.9
"""What a newer system has to take of the bytes for a note to tell of it."""


class CoremlExporter:
    """Writes the folder ``model.mlpackage``; its ``Manifest.json`` is the main file.

    Reads ``options.ios``, or ``options.macos`` where the hardware is a Mac: the oldest system that has to read it.
    """

    extra = "export"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the package for one hardware class.

        Raises:
            ExportError: no PyTorch network, an operator without a Core ML form, or groups that its blocks cannot hold.
            MissingExtra: coremltools is not installed.
        """
        del progress
        if not isinstance(model.network, TorchNetwork):
            raise ExportError(
                f"{model.name} is no PyTorch network; Core ML is made from one", "give the Python workload"
            )
        ios = _ios(profile, model.plan)
        system, version = _told(profile, ios).split()
        half = profile.options.get("precision") != "fp32" or model.precision == "fp16"
        graph = _graph(model, model.network)
        program, forms = coreml_weights.compress(_convert(model, graph, ios, half=half), model, graph, ios)
        _save(program, folder / PACKAGE)
        return Artifact(
            main=f"{PACKAGE}/Manifest.json",
            files=tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())),
            precision=model.precision if model.plan else ("fp16" if half else "fp32"),
            inputs=tuple(_port(spec) for spec in model.inputs),
            outputs=tuple(_port(spec) for spec in model.outputs),
            batch=1,
            requires={system.lower(): f">={version}"},
            operators=_operators(program),
            weights={name: form.told for name, (form, _) in forms.items()},
            notes=(*_plan_notes(model.plan, profile, ios), *_form_notes(list(forms.values()), profile)),
        )

    def evaluate(self, main: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the package's outputs from its bytes, sample by sample.

        Raises:
            NotImplementedError: it holds an operator that the interpreter lacks; names it.
        """
        return mil.run(main.parent, inputs)


def _ios(profile: DeviceProfile, plan: QuantizationPlan | None) -> int:
    """Return the iOS whose operators the program uses; that of a Mac is the iOS of the same year."""
    system, version = _asked(profile)
    asked = MACOS.get(version, 0) if system == "macOS" else version
    if asked not in MACOS.values():
        known = MACOS.keys() if system == "macOS" else MACOS.values()
        raise ExportError(
            f"Core ML programs are not written for {system} {version}, as {profile.name} asks",
            f"set options.{system.lower()} to one of {', '.join(map(str, known))}",
        )
    least = coreml_weights.least_ios(plan)
    if asked < FIRST_IOS <= least:
        raise ExportError(
            f"{profile.name} asks for {system} {version}, which reads no weights of fewer than 16 bits",
            f"these need {_told(profile, least)}: set options.{system.lower()}, or export with --precision fp32",
        )
    return max(asked, least)


def _asked(profile: DeviceProfile) -> tuple[str, int]:
    options = profile.options
    return ("macOS", int(options["macos"])) if "macos" in options else ("iOS", int(options.get("ios", 17)))


def _told(profile: DeviceProfile, ios: int) -> str:
    """Name an iOS as the profile names systems."""
    system, _ = _asked(profile)
    return f"{system} {ios}" if system == "iOS" else f"{system} {next(m for m, i in MACOS.items() if i == ios)}"


def _operators(program: Any) -> Counter[str]:  # noqa: ANN401  # coremltools is untyped
    main = program._mil_program.functions["main"]  # noqa: SLF001  # there is no other way to its operators
    return Counter(operator.op_type for operator in main.operations if operator.op_type != "const")


def _plan_notes(plan: QuantizationPlan | None, profile: DeviceProfile, ios: int) -> tuple[str, ...]:
    if plan is None or plan.scheme == "float16":
        return ()
    notes = ["activations stay float16: Core ML quantizes them on macOS only"] if plan.scheme != "weight-only" else []
    newest = coreml_weights.least_ios(plan) == ios > FIRST_IOS
    return (*notes, *([f"4-bit weights and scales a group need {_told(profile, ios)}"] if newest else []))


def _form_notes(forms: Sequence[tuple[Form, Form]], profile: DeviceProfile) -> tuple[str, ...]:
    """Tell how weights lie in the file, where that is more than integers or floats, and what a newer system saves."""
    told = Counter(form.told for form, _ in forms)
    notes = []
    if any(isinstance(form.stored, Table) or form.mask is not None for form, _ in forms):
        notes.append("weights are stored as " + ", ".join(f"{n} x {what}" for what, n in sorted(told.items())))
    size, least = sum(form.size for form, _ in forms), sum(best.size for _, best in forms)
    if least < WORTH * size:
        newer = _told(profile, max(best.ios for _, best in forms))
        notes.append(f"weights take {size:,} bytes; for {newer} they would take {least:,}")
    return tuple(notes)


def _graph(model: Model, network: TorchNetwork) -> torch.export.ExportedProgram:
    if model.data is None:
        raise UsageError(f"{model.name} has no data", "give --data file.py:function or data.npz")
    with extra("export"):
        import torch
    one = model.data.calibration.head(1).inputs
    example = tuple(torch.as_tensor(one[name]) for name in network.input_names)
    try:
        with silence():
            program = torch.export.export(network.module, example)
            graph: torch.export.ExportedProgram = program.run_decompositions(_recurrent())
            _skip_aliases(graph)
    except REFUSALS as error:
        raise refused(model, "Core ML", error) from error
    return graph


def _skip_aliases(program: torch.export.ExportedProgram) -> None:
    """Let who reads an alias read what it names: coremltools has no such operator."""
    import torch

    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _recurrent() -> dict[Any, Any]:
    """Return how recurrent layers are written out step by step; coremltools reads no torch.export graph with them."""
    import torch
    from torch._decomp import get_decompositions

    aten = torch.ops.aten
    return dict(get_decompositions([aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input]))


def _convert(model: Model, graph: torch.export.ExportedProgram, ios: int, *, half: bool) -> Any:  # noqa: ANN401  # coremltools is untyped
    with extra("export"), silence():
        import coremltools as ct
        from coremltools.converters.mil.converter import _reset_conversion_state
    _reset_conversion_state()  # a conversion that was refused leaves counters, which name what comes next
    try:
        with silence():
            return ct.convert(
                graph,
                inputs=[ct.TensorType(name=s.name, shape=(1, *s.shape[1:]), dtype=_dtype(s)) for s in model.inputs],
                outputs=[ct.TensorType(name=s.name, dtype=_dtype(s)) for s in model.outputs],
                minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                skip_model_load=True,
            )
    except REFUSALS as error:
        raise refused(model, "Core ML", error) from error


def _port(spec: TensorSpec) -> Port:
    stored = {"float32": "float32", "float16": "float16", "int32": "int32", "int64": "int32"}
    if spec.dtype not in stored:
        raise ExportError(f"{spec.name!r} is {spec.dtype}; Core ML takes floats and 32-bit integers", "cast it outside")
    return Port(name=spec.name, key=spec.name, dtype=stored[spec.dtype])


def _dtype(spec: TensorSpec) -> Any:  # noqa: ANN401  # a NumPy type
    import numpy as np

    return np.dtype(_port(spec).dtype).type


def _save(program: Any, package: Path) -> None:  # noqa: ANN401  # coremltools is untyped
    """Write the package without what differs between two runs: the date, random identifiers, a debug map."""
    with silence():
        program.save(str(package))
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    from coremltools.proto import Model_pb2

    path = package / "Data/com.apple.CoreML/model.mlmodel"
    spec = Model_pb2.Model.FromString(path.read_bytes())
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    path.write_bytes(spec.SerializeToString(deterministic=True))
    _name_items(package / "Manifest.json")


def _name_items(path: Path) -> None:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    entries = manifest["itemInfoEntries"]
    names = {key: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])) for key, entry in entries.items()}
    manifest["itemInfoEntries"] = {names[key]: entry for key, entry in entries.items()}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    path.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


PLUGIN: Exporter = CoremlExporter()
