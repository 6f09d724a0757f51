"""What LiteRT's quantizer is told of a plan, and what it cannot be told. Knows no file.

Its scales are not ours to give. But weights that lie on the plan's grid show it their scales, by their largest value
or by the steps between them ("dequantized weight recovery"). Where few values leave gaps, neither works, and a note
says so.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekit import grid
from edgekit.errors import ExportError
from edgekit.model import TorchNetwork
from edgekit.plan import WeightRule

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan, Scheme


@dataclass(frozen=True)
class Recipe:
    """One scheme and one width for the whole network, which is all that works without its own names of tensors."""

    scheme: Scheme
    bits: int
    shows_scales: bool
    """The quantizer's own scales, by the largest value of a channel, are those of the plan."""

    def choose(self, engine: Any, *, recover: bool) -> None:  # noqa: ANN401  # the quantizer is untyped
        """Tell the quantizer; inputs and outputs of the network stay float."""
        from ai_edge_quantizer import qtyping, recipe_manager
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

        manager = recipe_manager.RecipeManager()
        key = AlgorithmName.DEQUANTIZED_WEIGHT_RECOVERY if recover else AlgorithmName.MIN_MAX_UNIFORM_QUANT
        common = {"regex": ".*", "operation_name": qtyping.TFLOperationName.ALL_SUPPORTED, "algorithm_key": key}
        if self.scheme == "weight-only":
            manager.add_weight_only_config(num_bits=self.bits, **common)
        elif self.scheme == "dynamic":
            manager.add_dynamic_config(num_bits=self.bits, **common)
        else:
            manager.add_static_config(activation_num_bits=8, weight_num_bits=self.bits, **common)
        if self.bits < 8:
            self._widen_depthwise(manager, common)
        engine.load_quantization_recipe(manager.get_quantization_recipe())
        if self.scheme == "static":
            for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
                engine.update_quantization_recipe(regex=".*", operation_name=end, algorithm_key="no_quantize")

    def _widen_depthwise(self, manager: Any, common: dict[str, Any]) -> None:  # noqa: ANN401  # the quantizer is untyped
        """Store depthwise weights in 8 bits: there is no 4-bit kernel, and the quantizer would leave them in float.

        Their scales are not shown by steps, which the quantizer looks for along the first axis only.
        """
        from ai_edge_quantizer import qtyping
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

        own = {
            **common,
            "operation_name": qtyping.TFLOperationName.DEPTHWISE_CONV_2D,
            "algorithm_key": AlgorithmName.MIN_MAX_UNIFORM_QUANT,
        }
        if self.scheme == "weight-only":
            manager.add_weight_only_config(num_bits=8, **own)
        elif self.scheme == "dynamic":
            manager.add_dynamic_config(num_bits=8, **own)
        else:
            manager.add_static_config(activation_num_bits=8, weight_num_bits=8, **own)


def of(model: Model) -> Recipe | None:
    """Return the recipe for a model's plan, None where it has none.

    Raises:
        ExportError: 16-bit floats, scales a group, zero points, or 4-bit weights beside float ones.
    """
    plan = model.plan
    if plan is None:
        return None
    if plan.scheme == "float16":
        raise ExportError(
            f"{model.name} is planned as 16-bit floats, which LiteRT files hold on their own accord only",
            "export with --precision fp32: the delegate computes in 16 bits where the device has such units",
        )
    for name, rule in plan.weights.items():
        _refuse(name, rule)
    bits = _width(plan)
    left = _left_out(model)
    if left and bits < 8:
        raise ExportError(
            f"the plan leaves {left[0]!r} in float beside weights of {bits} bits; LiteRT takes one width for all",
            "plan every weight, or use bits = 8",
        )
    return Recipe(plan.scheme, bits, shows_scales=bool(left) or _shows_scales(model, plan, bits))


def _refuse(name: str, rule: WeightRule) -> None:
    if rule.granularity == "group" or rule.zeros:
        what = "zero points" if rule.zeros else f"a scale for each {rule.group} inputs"
        raise ExportError(
            f"{name!r} has {what}; LiteRT takes symmetric weights with one scale a channel",
            'quantize with granularity = "channel"',
        )


def _width(plan: QuantizationPlan) -> int:
    return 4 if all(rule.bits <= 4 for rule in plan.weights.values()) else 8


def _shows_scales(model: Model, plan: QuantizationPlan, bits: int) -> bool:
    import numpy as np

    module = model.network.module if isinstance(model.network, TorchNetwork) else None
    parameters = dict(module.named_parameters(remove_duplicate=False)) if module else {}
    for name, rule in plan.weights.items():
        weight = parameters[name].detach().numpy()
        own = WeightRule(bits=bits, granularity="channel", axis=rule.axis)
        seen = grid.scales_of(grid.rounded(weight, rule), own)
        if not np.allclose(seen, np.broadcast_to(grid.scales_of(weight, rule), seen.shape), rtol=1e-5):
            return False
    return True


def _left_out(model: Model) -> list[str]:
    """List the matrices that the plan does not name."""
    network = model.network
    if model.plan is None or not isinstance(network, TorchNetwork):
        return []
    return [n for n, p in network.module.named_parameters() if p.dim() > 1 and n not in model.plan.weights]


def on_the_grid(model: Model, network: TorchNetwork) -> TorchNetwork:
    """Return the network with its planned weights rounded, on a copy."""
    rules = model.plan.weights if model.plan else {}
    if not rules:
        return network
    import torch

    module = copy.deepcopy(network.module)
    with torch.no_grad():
        for name, rule in rules.items():
            weight = module.get_parameter(name)
            weight.copy_(torch.from_numpy(grid.rounded(weight.detach().numpy(), rule)))
    return replace(network, module=module)


def notes(model: Model) -> tuple[str, ...]:
    """Tell what the file does otherwise than the plan says."""
    plan = model.plan
    if plan is None:
        return ()
    whole = [name for name, rule in plan.weights.items() if rule.granularity == "tensor"]
    narrow = [name for name, rule in plan.weights.items() if rule.bits <= 4] if _width(plan) == 8 else []
    left = _left_out(model)
    told = {
        f"{len(whole)} weights are per channel here, per tensor in the plan": bool(whole),
        f"{len(narrow)} weights of 4 bits are stored in 8, beside others that need them": bool(narrow),
        f"{len(left)} weights that the plan leaves in float are quantized by LiteRT, too": bool(left),
    }
    return tuple(note for note, holds in told.items() if holds)
