"""What LiteRT's quantizer is told of a plan, layer by layer, and what it cannot be told. Reads no file.

Its scales are the largest value over the largest integer, of statistics that are ours to give: a layer whose largest
value is said to be the plan's scale times the largest integer has the plan's scale.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekit import grid
from edgekit.errors import ExportError
from edgekit.export import litert_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.export.litert_file import Layer
    from edgekit.export.litert_weights import Held
    from edgekit.model import Model, TorchNetwork
    from edgekit.plan import QuantizationPlan, Scheme, WeightRule
    from edgekit.tensors import Array

NARROW = {"CONV_2D", "FULLY_CONNECTED", "EMBEDDING_LOOKUP"}
"""Operators whose weights can have 4 bits; an embedding only where activations are no integers."""
BLOCKS = (32, 64, 128, 256)
MATRICES = {"FULLY_CONNECTED", "EMBEDDING_LOOKUP"}


@dataclass(frozen=True)
class Choice:
    """One layer: the operator, the tensor it computes, the bits of its weights (0: float) and the block (0: none)."""

    kind: str
    output: str
    bits: int
    block: int = 0


@dataclass(frozen=True)
class Recipe:
    """What the quantizer is told: the scheme, each layer, the largest values by weight, and which ends are integers.

    ``rest`` says whether operators without weights are integers, too.
    """

    scheme: Scheme
    layers: tuple[Choice, ...]
    largest: Mapping[str, Array]
    integer_ends: bool
    rest: bool

    def choose(self, engine: Any) -> None:  # noqa: ANN401  # the quantizer is untyped
        """Tell the quantizer; of two entries that fit an operator, the later counts."""
        from ai_edge_quantizer import qtyping, recipe_manager

        manager = recipe_manager.RecipeManager()
        operators = qtyping.TFLOperationName
        if self.rest:
            self._add(manager, ".*", operators.ALL_SUPPORTED, Choice("", "", 8))
        if self.scheme == "static" and not self.integer_ends:
            for end in (operators.INPUT, operators.OUTPUT):
                manager.add_quantization_config(".*", end, algorithm_key="no_quantize")
        for one in self.layers:
            # The scope of an operator is the names of its outputs, each with a semicolon behind it.
            scope = f"^{re.escape(one.output)};?$"
            kind = operators.CONV_2D_TRANSPOSE if one.kind == "TRANSPOSE_CONV" else operators[one.kind]
            self._add(manager, scope, kind, one)
        engine.load_quantization_recipe(manager.get_quantization_recipe())

    def _add(self, manager: Any, scope: str, kind: Any, one: Choice) -> None:  # noqa: ANN401  # as above
        from ai_edge_quantizer import qtyping

        if not one.bits:
            manager.add_quantization_config(scope, kind, algorithm_key="no_quantize")
        elif one.kind == "EMBEDDING_LOOKUP" and self.scheme == "static":  # it looks up and computes nothing
            manager.add_weight_only_config(scope, kind, num_bits=one.bits)
        elif self.scheme == "static":
            manager.add_static_config(scope, kind, activation_num_bits=8, weight_num_bits=one.bits)
        elif self.scheme == "dynamic":
            block = f"BLOCKWISE_{one.block}" if one.block else "CHANNELWISE"
            manager.add_dynamic_config(scope, kind, num_bits=one.bits, granularity=qtyping.QuantGranularity[block])
        else:
            manager.add_weight_only_config(scope, kind, num_bits=one.bits)


def refuse(model: Model) -> None:
    """Stop at what no LiteRT file holds.

    Raises:
        ExportError: 16-bit floats, zero points, or scales a group beside activations that are not dynamic.
    """
    plan = model.plan
    if plan is None:
        return
    if plan.scheme == "float16":
        raise ExportError(
            f"{model.name} is planned as 16-bit floats, which LiteRT files hold on their own accord only",
            "export with --precision fp32: the delegate computes in 16 bits where the device has such units",
        )
    for name, rule in plan.weights.items():
        if rule.zeros:
            raise ExportError(
                f"{name!r} has zero points; LiteRT takes symmetric weights", "quantize with symmetric = true"
            )
        if rule.granularity == "group" and plan.scheme != "dynamic":
            raise ExportError(
                f"{name!r} has a scale for each {rule.group} inputs beside {plan.scheme} activations; LiteRT's kernels "
                "of such blocks take dynamic ones",
                'quantize with activations = "dynamic", or granularity = "channel"',
            )


def of(plan: QuantizationPlan, layers: Sequence[Held | Layer], *, integer_ends: bool) -> Recipe:
    """Return the recipe for the layers of a float file: what they hold of the model, or themselves where nothing fits.

    Raises:
        ExportError: names a weight with groups that its operator, its width or its length does not allow.
    """
    choices, largest = [], {}
    for one in layers:
        if not isinstance(one, litert_weights.Held):
            choices.append(Choice(one.kind, one.output, 8))
        elif one.rule is None:
            choices.append(Choice(one.layer.kind, one.layer.output, 0))
        else:
            choice = _choice(plan, one, one.rule)
            scales = litert_weights.block_scales(one, choice.block) if choice.block else None
            scales = litert_weights.channel_scales(one) if scales is None else scales
            largest[one.layer.weight] = scales * (2 ** (choice.bits - 1) - 1)
            choices.append(choice)
    rest = plan.scheme == "static" and plan.cover == "all"
    return Recipe(plan.scheme, tuple(choices), largest, integer_ends, rest)


def _choice(plan: QuantizationPlan, one: Held, rule: WeightRule) -> Choice:
    layer = one.layer
    if rule.granularity != "group":
        narrow = (
            rule.bits <= 4
            and layer.kind in NARROW
            and not (plan.scheme == "static" and layer.kind == "EMBEDDING_LOOKUP")
        )
        return Choice(layer.kind, layer.output, 4 if narrow else 8)
    what = f"{one.name!r} has a scale for each {rule.group} inputs"
    if layer.kind not in MATRICES or rule.bits > 4:
        raise ExportError(
            f"{what} and {rule.bits} bits in {layer.kind}; LiteRT has such blocks for matrices of 4 bits only",
            'quantize it with granularity = "channel", or keep it in float',
        )
    if rule.group not in BLOCKS or layer.values.shape[-1] % rule.group:
        raise ExportError(
            f"{what} and {layer.values.shape[-1]} of them; LiteRT's blocks have {', '.join(map(str, BLOCKS))} and no"
            " rest",
            "choose another group, or keep it in float",
        )
    return Choice(layer.kind, layer.output, 4, rule.group)


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
