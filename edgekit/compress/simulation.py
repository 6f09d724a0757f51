"""Computes a model as its plan will have it: float arithmetic on weights and activations rounded to integers.

An estimate made where the plan is made: the accuracy of a written file is the exporter's parity check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit.compress import graph, onnx_graph
from edgekit.model import Model, OnnxNetwork, TorchNetwork
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from edgekit.model import Network
    from edgekit.plan import QuantizationPlan, Range, WeightRule
    from edgekit.tensors import Array


def planned_network(model: Model) -> Network:
    """Return what computes the model with its plan applied; the float network where there is no plan."""
    if model.plan is None:
        return model.network
    if isinstance(model.network, OnnxNetwork):
        return _RoundedOnnx(model.network.path, model.plan)
    if isinstance(model.network, TorchNetwork):
        return TorchNetwork(_rounded_module(model, model.plan), model.network.input_names, model.network.output_names)
    return model.network


class _RoundedOnnx:
    def __init__(self, path: Path, plan: QuantizationPlan) -> None:
        with extra("compress"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        content = onnx_graph.rounded(path, plan).SerializeToString()
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs for a batch."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def _rounded_module(model: Model, plan: QuantizationPlan) -> torch.nn.Module:
    with extra("compress"):
        import torch
    module = trace(model).module(check_guards=False)
    weights = {
        name: _round_weight(tensor.detach(), plan.weights[name])
        for name, tensor in module.state_dict().items()
        if name in plan.weights
    }
    inputs = {n.name: s.name for n, s in zip(module.graph.find_nodes(op="placeholder"), model.inputs, strict=True)}
    skipped = {node.name for node in module.graph.nodes if graph.is_fused_away(node)}

    class Rounding(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:  # noqa: ANN401  # torch's own signature: a node may give anything
            if n.op == "get_attr":
                return weights.get(str(n.target), super().run_node(n))
            limits = None if n.name in skipped else plan.activations.get(inputs.get(n.name, n.name))
            result = super().run_node(n)
            return result if limits is None else _round_value(result, limits)

    class Rounded(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:  # noqa: ANN401  # whatever the graph gives
            return Rounding(module).run(*tensors)

    return Rounded()


def _round_weight(weight: torch.Tensor, rule: WeightRule) -> torch.Tensor:
    import torch

    most = 2 ** (rule.bits - 1) - 1
    axes = [i for i in range(weight.dim()) if rule.granularity == "tensor" or i != rule.axis]
    scale = weight.abs().amax(axes, keepdim=True).clamp_min(1e-12) / most
    rounded: torch.Tensor = torch.round(weight / scale).clamp(-most, most) * scale
    return rounded


def _round_value(values: torch.Tensor, limits: Range) -> torch.Tensor:
    import torch

    low, high = min(limits.low, 0.0), max(limits.high, 0.0)
    scale = (high - low) / 255 or 1.0
    rounded: torch.Tensor = torch.fake_quantize_per_tensor_affine(values, scale, round(-low / scale), 0, 255)
    return rounded
