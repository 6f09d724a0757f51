"""Which values of a traced graph XNNPACK keeps as integers, and by which ranges. Changes no graph.

Its integer kernels take integers and give integers. So a value is rounded where one of them makes or takes it, and only
there: between two operators that compute in float, a pair of roundings would cost time and gain nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import ExportError
from edgekit.export.refusal import module_path
from edgekit.export.xnnpack_forms import argument, is_float, is_mean_of_pictures, operator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import fx

    from edgekit.plan import QuantizationPlan, Range

WEIGHTED = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
CLAMPS = ("relu", "relu6", "hardtanh")
MOVING = (
    "max_pool2d", "view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "slice", "select", "contiguous", "clone", *CLAMPS,
)  # fmt: skip
"""What only moves or clamps integers: XNNPACK wants one scale on both sides of it."""

PAIRS = ("add", "sub", "mul")
PADS = ("pad", "constant_pad_nd")


def planned(graph: fx.Graph, plan: QuantizationPlan) -> Iterator[tuple[fx.Node, str]]:
    """Give each node that multiplies with a weight of the plan, and the weight's name.

    Raises:
        ExportError: the plan names a weight that no such node uses.
    """
    found = [(node, name) for node in graph.nodes if (name := _weight(node)) in plan.weights and node.users]
    for name in sorted(plan.weights.keys() - {name for _, name in found}):
        raise ExportError(f"the plan quantizes {name!r}, which no operator uses", "leave it out in the recipe")
    yield from found


def ranges(graph: fx.Graph, plan: QuantizationPlan, names: Mapping[str, str]) -> dict[fx.Node, Range]:
    """Return the range of each value that is to be integers, in the order of the graph.

    ``names`` says what a name of the plan is called in the graph, where it differs.

    Raises:
        ExportError: a planned layer without the range of its input or output, which its integer kernel needs.
    """
    known = _by_node(plan, names)
    layers = {node for node, _ in planned(graph, plan)}
    found: dict[fx.Node, Range] = {}
    for node in graph.nodes:
        is_value = is_float(node) and node.op in ("placeholder", "call_function")
        if not is_value or is_fused_away(node, layers) or is_joined_pad(node, layers):
            continue
        own, moved = known.get(node.name), argument(node, 0)
        if operator(node) in MOVING and moved in found:
            found[node] = found[moved]
        elif own is not None and _meets_kernel(node, layers):
            found[node] = own
    _refuse_lacking(layers, found, plan)
    return found


def is_fused_away(node: fx.Node, layers: set[fx.Node]) -> bool:
    """Say whether XNNPACK never makes this value, because it computes the clamp that follows along with it."""
    after = next(iter(node.users)) if len(node.users) == 1 else None
    if after is None or operator(after) not in CLAMPS:
        return False
    return node in layers or (operator(node) == "add" and operator(after) == "relu" and _is_pair(node))


def is_joined_pad(node: fx.Node, layers: set[fx.Node]) -> bool:
    """Say whether a node puts zeros around pictures for one planned convolution: XNNPACK does that to the integers."""
    if operator(node) not in PADS or not set(node.users) <= layers or len(node.users) != 1:
        return False
    reader, amounts = next(iter(node.users)), argument(node, 1)
    spatial = 2 * (argument(node, 0).meta["val"].dim() - 2)
    zeros = not argument(node, 2) or argument(node, 2) == "constant"
    is_plain = zeros and not argument(node, 3) and not node.kwargs and min(amounts) >= 0 and not any(amounts[spatial:])
    return is_plain and operator(reader) in ("conv1d", "conv2d") and argument(reader, 0) is node


def source(layer: fx.Node, layers: set[fx.Node]) -> fx.Node:
    """Return the node whose integers a planned layer reads."""
    given: fx.Node = argument(layer, 0)
    return argument(given, 0) if is_joined_pad(given, layers) else given


def _weight(node: fx.Node) -> str:
    weight = argument(node, 1) if operator(node) in WEIGHTED else None
    return str(weight.target) if weight is not None and weight.op == "get_attr" else ""


def _by_node(plan: QuantizationPlan, names: Mapping[str, str]) -> dict[str, Range]:
    """Return the plan's ranges by the graph's names; a node's own comes before that of one which left."""
    own = {name: limits for name, limits in plan.activations.items() if name not in names}
    renamed = {}
    for name in plan.activations.keys() & names.keys():
        place = names[name]
        while place in names:
            place = names[place]
        renamed[place] = plan.activations[name]
    return {**renamed, **own}


def _meets_kernel(node: fx.Node, layers: set[fx.Node]) -> bool:
    """Say whether an integer kernel makes or takes the value of this node."""
    is_end = operator(node) in CLAMPS and is_fused_away(argument(node, 0), layers)
    return is_end or _has_kernel(node, layers) or any(_has_kernel(user, layers) for user in node.users)


def _has_kernel(node: fx.Node, layers: set[fx.Node]) -> bool:
    is_kernel = node in layers or _is_pair(node) or is_mean_of_pictures(node) or operator(node) == "cat"
    return is_kernel or is_joined_pad(node, layers)


def _is_pair(node: fx.Node) -> bool:
    """Say whether a node adds, subtracts or multiplies two values that were computed."""
    inputs = [one for one in node.args[:2] if one in node.all_input_nodes]
    constant = any(one.op == "get_attr" for one in node.all_input_nodes)
    return operator(node) in PAIRS and len(inputs) == 2 and not constant and not node.kwargs.get("alpha")


def _refuse_lacking(layers: set[fx.Node], found: Mapping[fx.Node, Range], plan: QuantizationPlan) -> None:
    for node in layers:
        end = next(iter(node.users)) if is_fused_away(node, layers) else node
        side = "input" if source(node, layers) not in found else "output" if end not in found else ""
        if side:
            way = 'cover = "all", or ' if plan.cover == "inputs" else ""
            raise ExportError(
                f"{module_path(node)} ({operator(node)}) has no range for its {side}; XNNPACK's static kernels take "
                "integers and give integers",
                f'quantize with {way}activations = "dynamic", or leave its weight out with keep',
            )
