"""Writes a plan into a traced graph: the quantize and dequantize nodes around which XNNPACK finds its integer kernels.

The numbers are the plan's own. A kernel is found only where each of its inputs comes from a dequantize node that
nothing else reads. Knows no file.
"""

from __future__ import annotations

import operator as python
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit import grid
from edgekit.errors import ExportError
from edgekit.export import xnnpack_values
from edgekit.export.refusal import module_path
from edgekit.export.xnnpack_forms import argument, operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import fx

    from edgekit.plan import QuantizationPlan, Range, WeightRule
    from edgekit.tensors import Array

LOWEST, HIGHEST = -128, 127
NARROW = (-8, 7)
"""By these limits XNNPACK knows that weights are to be stored in 4 bits."""
BLOCK = 32
"""Groups of weights have to be a multiple of this."""


@dataclass(frozen=True)
class Written:
    """What became of the plan.

    How many of all layers have integer kernels, how many weights are stored in 4 bits, how many in 8 although 4 were
    planned, how many have a scale a group, and how many activations are integers.
    """

    layers: int = 0
    total: int = 0
    narrow: int = 0
    widened: int = 0
    grouped: int = 0
    integers: int = 0


def write(module: fx.GraphModule, plan: QuantizationPlan, names: Mapping[str, str]) -> Written:
    """Change the module's graph by the plan; ``names`` says what the plan's names are called there.

    Raises:
        ExportError: a weight or a layer that XNNPACK has no integers for; names it.
    """
    _register()
    graph = module.graph
    layers = dict(xnnpack_values.planned(graph, plan))
    for node, name in layers.items():
        _refuse(node, name, plan)
    is_static = plan.scheme == "static"
    ranges = xnnpack_values.ranges(graph, plan, names) if is_static else {}
    grids = {node: _shifted(limits) for node, limits in ranges.items()}
    scales = {node: grids[xnnpack_values.source(node, set(layers))].scale for node in layers if is_static}
    told = [_store_weight(module, node, plan.weights[name], scales.get(node, 0.0)) for node, name in layers.items()]
    for node, own in grids.items():
        _round(graph, node, own, grids)
    if not is_static:
        for node in layers:
            _round_dynamically(graph, node)
    _drop_unused(module, set(layers.values()))
    graph.lint()
    module.recompile()
    rules = [plan.weights[name] for name in layers.values()]
    return Written(
        layers=len(layers),
        total=sum(operator(node) in xnnpack_values.WEIGHTED for node in graph.nodes),
        narrow=sum(bits == 4 for bits in told),
        widened=sum(rule.bits <= 4 < bits for rule, bits in zip(rules, told, strict=True)),
        grouped=sum(rule.granularity == "group" for rule in rules),
        integers=len(grids),
    )


def _register() -> None:
    """Make torch know the operators of quantization."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401  # defines them as it is imported


def _refuse(node: fx.Node, name: str, plan: QuantizationPlan) -> None:
    rule, kind = plan.weights[name], operator(node)
    if rule.zeros:
        raise ExportError(
            f"{name!r} has zero points; XNNPACK takes symmetric weights", "quantize with symmetric = true"
        )
    inputs = argument(node, 1).meta["val"].shape[-1]
    if rule.granularity == "group" and (
        kind != "linear" or rule.bits > 4 or plan.scheme == "static" or rule.group % BLOCK or inputs % rule.group
    ):
        raise ExportError(
            f"{name!r} ({kind}) has a scale for each {rule.group} inputs; XNNPACK has that for linear layers of 4 bits "
            f"with dynamic activations, in groups that are a multiple of {BLOCK} and divide the inputs",
            'quantize with granularity = "channel"',
        )
    if plan.scheme == "dynamic" and not _is_dynamic_kernel(node, kind):
        raise ExportError(
            f"{module_path(node)} ({kind}) has no dynamic integer kernel in XNNPACK, which has them for linear layers "
            "and 2-D convolutions without groups",
            f'quantize with activations = "static", or leave it in float with keep = ["{name}"]',
        )


def _is_dynamic_kernel(node: fx.Node, kind: str) -> bool:
    return kind == "linear" or (kind == "conv2d" and argument(node, 6) in (None, 1))


def _shifted(limits: Range) -> grid.ActivationGrid:
    """Return the range's grid in signed bytes, which are the only ones that XNNPACK's kernels have."""
    own = grid.activation_grid(limits)
    return own._replace(zero=own.zero + LOWEST, lowest=own.lowest + LOWEST, highest=own.highest + LOWEST)


def _round(
    graph: fx.Graph, node: fx.Node, own: grid.ActivationGrid, grids: Mapping[fx.Node, grid.ActivationGrid]
) -> None:
    """Put a quantize node behind a value, and a dequantize node of its own in front of each of its readers."""
    readers = [user for user in node.users if operator(user) != "sym_size"]
    with graph.inserting_after(_last_input(graph) if node.op == "placeholder" else node):
        rounded = _quantize(graph, node, own)
    rounded.meta = _place(node)
    for reader in readers:
        with graph.inserting_before(reader):
            value = _dequantize(graph, rounded, own)
            if operator(reader) == "cat" and reader in grids and grids[reader] != own:
                # XNNPACK joins integers of one scale only
                value = _dequantize(graph, _quantize(graph, value, grids[reader]), grids[reader])
        value.meta = _place(reader if reader.op != "output" else node)
        reader.replace_input_with(node, value)


def _last_input(graph: fx.Graph) -> fx.Node:
    last: fx.Node = graph.find_nodes(op="placeholder")[-1]
    return last


def _place(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}


def _arguments(own: grid.ActivationGrid) -> tuple[Any, ...]:
    import torch

    return own.scale, own.zero, own.lowest, own.highest, torch.int8


def _quantize(graph: fx.Graph, node: fx.Node, own: grid.ActivationGrid) -> fx.Node:
    import torch

    return graph.call_function(torch.ops.quantized_decomposed.quantize_per_tensor.default, (node, *_arguments(own)))


def _dequantize(graph: fx.Graph, node: fx.Node, own: grid.ActivationGrid) -> fx.Node:
    import torch

    return graph.call_function(torch.ops.quantized_decomposed.dequantize_per_tensor.default, (node, *_arguments(own)))


def _round_dynamically(graph: fx.Graph, node: fx.Node) -> None:
    """Let a layer read its input through integers of the range it has at that moment.

    XNNPACK takes one range a row of a linear layer's input, one a picture of a convolution's, whatever the nodes say.
    """
    import torch

    operators = torch.ops.quantized_decomposed
    source = node.args[0]
    with graph.inserting_before(node):
        smallest = float(torch.finfo(torch.float32).eps)
        chosen = graph.call_function(operators.choose_qparams.tensor, (source, LOWEST, HIGHEST, smallest, torch.int8))
        scale, zero = (graph.call_function(python.getitem, (chosen, place)) for place in (0, 1))
        given = (scale, zero, LOWEST, HIGHEST, torch.int8)
        rounded = graph.call_function(operators.quantize_per_tensor.tensor, (source, *given))
        value = graph.call_function(operators.dequantize_per_tensor.tensor, (rounded, *given))
    for made in (chosen, scale, zero, rounded, value):
        made.meta = _place(node)
    node.args = (value, *node.args[1:])


def _store_weight(module: fx.GraphModule, node: fx.Node, rule: WeightRule, input_scale: float) -> int:
    """Let a layer read its weight from integers; return the bits that each of them is stored in."""
    import torch

    weight = _array(module, argument(node, 1))
    bias = argument(node, 2)
    if input_scale and bias is not None:
        rule = grid.with_room(weight, rule, _array(module, bias), input_scale)
    is_narrow = rule.bits <= 4 and operator(node) == "linear" and weight.shape[1] % 2 == 0
    scales = grid.scales_of(weight, rule)
    if rule.granularity != "group":  # one for all is the same one for each: dynamic kernels know no other
        scales = scales.reshape(-1).repeat(weight.shape[rule.axis] // scales.size)
    parts = {
        "integers": torch.from_numpy(grid.quantized(weight, rule)).to(torch.int8),
        "scales": torch.from_numpy(scales.copy()),
        "zeros": torch.zeros(scales.shape, dtype=torch.int64),
    }
    for part, tensor in parts.items():
        module.register_buffer(f"{node.name}_{part}", tensor)
    with module.graph.inserting_before(node):
        stored = [module.graph.get_attr(f"{node.name}_{part}") for part in parts]
        value = _dequantize_weight(module.graph, stored, rule, NARROW if is_narrow else (LOWEST + 1, HIGHEST))
    value.meta = _place(node)
    node.args = (node.args[0], value, *node.args[2:])
    return 4 if is_narrow else 8


def _dequantize_weight(graph: fx.Graph, stored: list[fx.Node], rule: WeightRule, limits: tuple[int, int]) -> fx.Node:
    import torch

    operators = torch.ops.quantized_decomposed
    if rule.granularity == "group":
        given: tuple[Any, ...] = (*stored, *limits, torch.int8, rule.group, torch.float32)
        return graph.call_function(operators.dequantize_per_channel_group.default, given)
    return graph.call_function(operators.dequantize_per_channel.default, (*stored, rule.axis, *limits, torch.int8))


def _array(module: fx.GraphModule, node: fx.Node) -> Array:
    owner, _, leaf = str(node.target).rpartition(".")
    tensor: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    found: Array = tensor.detach().float().numpy()
    return found


def _drop_unused(module: fx.GraphModule, weights: set[str]) -> None:
    """Remove the float weights that no node reads any more: an exported program would carry them."""
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name in weights - read:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
