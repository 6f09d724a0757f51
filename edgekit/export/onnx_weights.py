"""Puts a plan's integers in the place of an ONNX graph's float weights. Knows no activation and no target."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from edgekit import grid
from edgekit.errors import ExportError
from edgekit.model import TorchNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx

    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan, WeightRule
    from edgekit.tensors import Array

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BLOCK_OPSET = 21
"""The first opset with 4-bit integers and with scales for blocks."""


@dataclass
class Weights:
    """The graph's constants by name, and what is added to them; nodes that turn integers to floats come first."""

    proto: onnx.ModelProto
    stored: dict[str, onnx.TensorProto] = field(init=False)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stored = {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def array(self, name: str) -> Array:
        """Return a constant."""
        from onnx import numpy_helper

        found: Array = numpy_helper.to_array(self.stored[name])
        return found

    def add(self, name: str, array: Array) -> str:
        """Add a constant, if it is not there; return its name."""
        from onnx import numpy_helper

        if name not in self.stored:
            self.stored[name] = self.proto.graph.initializer.add()
            self.stored[name].CopyFrom(numpy_helper.from_array(array, name))
        return name

    def drop_unused(self) -> None:
        """Remove constants that no node reads any more."""
        graph = self.proto.graph
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        # control flow reads names of its surroundings
        nested = any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute)
        kept = [tensor for tensor in graph.initializer if nested or tensor.name in used]
        copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)


@dataclass(frozen=True)
class Planned:
    """A node whose weight the plan names: the constant as it lies in the file, and the rule turned to its axes."""

    node: onnx.NodeProto
    name: str
    weight: str
    rule: WeightRule
    values: Array

    def integers(self) -> tuple[Array, Array, Array]:
        """Return the integers in the weight's shape, and scales and zero points [channels or 1, groups]."""
        return (
            grid.quantized(self.values, self.rule),
            grid.scales_of(self.values, self.rule),
            grid.zeros_of(self.values, self.rule),
        )


def planned_nodes(weights: Weights, model: Model, plan: QuantizationPlan) -> list[Planned]:
    """Return every node whose weight the plan names, in the order of the graph.

    A weight that the exporter renamed (as a transposed copy) is known by its values.

    Raises:
        ExportError: the plan names a weight that no node of the graph uses.
    """
    nodes = [n for n in weights.proto.graph.node if n.op_type in WEIGHTED and len(n.input) > 1]
    taken = {n.input[1] for n in nodes} & plan.weights.keys()
    lost = {name: p for name, p in _parameters(model).items() if name in plan.weights and name not in taken}
    found = []
    if lost:
        _turn(weights, nodes)
    for node in nodes:
        value = node.input[1]
        if value in plan.weights and value in weights.stored:
            found.append(Planned(node, value, value, plan.weights[value], weights.array(value)))
        elif value in weights.stored and lost:
            found += _by_content(node, weights.array(value), lost, plan)
    for name in sorted(plan.weights.keys() - {item.name for item in found}):
        raise ExportError(f"the plan quantizes {name!r}, which no ONNX node uses", "leave it out in the recipe")
    return found


def _turn(weights: Weights, nodes: list[onnx.NodeProto]) -> None:
    """Let products read turned constants where the graph turns them, as it does with a table that is read elsewhere."""
    import numpy as np
    from onnx import helper

    turns = {
        n.output[0]: n for n in weights.proto.graph.node if n.op_type == "Transpose" and n.input[0] in weights.stored
    }
    for node in nodes:
        turn = turns.get(node.input[1])
        if turn is not None:
            order = next((helper.get_attribute_value(a) for a in turn.attribute if a.name == "perm"), None)
            turned = np.ascontiguousarray(weights.array(turn.input[0]).transpose(order))
            node.input[1] = weights.add(f"{turn.input[0]}_turned", turned)
    read = {name for node in weights.proto.graph.node for name in node.input}
    for made, turn in turns.items():
        if made not in read:
            weights.proto.graph.node.remove(turn)


def _parameters(model: Model) -> dict[str, Array]:
    if not isinstance(model.network, TorchNetwork):
        return {}
    return {name: p.detach().numpy() for name, p in model.network.module.named_parameters(remove_duplicate=False)}


def _by_content(
    node: onnx.NodeProto, values: Array, parameters: Mapping[str, Array], plan: QuantizationPlan
) -> list[Planned]:
    import numpy as np

    for name, parameter in parameters.items():
        rule = plan.weights[name]
        if np.array_equal(values, parameter):
            return [Planned(node, name, node.input[1], rule, values)]
        if np.array_equal(values, parameter.T):
            turned = msgspec.structs.replace(rule, axis=values.ndim - 1 - rule.axis % values.ndim)
            return [Planned(node, name, node.input[1], turned, values)]
    return []


def store(weights: Weights, item: Planned, *, packed: bool = False) -> None:
    """Let a node read its weight through DequantizeLinear from integers of 8 bits, for engines to fuse.

    ``packed``: integers of up to 4 bits lie in 4 and are cast to 8, which ONNX Runtime computes once, when it loads
    the file; then it finds the same integers to fuse. Those with scales a group stay in 8: no integer kernel is theirs.
    Groups lie on the axis of the inputs; those of a convolution run through its kernel, so it is stored as a matrix.

    Raises:
        ExportError: groups that lie on no axis.
    """
    narrow = packed and item.rule.granularity != "group"
    _store(weights, item, storage(item.rule, packed=narrow), is_folded=False, is_widened=narrow and item.rule.bits <= 4)


def pack(weights: Weights, item: Planned) -> None:
    """Let a node read its weight from integers of 4 or 8 bits, turned to floats when the file is loaded.

    ONNX Runtime keeps a DequantizeLinear, for a kernel to fuse, and computes it again for every input (3 times slower
    on a convolutional network); a cast and a product of constants it computes once. It does have a kernel for
    MatMul with scales a group (MatMulNBits), made from DequantizeLinear.
    """
    _store(weights, item, storage(item.rule, packed=True), is_folded=not has_block_kernel(item))


def has_block_kernel(item: Planned) -> bool:
    """Say whether ONNX Runtime multiplies by the integers of groups as they lie there (MatMulNBits)."""
    is_matrix = item.node.op_type == "MatMul" and item.values.ndim == 2
    return is_matrix and item.rule.granularity == "group" and item.rule.bits <= 4


def as_product(weights: Weights, item: Planned) -> tuple[Planned, list[onnx.NodeProto]]:
    """Return a Gemm with scales a group as MatMul, and the Add of its bias: only MatMul has a kernel for 4-bit groups.

    Anything else comes back as it is. The nodes go into the graph in the place of the old one.
    """
    import numpy as np
    from onnx import helper

    node = item.node
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = not given.get("transA") and given.get("alpha", 1.0) == 1 and given.get("beta", 1.0) == 1
    shared = sum(item.weight in other.input for other in weights.proto.graph.node) > 1
    if node.op_type != "Gemm" or item.rule.granularity != "group" or item.rule.bits > 4 or not plain or shared:
        return item, [node]
    values, rule = item.values, item.rule
    if given.get("transB"):
        values, rule = np.ascontiguousarray(values.T), msgspec.structs.replace(rule, axis=1 - rule.axis % 2)
    out, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
    summed = f"{out}_product" if bias else out
    product = helper.make_node("MatMul", [node.input[0], item.weight], [summed], node.name)
    sums = [helper.make_node("Add", [summed, bias], [out], f"{node.name}_bias")] if bias else []
    return replace(item, node=product, rule=rule, values=values), [product, *sums]


def _store(weights: Weights, item: Planned, kind: np.dtype[Any], *, is_folded: bool, is_widened: bool = False) -> None:
    name, shape, made = item.weight, item.values.shape, f"{item.weight}_dequantized"
    if made not in {node.output[0] for node in weights.nodes}:
        cut = _layout(item)
        wide = storage(item.rule, packed=False) if is_widened else kind
        parts = [
            weights.add(f"{name}_quantized", cut.integers.astype(kind)),
            weights.add(f"{name}_scale", cut.scales),
            weights.add(f"{name}_zero_point", cut.zeros.astype(wide)),
        ]
        if is_widened:
            parts[0] = _widened(weights, parts[0], f"{name}_widened", wide)
        flat = cut.integers.shape != shape
        first = f"{made}_matrix" if flat else made
        weights.nodes += _folded(weights, parts, first, cut) if is_folded else _dequantized(parts, first, cut)
        if flat:
            weights.nodes += _reshaped(weights, first, made, shape)
    item.node.input[1] = made


class Layout(NamedTuple):
    """Integers as they are stored, with scales and zero points as DequantizeLinear wants them."""

    integers: Array
    scales: Array
    zeros: Array
    axis: int | None = None
    group: int = 0


def _layout(item: Planned) -> Layout:
    """Return how a weight is stored.

    Raises:
        ExportError: groups that lie on no axis.
    """
    import numpy as np

    integers, scales, zeros = item.integers()
    axis = item.rule.axis % integers.ndim
    if item.rule.granularity == "tensor":
        return Layout(integers, scales.reshape(()), zeros.reshape(()))
    if item.rule.granularity == "channel":
        return Layout(integers, scales.reshape(-1), zeros.reshape(-1), axis)
    if integers.ndim == 2 and axis == 1:
        return Layout(integers, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T), 0, item.rule.group)
    if axis != 0:
        raise ExportError(
            f"{item.name!r} has groups that lie on no axis of its {integers.ndim}, which ONNX cannot hold",
            'use granularity = "channel" for transposed convolutions',
        )
    return Layout(integers.reshape(len(integers), -1), scales, zeros, 1, item.rule.group)


def _widened(weights: Weights, source: str, made: str, kind: np.dtype[Any]) -> str:
    from onnx import helper

    to = helper.np_dtype_to_tensor_dtype(kind)
    weights.nodes.append(helper.make_node("Cast", [source], [made], f"{made}_node", to=to))
    return made


def _dequantized(parts: list[str], made: str, cut: Layout) -> list[onnx.NodeProto]:
    from onnx import helper

    attributes = {"axis": cut.axis, "block_size": cut.group or None}
    given = {key: value for key, value in attributes.items() if value is not None}
    return [helper.make_node("DequantizeLinear", parts, [made], f"{made}_node", **given)]


def _folded(weights: Weights, parts: list[str], made: str, cut: Layout) -> list[onnx.NodeProto]:
    """Cast integers and zero points to floats, spread scales over the values, subtract and multiply."""
    import numpy as np
    from onnx import TensorProto, helper

    def spread(name: str) -> str:
        if cut.axis is None:
            return name
        if cut.group:
            blocks = np.arange(cut.integers.shape[cut.axis], dtype=np.int64) // cut.group
            picked = weights.add(f"{made}_blocks", blocks)
            nodes.append(helper.make_node("Gather", [name, picked], [f"{name}_spread"], axis=cut.axis))
        else:
            shape = np.array([-1 if n == cut.axis else 1 for n in range(cut.integers.ndim)], np.int64)
            sized = weights.add(f"{made}_sizes", shape)
            nodes.append(helper.make_node("Reshape", [name, sized], [f"{name}_spread"]))
        return f"{name}_spread"

    def as_float(name: str) -> str:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT))
        return f"{name}_float"

    nodes: list[onnx.NodeProto] = []
    value = as_float(parts[0])
    if cut.zeros.any():
        nodes.append(helper.make_node("Sub", [value, spread(as_float(parts[2]))], [f"{made}_centred"]))
        value = f"{made}_centred"
    nodes.append(helper.make_node("Mul", [value, spread(parts[1])], [made]))
    return nodes


def storage(rule: WeightRule, *, packed: bool) -> np.dtype[Any]:
    """Return the NumPy type that a rule's integers are stored as; zero points make it unsigned."""
    import ml_dtypes
    import numpy as np

    if packed and rule.bits <= 4:
        narrow: np.dtype[Any] = np.dtype(ml_dtypes.uint4 if rule.zeros else ml_dtypes.int4)
        return narrow
    return np.dtype(np.uint8 if rule.zeros else np.int8)


def _reshaped(weights: Weights, source: str, target: str, shape: tuple[int, ...]) -> list[onnx.NodeProto]:
    import numpy as np
    from onnx import helper

    size = weights.add(f"{target}_shape", np.array(shape, np.int64))
    return [helper.make_node("Reshape", [source, size], [target], f"{target}_node")]


def replace_nodes(proto: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Put nodes in the place of the graph's; they may be among them."""
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
