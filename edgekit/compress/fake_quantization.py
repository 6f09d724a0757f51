"""A traced network whose planned weights and activations are rounded as they compute, so that it can learn with it.

Knows plans and gradients. Knows no loop, no loss and no pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit import grid
from edgekit.compress import graph, rounding
from edgekit.compress.layer import Change
from edgekit.compress.layers import layers
from edgekit.compress.rounding import canonical
from edgekit.plan import Range
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan, WeightRule

    Part = Any  # a torch.nn.Module whose class can only be written where torch is imported


@dataclass(frozen=True)
class Learned:
    """What training found: weights on the grid and biases, the rules and ranges that belong to them."""

    changes: dict[str, Change]
    rules: dict[str, WeightRule]
    activations: dict[str, Range]


class FakeQuantized:
    """A trainable copy of a model's network; ``module`` takes and gives what the network does."""

    def __init__(self, model: Model, plan: QuantizationPlan, *, learns_scales: bool, learns_ranges: bool) -> None:
        traced = trace(model).module(check_guards=False)
        self._plan = plan
        self._layers = {layer.weight: layer for layer in layers(model) if layer.weight in plan.weights}
        self._weights: dict[str, Part] = {
            name: _weight(layer, canonical(plan.weights[name]), learns=learns_scales)
            for name, layer in self._layers.items()
        }
        self._names = _planned_nodes(traced.graph, model, plan)
        self._activations: dict[str, Part] = {
            node: _activation(plan.activations[name], learns=learns_ranges) for node, name in self._names.items()
        }
        ends = zip(traced.graph.output_node().all_input_nodes, model.outputs, strict=False)
        self._ends = {spec.name: node.name for node, spec in ends if node.name in self._names}
        is_dynamic = plan.scheme == "dynamic"
        self.module = _network(
            traced,
            self._tensors(),
            self._activations,
            {layer.node for layer in self._layers.values()} if is_dynamic else set(),
        )

    def learned(self) -> Learned:
        """Read what the module has become."""
        import numpy as np

        changes, rules = {}, {}
        for name, layer in self._layers.items():
            part, rule = self._weights[name], self._plan.weights[name]
            zeros = np.frombuffer(rule.zeros, "<i4") if rule.zeros else None
            rules[name] = grid.with_scales(rule, part.scales().detach().numpy(), zeros)
            values = np.ascontiguousarray(part.values.detach().numpy())
            offsets = None if layer.bias is None else part.offsets.detach().numpy().copy()
            changes[name] = Change(grid.rounded(values, canonical(rules[name])), offsets)
        ranges = dict(self._plan.activations)
        ranges |= {self._names[node]: part.limits() for node, part in self._activations.items()}
        ranges |= {name: ranges[self._names[node]] for name, node in self._ends.items() if name in ranges}
        return Learned(changes, rules, ranges)

    def _tensors(self) -> dict[str, tuple[Part, bool]]:
        """Return where each learned tensor lies by the name that the graph fetches: its part, and whether a weight."""
        found = {name: (part, True) for name, part in self._weights.items()}
        biases = {layer.bias: (self._weights[name], False) for name, layer in self._layers.items() if layer.bias}
        return found | biases


def _planned_nodes(traced: torch.fx.Graph, model: Model, plan: QuantizationPlan) -> dict[str, str]:
    """Return the nodes whose values are rounded, with their names in the plan."""
    places = traced.find_nodes(op="placeholder")
    public = {node.name: spec.name for node, spec in zip(places, model.inputs, strict=True)}
    names = {n.name: public.get(n.name, n.name) for n in traced.nodes if not graph.is_fused_away(n)}
    return {node: name for node, name in names.items() if name in plan.activations}


def _network(
    traced: torch.fx.GraphModule, tensors: Mapping[str, tuple[Part, bool]], activations: Mapping[str, Part],
    dynamic: set[str],
) -> torch.nn.Module:  # fmt: skip
    with extra("compress"):
        import torch
    fetched = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")} - set(tensors)
    constants = {name: f"constant_{number}" for number, name in enumerate(sorted(fetched))}

    class Rounding(torch.fx.Interpreter):
        owner: Part

        def run_node(self, n: torch.fx.Node) -> Any:  # noqa: ANN401  # torch's own signature: a node may give anything
            if n.op == "get_attr":
                return self.owner.tensor(str(n.target))
            if n.name in dynamic:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                return self.call_function(n.target, (rounding.round_dynamically(args[0].float()), *args[1:]), kwargs)
            result = super().run_node(n)
            return activations[n.name](result) if n.name in activations else result

    class FakeQuantizedNetwork(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ModuleList(part for part, is_weight in tensors.values() if is_weight)
            self.activations = torch.nn.ModuleList(activations.values())
            for name, own in constants.items():
                place, _, leaf = name.rpartition(".")
                self.register_buffer(own, getattr(traced.get_submodule(place), leaf).detach().clone())

        def tensor(self, name: str) -> torch.Tensor:
            part, is_weight = tensors.get(name, (None, False))
            if part is None:
                found: torch.Tensor = getattr(self, constants[name])
                return found
            return part() if is_weight else part.offsets  # type: ignore[no-any-return]  # a Part's tensors

        def forward(self, *inputs: torch.Tensor) -> Any:  # noqa: ANN401  # whatever the graph gives
            interpreter = Rounding(traced)
            interpreter.owner = self
            return interpreter.run(*inputs)

    return FakeQuantizedNetwork()


def _weight(layer: Layer, rule: WeightRule, *, learns: bool) -> Part:
    """Make a weight that rounds itself to the grid of its rule, with gradients for its values and scales.

    Gradients pass the rounding straight through, inside the limits; those of a scale are of Esser et al. 2020,
    "Learned Step Size Quantization", equations 3 and 5 with the factor of section 2.2. The logarithm of a scale is
    learned, so that steps are shares of it (Jain et al. 2020, "Trained Quantization Thresholds", section 4.2).
    """
    import torch

    lowest, highest = grid.limits(rule)
    start, zeros = grid.scales_of(layer.values, rule), grid.zeros_of(layer.values, rule)

    class RoundedWeight(torch.nn.Module):
        start: torch.Tensor
        zeros: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(torch.tensor(layer.values))
            self.offsets = None if layer.offsets is None else torch.nn.Parameter(torch.tensor(layer.offsets))
            self.logarithms = torch.nn.Parameter(torch.zeros(start.size), requires_grad=learns)
            self.register_buffer("start", torch.tensor(start))
            self.register_buffer("zeros", torch.tensor(zeros))

        def scales(self) -> torch.Tensor:
            share = 1 / math.sqrt(layer.values.size / start.size * highest)
            slow = self.logarithms * share + (self.logarithms * (1 - share)).detach()
            scales: torch.Tensor = self.start * torch.exp(slow).reshape(self.start.shape)
            return scales.clamp_min(grid.SMALLEST_SCALE)

        def forward(self) -> torch.Tensor:
            scales, zeros = self.scales()[:, :, None], self.zeros[:, :, None]
            steps = (_cut(self.values, rule) / scales).clamp(lowest - zeros, highest - zeros)
            return _joined(_straight(steps) * scales, tuple(layer.values.shape), rule).movedim(0, layer.axis)

    return RoundedWeight()


def _activation(limits: Range, *, learns: bool) -> Part:
    """Make a rounding to 8 bits by a range, whose width may be learned; the integer of zero stays."""
    import torch

    own = grid.activation_grid(limits)

    class RoundedActivation(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logarithm = torch.nn.Parameter(torch.zeros(1), requires_grad=learns)
            self.register_buffer("grid", torch.tensor(list(map(float, own))))  # so that a training's state holds it

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            if not learns:
                return rounding.round_value(values.float(), limits)
            share = 1 / math.sqrt(max(1, values[0].numel()) * own.highest)
            scale = own.scale * torch.exp(self.logarithm * share + (self.logarithm * (1 - share)).detach())
            steps = (values.float() / scale).clamp(own.lowest - own.zero, own.highest - own.zero)
            return _straight(steps) * scale

        def limits(self) -> Range:
            factor = float(torch.exp(self.logarithm.detach()))
            return Range(limits.low * factor, limits.high * factor) if learns else limits

    return RoundedActivation()


def _straight(values: torch.Tensor) -> torch.Tensor:
    """Round; the gradient passes as if nothing had happened (Bengio et al. 2013)."""
    return values + (values.round() - values).detach()


def _cut(values: torch.Tensor, rule: WeightRule) -> torch.Tensor:
    """Do what `grid.rows` does, with gradients; channels lie on the first axis."""
    from torch.nn import functional

    if rule.granularity == "tensor":
        return values.reshape(1, 1, -1)
    flat = values.reshape(len(values), -1)
    if rule.granularity == "channel":
        return flat[:, None]
    count = math.ceil(flat.shape[1] / rule.group)
    filled = functional.pad(flat, (0, count * rule.group - flat.shape[1]))
    return filled.reshape(len(flat), count, rule.group)


def _joined(cut: torch.Tensor, shape: tuple[int, ...], rule: WeightRule) -> torch.Tensor:
    """Undo `_cut`."""
    if rule.granularity == "tensor":
        return cut.reshape(shape)
    return cut.reshape(shape[0], -1)[:, : math.prod(shape[1:])].reshape(shape)
