"""Stores the weights of a Core ML program: a plan's integers, tables and masks. Knows nothing of activations.

coremltools chooses scales itself, by the largest value; here it is given the plan's, so that weights that were
compensated on the plan's grid stay where they are. Scales are rounded to the program's own 16 bits. Of the forms that
the program's iOS reads, each weight has the shortest (`coreml_forms`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from edgekit import grid
from edgekit.errors import ExportError
from edgekit.export.coreml_forms import FIRST_IOS, JOINT_IOS, Integers, Table, shortest
from edgekit.export.quiet import silence
from edgekit.model import TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgekit.export.coreml_forms import Form
    from edgekit.model import Model
    from edgekit.plan import QuantizationPlan, WeightRule
    from edgekit.tensors import Array

BLOCK_IOS = 18
"""The first iOS with 4-bit integers and scales for blocks."""

WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
"""Operators whose constants of two and more axes are weights."""


class _Weight(NamedTuple):
    """What a constant of the program holds, and how it is planned."""

    rule: WeightRule
    values: Array


def least_ios(plan: QuantizationPlan | None) -> int:
    """Return the iOS that a plan's weights need, 0 for any."""
    if plan is None or not plan.weights:
        return 0
    newer = any(r.bits <= 4 or r.granularity == "group" or r.zeros for r in plan.weights.values())
    return BLOCK_IOS if newer else FIRST_IOS


def compress(
    program: Any,  # noqa: ANN401  # coremltools is untyped
    model: Model,
    graph: torch.export.ExportedProgram,
    ios: int,
) -> tuple[Any, dict[str, tuple[Form, Form]]]:
    """Return the program with each weight in its shortest form, and by name that form and the shortest of any iOS.

    Raises:
        ExportError: the plan's weight is none of the program's, or has groups that blocks cannot hold.
    """
    planned = _planned(program, model, graph)
    chosen = {}
    for name, floats in _weights(program, graph).items():
        integers = _integers(planned[name], floats.dtype) if name in planned else None
        chosen[name] = shortest(floats, integers, ios)
    forms = {name: form for name, (form, _) in chosen.items() if not form.is_plain}
    parameters = graph.graph_signature.inputs_to_parameters
    told = {parameters.get(name.removesuffix("_to_fp16"), name): pair for name, pair in chosen.items()}
    if not forms:
        return program, told
    with extra("export"), silence():
        from coremltools.models.utils import _apply_graph_pass
        from coremltools.optimize.coreml._quantization_passes import AbstractCompressionPass

    class Shortest(AbstractCompressionPass):  # type: ignore[misc]  # coremltools is untyped
        """Replaces constants of the program, one by one."""

        def is_valid_op(self, op: Any) -> bool:  # noqa: ANN401  # coremltools is untyped
            return op.op_type == "const" and op.name in forms

        def transform_op(self, op: Any) -> None:  # noqa: ANN401  # coremltools is untyped
            _replace(op, forms[op.name], ios)

    with silence():
        return _apply_graph_pass(program, Shortest()), told


def _weights(program: Any, graph: torch.export.ExportedProgram) -> dict[str, Array]:  # noqa: ANN401  # coremltools is untyped
    """Find the weights of two and more axes that lie in the weight file, as the program has them.

    Those of layers into which the program folds a batch normalization have no parameter's name.
    """
    with extra("export"), silence():
        from coremltools.converters.mil.backend.mil.load import should_use_weight_file
    names = {name for node in graph.graph_signature.inputs_to_parameters for name in (node, f"{node}_to_fp16")}
    constants = program._mil_program.functions["main"].find_ops(op_type="const")  # noqa: SLF001  # the only way to them
    read = {op.name: {child.op_type for child in op.outputs[0].child_ops} for op in constants}
    found = {op.name: op.outputs[0].val for op in constants if op.name in names or read[op.name] <= WEIGHTED}
    return {n: v for n, v in found.items() if should_use_weight_file(v) and v.ndim > 1 and v.dtype.kind == "f"}


def _replace(op: Any, form: Form, ios: int) -> None:  # noqa: ANN401  # coremltools is untyped
    """Let who reads a constant read what decompresses its form; the operators are those of the program's iOS."""
    made = _plain(op, form) if form.mask is None else _without_zeros(op, form, form.mask, ios)
    op.enclosing_block.replace_uses_of_var_after_op(
        anchor_op=op, old_var=op.outputs[0], new_var=made, no_check_var_types=True
    )
    op.enclosing_block.remove_ops([op])


def _plain(op: Any, form: Form) -> Any:  # noqa: ANN401  # coremltools is untyped
    import numpy as np
    from coremltools.converters.mil.frontend._utils import _construct_constexpr_lut_op
    from coremltools.optimize._utils import QuantParams
    from coremltools.optimize.coreml._quantization_passes import linear_quantize_weights

    stored = form.stored
    if isinstance(stored, Integers):
        parameters = QuantParams(stored.data, stored.scales, stored.offsets, np.uint8(stored.bits))
        return linear_quantize_weights._create_constexpr_var(op, parameters)  # noqa: SLF001  # knows both iOS 16 and 18
    if not isinstance(stored, Table):
        return op.outputs[0]
    return _construct_constexpr_lut_op(stored.indices, stored.values, name=f"{op.name}_table", before_op=op)


def _without_zeros(op: Any, form: Form, mask: Array, ios: int) -> Any:  # noqa: ANN401  # coremltools is untyped
    import numpy as np
    from coremltools.converters.mil.mil import Builder

    stored = form.stored
    place = {"before_op": op, "name": f"{op.name}_sparse"}
    bits: Any = mask.astype(_integer("uint", 1))
    if isinstance(stored, Integers):
        bits, kept = Builder.constexpr_sparse_blockwise_shift_scale(
            data_mask=bits,
            nonzero_data=stored.data[mask],
            scale=stored.scales,
            offset=stored.offsets,
            before_op=op,
            name=f"{op.name}_quantized",
        )
    elif isinstance(stored, Table):
        bits, kept = Builder.constexpr_lut_to_sparse(
            indices_mask=bits,
            indices_nonzero_data=stored.indices[mask].astype(_integer("uint", stored.bits)),
            lut=stored.values,
            before_op=op,
            name=f"{op.name}_table",
        )
    else:
        kept = stored[mask]
        if ios < JOINT_IOS:
            packed, shape = np.packbits(mask, bitorder="little"), np.array(mask.shape, np.uint32)
            return Builder.constexpr_sparse_to_dense(nonzero_data=kept, mask=packed, shape=shape, **place)
    return Builder.constexpr_sparse_to_dense(nonzero_data=kept, mask=bits, **place)


def _planned(
    program: Any,  # noqa: ANN401  # coremltools is untyped
    model: Model,
    graph: torch.export.ExportedProgram,
) -> dict[str, _Weight]:
    """Find the program's constants that the plan makes integers of, by their names."""
    plan = model.plan
    if not isinstance(model.network, TorchNetwork) or plan is None or plan.scheme == "float16":
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
        wanted[found[-1]] = _Weight(rule, values)
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


def _integers(weight: _Weight, dtype: np.dtype[Any]) -> Integers:
    rule, values = weight
    bits = 4 if rule.bits <= 4 else 8
    kind = _integer("uint" if rule.zeros else "int", bits)
    shape = [1] * values.ndim
    if rule.granularity != "tensor":
        shape[rule.axis % values.ndim] = values.shape[rule.axis]
    if rule.granularity == "group":
        shape[1] = values.shape[1] // rule.group
    scales = grid.scales_of(values, rule).reshape(shape)
    offsets = grid.zeros_of(values, rule).reshape(shape).astype(kind) if rule.zeros else None
    return Integers(grid.quantized(values, rule).astype(kind), scales.astype(dtype), offsets, bits)


def _integer(kind: str, bits: int) -> Any:  # noqa: ANN401  # a NumPy type that coremltools tells from wider ones
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(f"{kind}{bits}"))
