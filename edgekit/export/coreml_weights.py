"""Puts a plan's integers in the place of a Core ML program's float weights. Knows nothing of activations.

coremltools chooses scales itself, by the largest value; here it is given the plan's, so that weights that were
compensated on the plan's grid stay where they are. Scales are rounded to the program's own 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from edgekit import grid
from edgekit.errors import ExportError
from edgekit.export.quiet import silence
from edgekit.model import TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan, WeightRule
    from edgekit.tensors import Array

BLOCK_IOS = 18
"""The first iOS with 4-bit integers and scales for blocks."""


class _Weight(NamedTuple):
    """What a constant of the program becomes."""

    name: str
    rule: WeightRule
    values: Array


def least_ios(plan: QuantizationPlan | None) -> int:
    """Return the iOS that a plan's weights need, 0 for any."""
    needs = plan is not None and any(r.bits <= 4 or r.granularity == "group" or r.zeros for r in plan.weights.values())
    return BLOCK_IOS if needs else 0


def quantize(program: Any, model: Model, plan: QuantizationPlan, graph: torch.export.ExportedProgram) -> Any:  # noqa: ANN401  # coremltools is untyped
    """Return the program with the plan's integers; a plan of 16-bit floats leaves it as it is.

    Raises:
        ExportError: a weight that the program lacks, or groups that its blocks cannot hold.
    """
    if plan.scheme == "float16" or not plan.weights:
        return program
    wanted = _wanted(program, model, plan, graph)
    with extra("export"), silence():
        import coremltools.optimize.coreml as cto
        from coremltools.models.utils import _apply_graph_pass
        from coremltools.optimize.coreml import _quantization_passes

    class Planned(_quantization_passes.linear_quantize_weights):  # type: ignore[misc]  # coremltools is untyped
        """coremltools' own pass, which asks here for the integers of the constant that it is at."""

        _at = ""

        def transform_op(self, op: Any) -> None:  # noqa: ANN401  # coremltools is untyped
            self._at = op.name
            super().transform_op(op)

        def blockwise_compress_by_dtype(self, original: Array, *_: object) -> Any:  # noqa: ANN401  # coremltools is untyped
            return _parameters(wanted[self._at], original.dtype)

    configs = {
        name: cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=0) for name in wanted
    }
    with silence():
        config = cto.OptimizationConfig(global_config=None, op_name_configs=configs)
        return _apply_graph_pass(program, Planned(config))


def _wanted(
    program: Any,  # noqa: ANN401  # coremltools is untyped
    model: Model,
    plan: QuantizationPlan,
    graph: torch.export.ExportedProgram,  # coremltools is untyped
) -> dict[str, _Weight]:
    if not isinstance(model.network, TorchNetwork):
        return {}
    parameters = dict(model.network.module.named_parameters(remove_duplicate=False))
    nodes = {id(parameters[p]): node for node, p in graph.graph_signature.inputs_to_parameters.items()}
    names = {parameter: nodes.get(id(tensor), "") for parameter, tensor in parameters.items()}  # tied ones share one
    constants = {op.name for op in program._mil_program.functions["main"].find_ops(op_type="const")}  # noqa: SLF001  # the only way to the names
    wanted = {}
    for parameter, rule in plan.weights.items():
        found = [c for c in (names.get(parameter, ""), f"{names.get(parameter, '')}_to_fp16") if c in constants]
        if not found:
            raise ExportError(
                f"the plan quantizes {parameter!r}, which is no Core ML weight", "leave it out in the recipe"
            )
        values = parameters[parameter].detach().numpy()
        _refuse(parameter, values, rule)
        wanted[found[-1]] = _Weight(parameter, rule, values)
    return wanted


def _refuse(name: str, values: Array, rule: WeightRule) -> None:
    """Blocks of Core ML are runs of one axis, groups of a plan of all axes but the first."""
    if rule.granularity != "group":
        return
    inputs = values.shape[1]
    if rule.axis % values.ndim or values[0].size != inputs or inputs % rule.group:
        raise ExportError(
            f"{name!r} of shape {list(values.shape)} has a scale for each {rule.group} inputs; Core ML's blocks divide "
            "the input channels of linear layers and 1x1 convolutions",
            'quantize it with granularity = "channel", or leave it out with keep',
        )


def _parameters(weight: _Weight, dtype: np.dtype[Any]) -> Any:  # noqa: ANN401  # coremltools is untyped
    import numpy as np
    from coremltools.converters.mil.mil import types
    from coremltools.optimize._utils import QuantParams

    rule, values = weight.rule, weight.values
    bits = 4 if rule.bits <= 4 else 8
    kind = types.nptype_from_builtin(types.string_to_builtin(f"{'uint' if rule.zeros else 'int'}{bits}"))
    shape = [1] * values.ndim
    if rule.granularity != "tensor":
        shape[rule.axis % values.ndim] = values.shape[rule.axis]
    if rule.granularity == "group":
        shape[1] = values.shape[1] // rule.group
    scales = grid.scales_of(values, rule).reshape(shape)
    offset = grid.zeros_of(values, rule).reshape(shape).astype(kind) if rule.zeros else None
    data = grid.quantized(values, rule).astype(kind)
    return QuantParams(data=data, scale=scales.astype(dtype), offset=offset, nbits=np.uint8(bits))
