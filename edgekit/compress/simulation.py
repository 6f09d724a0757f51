"""Computes a model as its plan will have it: float arithmetic on weights and activations rounded to integers.

An estimate made where the plan is made: the accuracy of a written file is the exporter's parity check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit import grid, onnx_io
from edgekit.compress import graph, onnx_graph, rounding
from edgekit.model import Model, OnnxNetwork, TorchNetwork
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgekit.model import Network
    from edgekit.plan import QuantizationPlan
    from edgekit.tensors import Array


def planned_network(model: Model) -> Network:
    """Return what computes the model with its plan applied; the float network where there is no plan."""
    if model.plan is None:
        return model.network
    if isinstance(model.network, OnnxNetwork):
        return _RoundedOnnx(model.network, model.plan)
    if isinstance(model.network, TorchNetwork):
        return TorchNetwork(_rounded_module(model, model.plan), model.network.input_names, model.network.output_names)
    return model.network


class _RoundedOnnx:
    def __init__(self, network: OnnxNetwork, plan: QuantizationPlan) -> None:
        with extra("compress"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnx_io.session(onnx_graph.rounded(network.proto(), plan), options)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs for a batch."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def _rounded_module(model: Model, plan: QuantizationPlan) -> torch.nn.Module:
    with extra("compress"):
        import torch
    module = trace(model).module(check_guards=False)
    weights = {n: _round_weight(t.detach(), n, plan) for n, t in module.state_dict().items()}
    inputs = {n.name: s.name for n, s in zip(module.graph.find_nodes(op="placeholder"), model.inputs, strict=True)}
    skipped = {node.name for node in module.graph.nodes if graph.is_fused_away(node)}
    planned = {node.name for node, name in graph.weighted(module.graph) if name in plan.weights}

    class Rounding(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:  # noqa: ANN401  # torch's own signature: a node may give anything
            if n.op == "get_attr":
                return weights.get(str(n.target), super().run_node(n))
            if plan.scheme == "dynamic" and n.name in planned:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                return self.call_function(n.target, (rounding.round_dynamically(args[0]), *args[1:]), kwargs)
            result = super().run_node(n)
            if plan.scheme == "float16":
                return _as_half(result)
            limits = None if n.name in skipped else plan.activations.get(inputs.get(n.name, n.name))
            return result if limits is None else rounding.round_value(result, limits)

    class Rounded(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:  # noqa: ANN401  # whatever the graph gives
            return Rounding(module).run(*tensors)

    return Rounded()


def _round_weight(weight: torch.Tensor, name: str, plan: QuantizationPlan) -> torch.Tensor:
    import torch

    if plan.scheme == "float16":
        return weight.half().float() if weight.is_floating_point() else weight
    rule = plan.weights.get(name)
    return weight if rule is None else torch.from_numpy(grid.rounded(weight.float().numpy(), rule)).to(weight.dtype)


def _as_half(value: Any) -> Any:  # noqa: ANN401  # a node may give anything
    import torch

    return value.half().float() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
