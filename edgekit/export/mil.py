"""Computes a Core ML package from its bytes, where no Core ML runs. Knows its operators, not how it was made.

The package is read back into a MIL program (coremltools' own loader), and its operators are computed in float32 and
rounded to float16 where the program says so. This proves weights, layouts and wiring, not Apple's kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit.export.mil_operators import OPERATORS
from edgekit.export.quiet import silence
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from edgekit.tensors import Array


def run(package: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Compute all samples one by one; names are those of the package.

    Raises:
        NotImplementedError: the package holds an operator that this interpreter lacks; names it.
    """
    with extra("export"):
        import numpy as np
        import torch
    function = _read(package)
    count = len(next(iter(inputs.values())))
    stored = _stored(function)
    with torch.no_grad():
        samples = [_one(function, {n: a[i : i + 1] for n, a in inputs.items()}, stored) for i in range(count)]
    return {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}


def _read(package: Path) -> Any:  # noqa: ANN401  # coremltools is untyped
    with extra("export"), silence():
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.proto import Model_pb2
    folder = package / "Data/com.apple.CoreML"
    spec = Model_pb2.Model.FromString((folder / "model.mlmodel").read_bytes())
    with silence():
        return load(spec, spec.specificationVersion, str(folder / "weights")).functions["main"]


def _stored(function: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  # coremltools is untyped
    """Decompress what the package stores as integers, tables or without its zeros, by the names of the results."""
    import numpy as np
    import torch

    found = {}
    for op in function.operations:
        if op.op_type.startswith("constexpr_"):
            values = op.materialized_val_inference()
            for output, value in zip(op.outputs, values if len(op.outputs) > 1 else [values], strict=True):
                found[output.name] = torch.as_tensor(np.asarray(value, np.float32))
    return found


def _one(function: Any, inputs: Mapping[str, Array], stored: Mapping[str, torch.Tensor]) -> dict[str, Array]:  # noqa: ANN401  # coremltools is untyped
    import torch

    values: dict[str, Any] = {**stored, **{name: torch.as_tensor(array) for name, array in inputs.items()}}
    for op in function.operations:
        if op.op_type == "const" or op.op_type.startswith("constexpr_"):
            continue
        results = _compute(op, values)
        for output, result in zip(op.outputs, results, strict=True):
            values[output.name] = result
    return {v.name: values[v.name].float().numpy() for v in function.outputs}


def _compute(op: Any, values: Mapping[str, Any]) -> list[torch.Tensor]:  # noqa: ANN401  # coremltools is untyped
    if op.op_type not in OPERATORS:
        raise NotImplementedError(f"the interpreter lacks the Core ML operator {op.op_type!r}")
    result = OPERATORS[op.op_type]({name: _value(var, values) for name, var in op.inputs.items()})
    results = result if isinstance(result, list) else [result]
    return [_rounded(r, v) for r, v in zip(results, op.outputs, strict=True)]


def _value(var: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401  # a tensor, a Python constant, or a list
    import numpy as np
    import torch

    if isinstance(var, tuple | list):
        return [_value(v, values) for v in var]
    if var is None:
        return None
    if var.name in values:
        return values[var.name]
    constant = var.val
    if isinstance(constant, np.ndarray) and constant.dtype.kind == "f":
        return torch.as_tensor(constant).float()
    return constant.tolist() if isinstance(constant, np.ndarray | np.generic) else constant


def _rounded(tensor: torch.Tensor, var: Any) -> torch.Tensor:  # noqa: ANN401  # coremltools is untyped
    from coremltools.converters.mil.mil import types

    if var.dtype == types.fp16 and tensor.is_floating_point():
        return tensor.half().float()
    return tensor
