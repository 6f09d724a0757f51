"""Names the layer at which a file that failed its parity check begins to compute something else.

The network is exported once more with the result of every layer as an output besides; the first of them, in the order
of the graph, that lies further from the float network than the limit is the one. Costs one export, and only then.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit import onnx_io, plugins
from edgekit.errors import EdgekitError
from edgekit.export import parity
from edgekit.export.golden import reference_of
from edgekit.export.onnx_weights import WEIGHTED
from edgekit.export.qdq import CLAMPS
from edgekit.model import Model, OnnxNetwork, TorchNetwork
from edgekit.progress import silent
from edgekit.tensors import DYNAMIC, TensorSpec
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx
    import torch

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.targets import Artifact, Exporter
    from edgekit.manifest import Variant

SAMPLES = 8
PROBE = "probe_"
CLAMPING = ("relu", "relu6", "hardtanh", "clamp")
"""What engines fuse into the layer before: its result is looked at behind it."""


@dataclass(frozen=True)
class Broken:
    """The layer by its module's path or its node, how near it is, and the one before it, which still holds."""

    layer: str
    sqnr_db: float
    before: str = ""
    before_db: float = 0.0

    def __str__(self) -> str:
        before = f", after {self.before_db:.1f} dB at {self.before!r}" if self.before else ""
        return f"it breaks first at {self.layer!r}: {self.sqnr_db:.1f} dB there{before}"


def first_broken(
    model: Model,
    profile: DeviceProfile,
    variant_of: Callable[[DeviceProfile, Artifact], Variant],
    limit_db: float,
) -> Broken | None:
    """Return the first layer below the limit; ``None`` where that cannot be told (no layers, or no such export)."""
    try:
        probed, names = _probed(model)
        if not names:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            found = _measured(probed, profile, variant_of, Path(scratch))
    except EdgekitError:
        return None
    last = ("", 0.0)
    for output, name in names.items():
        if found[output] < limit_db:
            return Broken(name, found[output], *last)
        last = (name, found[output])
    return None


def _measured(
    model: Model, profile: DeviceProfile, variant_of: Callable[[DeviceProfile, Artifact], Variant], scratch: Path
) -> dict[str, float]:
    """Export, run or evaluate, and return the SQNR of every output."""
    exporter = cast("Exporter", plugins.load("edgekit.export.targets", profile.format, "format"))
    (scratch / profile.name).mkdir()
    variant = variant_of(profile, exporter.export(model, profile, scratch / profile.name, silent))
    reference = reference_of(model, model.name, "1")
    outputs = parity.computed(exporter, variant, scratch, reference)
    return {
        name: parity.measure(replace(reference, outputs={name: want}, scores=None), outputs).sqnr_db
        for name, want in reference.outputs.items()
    }


def _probed(model: Model) -> tuple[Model, dict[str, str]]:
    """Return the model with its layers' results as outputs besides, and the layer of each such output, in order."""
    if model.data is not None:
        model = replace(model, data=replace(model.data, calibration=model.data.calibration.head(SAMPLES)))
    if isinstance(model.network, TorchNetwork):
        return _torch(model, model.network)
    if isinstance(model.network, OnnxNetwork):
        return _onnx(model, model.network)
    return model, {}


def _torch(model: Model, network: TorchNetwork) -> tuple[Model, dict[str, str]]:
    import torch

    module = trace(model).module(check_guards=False)
    layers = dict(_layers(module.graph))
    chosen = torch.fx.Graph()
    copied: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            shown = [copied[one] for one in node.all_input_nodes]
            chosen.output((*shown, *(copied[one] for one in layers)))
        elif not (node.op == "call_module" and not node.users):  # guards of torch.export, if there are any
            copied[node] = chosen.node_copy(node, lambda one: copied[one])
    names = {f"{PROBE}{number}": name for number, name in enumerate(layers.values())}
    specs = tuple(
        TensorSpec(output, "float32", (DYNAMIC, *map(int, node.meta["val"].shape[1:])))
        for output, node in zip(names, layers, strict=True)
    )
    made = torch.fx.GraphModule(module, chosen).eval()
    probed = replace(network, module=made, output_names=(*network.output_names, *names))
    return replace(model, network=probed, outputs=(*model.outputs, *specs), task="tensor"), names


def _layers(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, str]]:
    """Give the node that holds each layer's result, and the path of its module."""
    shown = set(graph.output_node().all_input_nodes)
    for node in graph.nodes:
        weights = [one for one in node.all_input_nodes if one.op == "get_attr"]
        if node.op != "call_function" or not weights or not _is_batch(node):
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        users = list(node.users)
        end = users[0] if len(users) == 1 and _operator(users[0]) in CLAMPING else node
        if end not in shown:
            yield end, (stack[-1][0] if stack and stack[-1][0] else node.name)


def _operator(node: torch.fx.Node) -> str:
    """Return ``relu`` of ``aten.relu.default``."""
    return str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")


def _is_batch(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    shape = tuple(getattr(value, "shape", ()))
    if value is None or len(shape) < 2 or not value.dtype.is_floating_point:
        return False
    return not isinstance(shape[0], int) and all(isinstance(n, int) for n in shape[1:])


def _onnx(model: Model, network: OnnxNetwork) -> tuple[Model, dict[str, str]]:
    proto = network.proto()
    onnx_io.infer_shapes(proto)
    shapes = {value.name: value for value in proto.graph.value_info}
    ends = [end for end in _ends(proto.graph) if end in shapes]
    proto.graph.output.extend(shapes[end] for end in ends)
    specs = tuple(
        TensorSpec(end, "float32", (DYNAMIC, *(d.dim_value for d in shapes[end].type.tensor_type.shape.dim[1:])))
        for end in ends
    )
    made = replace(network, content=onnx_io.one_piece(proto))
    return replace(model, network=made, outputs=(*model.outputs, *specs), task="tensor"), {end: end for end in ends}


def _ends(graph: onnx.GraphProto) -> Iterator[str]:
    shown = {value.name for value in graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type in WEIGHTED:
            after = readers.get(node.output[0], [])
            end = after[0].output[0] if len(after) == 1 and after[0].op_type in CLAMPS else node.output[0]
            if end not in shown:
                yield end
