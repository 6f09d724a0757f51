"""Cuts the part of a network out that calls one operator, so that a format can be asked for it alone. Knows no format.

The part grows until its ends are tensors that a file can have: a batch first, no complex numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgekitError
from edgekit.export.refusal import is_complex
from edgekit.model import Data, Model, Split, TorchNetwork
from edgekit.workload import trace

if TYPE_CHECKING:
    import torch
    from torch import fx

    from edgekit.tensors import Array

SAMPLES = 8


def part_of(model: Model, name: str) -> Model | None:
    """Return a model of the part around a node of the traced graph, with what that part is given as its data.

    ``None`` where the part has no such ends, or the model no data.
    """
    import torch

    from edgekit import workload

    if model.data is None or not isinstance(model.network, TorchNetwork):
        return None
    module = trace(model).module(check_guards=False)
    inside = _grown(next(node for node in module.graph.nodes if node.name == name))
    given = list(dict.fromkeys(one for node in inside for one in node.all_input_nodes if one not in inside))
    taken = [one for one in given if one.op != "get_attr"]
    if not taken or not all(map(_is_port, taken)):
        return None
    arrays = _values(module, model, taken)
    cut = torch.fx.GraphModule(module, _graph(module, inside, given)).eval()
    try:
        return workload.from_module(model.name, cut, Data(Split(arrays)))
    except EdgekitError:  # it gives what is no tensor
        return None


def _grown(start: fx.Node) -> set[fx.Node]:
    inside, waiting = set(), [start]
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        inside.add(node)
        waiting += [one for one in node.all_input_nodes if one.op == "call_function" and not _is_port(one)]
        waiting += [one for one in node.users if one.op == "call_function" and not _is_port(node)]
    return inside


def _is_port(node: fx.Node) -> bool:
    """Say whether a file can take or give what the node makes."""
    shape = tuple(getattr(node.meta.get("val"), "shape", ()))
    return bool(shape) and not isinstance(shape[0], int) and not is_complex(node)


def _values(module: torch.nn.Module, model: Model, wanted: list[fx.Node]) -> dict[str, Array]:
    """Return what the nodes make of a few samples."""
    import torch

    found: dict[str, Array] = {}
    names = {node.name for node in wanted}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401  # torch's signature
            result = super().run_node(n)
            if n.name in names:
                found[n.name] = result.detach().clone().numpy()
            return result

    if model.data is None or not isinstance(model.network, TorchNetwork):
        return found
    samples = model.data.calibration.head(SAMPLES).inputs
    with torch.no_grad():
        Watch(module).run(*[torch.as_tensor(samples[name]) for name in model.network.input_names])
    return found


def _graph(module: fx.GraphModule, inside: set[fx.Node], given: list[fx.Node]) -> fx.Graph:
    import torch

    graph = torch.fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in given:
        copied[node] = graph.node_copy(node) if node.op == "get_attr" else graph.placeholder(node.name)
    for node in module.graph.nodes:
        if node in inside:
            copied[node] = graph.node_copy(node, lambda one: copied[one])
    ends = [node for node in inside if _is_port(node) and (set(node.users) - inside or not node.users)]
    graph.output(tuple(copied[node] for node in module.graph.nodes if node in ends))
    return graph
