"""Lowers a static plan into ONNX QuantizeLinear/DequantizeLinear pairs. Knows no target.

Integers of weights are those of the plan. Ranges come from the plan where the file has the value; the others are
measured on the calibration data, unless the plan covers the inputs of weights alone. What takes the fillers of masks
has no range and stays float.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import grid
from edgekit.errors import UsageError
from edgekit.export.onnx_file import Graph, save
from edgekit.export.onnx_weights import WEIGHTED, Planned, Weights, planned_nodes, replace_nodes, store
from edgekit.model import whole_batches
from edgekit.plan import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx

    from edgekit.model import Model, Split
    from edgekit.progress import Progress
    from edgekit.tensors import Array

SAME = (
    "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand", "Tile", "Identity",
    "DepthToSpace", "SpaceToDepth", "Split", "Gather", "Dropout",
)  # fmt: skip
"""Operators that only move values: engines drop the pairs around them if both sides have the same scale."""

ALL_INPUTS = ("MatMul", "Add", "Sub", "Mul", "Div", "Concat")
FIRST_INPUT = (
    "Conv", "ConvTranspose", "Gemm", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Softmax", "AveragePool",
    "GlobalAveragePool", "Resize", "Pad", *SAME,
)  # fmt: skip
SUMS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")
CLAMPS = ("Relu", "Clip")


@dataclass(frozen=True)
class Scheme:
    """How one hardware class wants its integers.

    ``onnxruntime``: no other engine reads the file. Weights of 4 bits are stored in 4, for they are widened at load,
    and layers that stay float are guarded: it makes integers, with one scale a tensor, of float weights behind a pair.
    """

    activations: str
    symmetric: bool
    quantize_bias: bool
    onnxruntime: bool = False


UNSIGNED = Scheme(activations="uint8", symmetric=False, quantize_bias=True, onnxruntime=True)
"""For ONNX Runtime on CPUs: only u8 activations fuse to integer kernels on x86 (7.6 against 21.1 ms)."""

SHIFTED = Scheme(activations="int8", symmetric=False, quantize_bias=True, onnxruntime=True)
"""For ONNX Runtime on ARM: with a zero point, so that rounding clamps at zero; symmetric, a ReLU keeps it in float."""

SIGNED = Scheme(activations="int8", symmetric=True, quantize_bias=False)
"""For TensorRT: it refuses zero points other than 0 and integer biases."""


def quantize(graph: Graph, model: Model, scheme: Scheme, progress: Progress) -> tuple[onnx.ModelProto, str]:
    """Return the graph with the model's plan lowered into it, and a note on where its ranges come from.

    Raises:
        ExportError: the plan names a weight that the graph lacks.
        UsageError: the model has no plan or no calibration data.
    """
    if model.plan is None or model.data is None:
        raise UsageError(f"{model.name} has no quantization plan", "compress it first: edgekit compress")
    proto = type(graph.proto)()
    proto.CopyFrom(graph.proto)
    weights = Weights(proto)
    items = planned_nodes(weights, model, model.plan)
    planned = {graph.values.get(name, name): r for name, r in model.plan.activations.items()}
    own = {item.node.output[0] for item in items}
    nodes = [n for n in proto.graph.node if n.op_type not in WEIGHTED or n.output[0] in own]
    wanted = _values(proto, nodes, weights)
    if model.plan.cover == "inputs":
        met = {item.node.input[0] for item in items} | planned.keys()
        wanted = [name for name in wanted if name in met]
    missing = [name for name in wanted if name not in planned]
    measured = measure(proto, missing, whole_batches(model, model.data.calibration), progress)
    ranges = {name: r for name, r in ((n, planned.get(n, measured.get(n))) for n in wanted) if r is not None}
    _share(nodes, ranges)
    for item in items:
        source = item.node.input[0]
        if scheme.quantize_bias and source in ranges and _has_bias(weights, item):
            input_scale = grid.activation_grid(ranges[source]).scale
            rule = grid.with_room(item.values, item.rule, weights.array(item.node.input[2]), input_scale)
            store(weights, replace(item, rule=rule), packed=scheme.onnxruntime)
            _store_bias(weights, item, input_scale)
        else:
            store(weights, item, packed=scheme.onnxruntime)
    _insert(weights, ranges, scheme)
    if scheme.onnxruntime:
        _guard_floats(weights)
    weights.drop_unused()
    mine = len(ranges.keys() & planned.keys())
    return proto, f"activation ranges: {mine} from the plan, {len(ranges) - mine} measured on the calibration data"


def _values(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], weights: Weights) -> list[str]:
    """List what quantized operators take and make, without what an engine fuses away or what is constant."""
    found: dict[str, None] = {}
    for node in nodes:
        if node.op_type in ALL_INPUTS:
            found |= dict.fromkeys(node.input)
        elif node.op_type in FIRST_INPUT:
            found |= dict.fromkeys(node.input[:1])
        else:
            continue
        found |= dict.fromkeys(node.output)
    skipped = fused_away(proto.graph) | weights.stored.keys() | {""}
    made = {v.name for v in proto.graph.input} | {name for node in proto.graph.node for name in node.output}
    return [name for name in found if name not in skipped and name in made]


def fused_away(graph: onnx.GraphProto) -> set[str]:
    """Name the values that engines never make, because they fuse the clamp that follows."""
    followers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            followers.setdefault(name, []).append(node.op_type)
    shown = {value.name for value in graph.output}
    return {
        name
        for node in graph.node
        if node.op_type in SUMS
        for name in node.output
        if name not in shown and len(followers.get(name, [])) == 1 and followers[name][0] in CLAMPS
    }


def _share(nodes: Iterable[onnx.NodeProto], ranges: dict[str, Range]) -> None:
    """Give what only moves values the range of what it moves."""
    for node in nodes:
        if node.op_type in SAME and node.input[0] in ranges:
            for name in node.output:
                if name in ranges:
                    ranges[name] = ranges[node.input[0]]


def _has_bias(weights: Weights, item: Planned) -> bool:
    node = item.node
    stored = len(node.input) > 2 and node.input[2] in weights.stored
    return stored and item.rule.granularity != "group" and weights.array(node.input[2]).ndim == 1


def _store_bias(weights: Weights, item: Planned, input_scale: float) -> None:
    """Store a bias as 32-bit integers, at the scale of the sums that it is added to."""
    import numpy as np
    from onnx import helper

    node = item.node
    bias = weights.array(node.input[2]).astype(np.float64)
    stored = weights.array(f"{item.weight}_scale").astype(np.float64)
    scale = np.broadcast_to(stored * input_scale, bias.shape).astype(np.float32)
    name = f"{node.output[0]}_bias"
    parts = [
        weights.add(f"{name}_quantized", np.round(bias / scale).astype(np.int32)),
        weights.add(f"{name}_scale", scale),
        weights.add(f"{name}_zero_point", np.zeros(bias.shape, np.int32)),
    ]
    weights.nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}_dequantized"], name, axis=0))
    node.input[2] = f"{name}_dequantized"


def _insert(weights: Weights, ranges: Mapping[str, Range], scheme: Scheme) -> None:
    """Put a pair behind each value that has a range; graph outputs keep their names."""
    proto = weights.proto
    shown = {value.name for value in proto.graph.output}
    nodes = list(weights.nodes)
    for value in proto.graph.input:
        if value.name in ranges:
            nodes += _pair(weights, value.name, f"{value.name}_dequantized", limits=ranges[value.name], scheme=scheme)
    for node in proto.graph.node:
        node.input[:] = [f"{n}_dequantized" if n in ranges and n not in shown else n for n in node.input]
        if not scheme.symmetric:  # TensorRT builds no network with a number in integers, and multiplies it anyway
            _quantize_numbers(weights, node, scheme, nodes)
        made = [name for name in node.output if name in ranges]
        node.output[:] = [f"{n}_float" if n in ranges and n in shown else n for n in node.output]
        nodes.append(node)
        for name in made:
            ends = (f"{name}_float", name) if name in shown else (name, f"{name}_dequantized")
            nodes += _pair(weights, *ends, limits=ranges[name], scheme=scheme)
    replace_nodes(proto, nodes)


def _guard_floats(weights: Weights) -> None:
    """Let layers with float weights read their input through a scale a channel, all of them the same.

    ONNX Runtime quantizes a float weight where the scale of the input is one number (its WeightBiasQuantization, since
    1.21), and leaves it alone otherwise. An input of a single channel has only one number to give.
    """
    from onnx import helper

    proto = weights.proto
    makers = {node.output[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        pair = makers.get(node.input[0]) if node.op_type in ("Conv", "ConvTranspose", "Gemm") else None
        if pair is not None and node.input[1] in weights.stored:
            channels = _channels(node, weights.array(node.input[1]).shape)
            made = f"{node.output[0]}_input"
            parts = [pair.input[0], *(_spread(weights, name, channels) for name in pair.input[1:3])]
            nodes.append(helper.make_node("DequantizeLinear", parts, [made], f"{made}_node", axis=1))
            node.input[0] = made
        nodes.append(node)
    replace_nodes(proto, nodes)


def _channels(node: onnx.NodeProto, shape: tuple[int, ...]) -> int:
    """Return how many channels a layer reads."""
    from onnx import helper

    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        return shape[1] * int(given.get("group", 1))
    return shape[1] if node.op_type == "Gemm" and given.get("transB") else shape[0]


def _spread(weights: Weights, name: str, channels: int) -> str:
    import numpy as np

    value = weights.array(name)
    return weights.add(f"{name}_of_{channels}", np.full(channels, value, value.dtype))


def _quantize_numbers(weights: Weights, node: onnx.NodeProto, scheme: Scheme, nodes: list[onnx.NodeProto]) -> None:
    """Let sums and products with one number compute in integers, too: one number is stored without loss."""
    import numpy as np
    from onnx import helper

    if node.op_type not in ("Add", "Mul"):
        return
    for place, name in enumerate(node.input):
        if name in weights.stored and weights.array(name).dtype == np.float32 and weights.array(name).size == 1:
            value = weights.array(name)
            if grid.is_masked(value):
                continue  # what its integer stands for may overflow, and 0 times infinity is NaN
            own = _grid(Range(float(value.min()), float(value.max())), scheme)
            parts = _constants(weights, name, own, scheme)
            integer = np.round(value / own.scale) + own.zero
            stored = weights.add(f"{name}_quantized", np.clip(integer, own.lowest, own.highest).astype(parts[2]))
            if f"{name}_dequantized" not in {n.output[0] for n in nodes}:
                made = f"{name}_dequantized"
                nodes.append(helper.make_node("DequantizeLinear", [stored, *parts[:2]], [made], made))
            node.input[place] = f"{name}_dequantized"


def _grid(limits: Range, scheme: Scheme) -> grid.ActivationGrid:
    found = grid.activation_grid(limits, symmetric=scheme.symmetric)
    if scheme.activations == "int8" and not scheme.symmetric:
        return found._replace(zero=found.zero - 128, lowest=found.lowest - 128, highest=found.highest - 128)
    return found


def _constants(weights: Weights, name: str, own: grid.ActivationGrid, scheme: Scheme) -> tuple[str, str, str]:
    import numpy as np

    kind = np.dtype(scheme.activations)
    scale = weights.add(f"{name}_scale", np.array(own.scale, np.float32))
    return scale, weights.add(f"{name}_zero_point", np.array(own.zero, kind)), scheme.activations


def _pair(weights: Weights, source: str, target: str, *, limits: Range, scheme: Scheme) -> list[onnx.NodeProto]:
    from onnx import helper

    scale, zero, _ = _constants(weights, source, _grid(limits, scheme), scheme)
    middle = f"{source}_quantized"
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [middle], middle),
        helper.make_node("DequantizeLinear", [middle, scale, zero], [target], f"{target}_node"),
    ]


def measure(
    proto: onnx.ModelProto, names: Iterable[str], samples: tuple[Split, int], progress: Progress
) -> dict[str, Range]:
    """Return the smallest and largest value that each named float tensor takes on samples, so many at once.

    Tensors that take fillers of masks (`grid.is_masked`) are left out.
    """
    import onnx
    import onnxruntime

    calibration, size = samples
    inputs = {v.name for v in proto.graph.input}
    found: dict[str, Range] = {}
    masked: set[str] = set()
    for name in names:
        if (
            name in inputs
            and calibration.inputs[name].dtype.kind == "f"
            and not grid.is_masked(calibration.inputs[name])
        ):
            found[name] = _wider(None, calibration.inputs[name])
    wanted = [n for n in names if n not in inputs]
    if not wanted:
        return found
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "watched.onnx")
        save(watched, path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for number, batch in enumerate(calibration.batches(size)):
        progress("calibrate", min((number + 1) * size, len(calibration)), len(calibration))
        for name, value in zip(wanted, session.run(wanted, dict(batch.inputs)), strict=True):
            if value.dtype.kind == "f" and value.size:
                found[name] = _wider(found.get(name), value)
                if grid.is_masked(value):
                    masked.add(name)
    return {name: limits for name, limits in found.items() if name not in masked}


def _wider(seen: Range | None, values: Array) -> Range:
    low, high = float(values.min()), float(values.max())
    return Range(min(seen.low, low), max(seen.high, high)) if seen else Range(low, high)
