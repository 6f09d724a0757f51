"""Writes a model as one ONNX file by the scheme of its plan, and describes the file. Knows no target."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edgekit import onnx_io
from edgekit.errors import ExportError
from edgekit.export import elsewhere, kernels, onnx_dynamic, qdq
from edgekit.export.onnx_file import Graph, float_graph, save
from edgekit.export.onnx_weights import BLOCK_OPSET, Planned, Weights, as_product, pack, planned_nodes, replace_nodes
from edgekit.export.quiet import silence
from edgekit.export.targets import Artifact
from edgekit.manifest import Port
from edgekit.model import OnnxNetwork
from edgekit.plugins import extra
from edgekit.runtime.backends import SUMS, SUMS_CHECKED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.qdq import Scheme
    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress


def write_artifact(model: Model, profile: DeviceProfile, path: Path, *, scheme: Scheme, progress: Progress) -> Artifact:
    """Write the model as ONNX, as its plan says, and describe the file."""
    least = _least_opset(model.plan, scheme)
    graph = float_graph(model, max(int(profile.options.get("opset", 20)), least))
    if model.plan and isinstance(model.network, OnnxNetwork):
        graph = _raised(graph, max(13, least))
    proto, notes = _lowered(graph, model, scheme, profile=profile, progress=progress)
    if elsewhere.looks_at_sums(profile):  # and refuses what does not fit: no engine needs to widen them
        proto.metadata_props.add(key=SUMS, value=SUMS_CHECKED)
    operators = Counter(node.op_type for node in proto.graph.node)
    notes = (*notes, *_newer(proto, profile, model))
    opset = max(o.version for o in proto.opset_import if not o.domain)
    files = save(proto, path)
    if model.plan and scheme.onnxruntime and model.plan.scheme != "float16":
        planned = {item.weight: item for item in planned_nodes(Weights(graph.proto), model, model.plan)}
        notes = (*notes, *_kernel_notes(path, model, planned, profile))
    return Artifact(
        main=path.name,
        files=files,
        precision=model.precision,
        inputs=tuple(Port(name=s.name, key=s.name, dtype=s.dtype) for s in model.inputs),
        outputs=tuple(Port(name=s.name, key=s.name, dtype=s.dtype) for s in model.outputs),
        batch=graph.batch,
        operators=operators,
        notes=notes,
        requires={"onnxruntime": ">=1.20", "opset": str(opset)},
    )


def _newer(proto: onnx.ModelProto, profile: DeviceProfile, model: Model) -> tuple[str, ...]:
    """Refuse a newer opset than the profile asks for, which its engine may not read; a file's own is only told."""
    written = max(opset.version for opset in proto.opset_import if not opset.domain)
    asked = int(profile.options.get("opset", written))
    if written <= asked:
        return ()
    if isinstance(model.network, OnnxNetwork):
        return (f"the .onnx file has opset {written}, {profile.name} asks for {asked}: its engine has to read that",)
    raise ExportError(
        f"{profile.name} asks for opset {asked}, and {model.precision} needs {written}",
        f"set options.opset to {written} in a profile of your own, if its engine reads that, or quantize to 8 bits with"
        " one scale a channel",
    )


def _kernel_notes(path: Path, model: Model, planned: Mapping[str, Planned], profile: DeviceProfile) -> tuple[str, ...]:
    """Say what ONNX Runtime computes in integers, and stop where a plan asks for that in vain."""
    found = kernels.found_in(path, planned, has_signed=profile.arch != "x86_64")
    if model.plan is not None and model.plan.scheme == "weight-only":
        return (found.note(),) if found.integer else ()
    kernels.refuse_floats(found, model.name, planned)
    left = ", ".join(f"{planned[weight].name} ({operator})" for weight, _, operator in found.floats)
    return (found.note() + (f"; there is none for {left}" if left else ""),)


def _least_opset(plan: QuantizationPlan | None, scheme: Scheme) -> int:
    if plan is None:
        return 0
    can_pack = plan.scheme == "weight-only" or (plan.scheme == "static" and scheme.onnxruntime)
    packs = can_pack and any(rule.bits <= 4 for rule in plan.weights.values())
    return BLOCK_OPSET if packs or any(r.granularity == "group" for r in plan.weights.values()) else 13


def _raised(graph: Graph, opset: int) -> Graph:
    """Return the graph in an opset that has the operators of quantization."""
    import onnx

    if next(o.version for o in graph.proto.opset_import if not o.domain) >= opset:
        return graph
    try:
        with silence(), onnx_io.light(graph.proto) as weights:
            raised = onnx.version_converter.convert_version(graph.proto, opset)
        onnx_io.give_back(raised, weights)
        return Graph(raised, graph.values)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise ExportError(
            f"the ONNX file cannot be brought to opset {opset}: {error}", "write it anew with a newer opset"
        ) from error


def _lowered(
    graph: Graph, model: Model, scheme: Scheme, *, profile: DeviceProfile, progress: Progress
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    plan = model.plan
    if plan is None:
        return graph.proto, ()
    if plan.scheme == "float16":
        told = "weights and arithmetic are 16-bit floats; inputs and outputs stay 32-bit"
        return _half(graph.proto), (told, *_slow(profile))
    if plan.scheme == "weight-only":
        return _weight_only(graph, model, plan), ("weights are integers in the file; the engine computes in float",)
    if plan.scheme == "dynamic":
        return onnx_dynamic.quantize(graph, model, plan)
    proto, note = qdq.quantize(graph, model, scheme, progress)
    return proto, (note, *_width_note(plan, scheme))


def _slow(profile: DeviceProfile) -> tuple[str, ...]:
    """Warn of processors that have no arithmetic for halves: the file is half as large, and slower."""
    if profile.arch != "x86_64":
        return ()
    return ("ONNX Runtime computes halves in float on x86: EfficientNet-Lite0 takes 22 % longer than in fp32 there",)


def _width_note(plan: QuantizationPlan, scheme: Scheme) -> tuple[str, ...]:
    """Tell how weights of other widths than the kernels' lie in the file."""
    single = {name: rule.bits for name, rule in plan.weights.items() if rule.granularity != "group"}
    packed = [name for name, bits in single.items() if bits <= 4 and scheme.onnxruntime]
    wider = [name for name, bits in single.items() if bits < 7 and name not in packed]
    told = {
        f"{len(packed)} weights are stored in 4 bits and widened to the integer kernels' 8 at load": packed,
        f"{len(wider)} weights of fewer than 8 bits are stored in 8, as the integer kernels take them": wider,
        f"{len(plan.weights) - len(single)} weights have a scale a group: they are multiplied in float": (
            len(plan.weights) > len(single)
        ),
    }
    return tuple(note for note, holds in told.items() if holds)


def _weight_only(graph: Graph, model: Model, plan: QuantizationPlan) -> onnx.ModelProto:
    proto = type(graph.proto)()
    proto.CopyFrom(graph.proto)
    weights = Weights(proto)
    items = {item.node.output[0]: item for item in planned_nodes(weights, model, plan)}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        item = items.get(node.output[0])
        if item is None:
            nodes.append(node)
            continue
        item, own = as_product(weights, item)
        pack(weights, item)
        nodes += own
    replace_nodes(proto, [*weights.nodes, *nodes])
    weights.drop_unused()
    return proto


def _half(proto: onnx.ModelProto) -> onnx.ModelProto:
    with extra("export"):
        from onnxruntime.transformers.float16 import convert_float_to_float16
    onnx_io.infer_shapes(proto)
    with silence():
        made: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True)
    return made
