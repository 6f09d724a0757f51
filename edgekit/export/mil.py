"""Computes a Core ML package from its bytes, where no Core ML runs. Knows its operators, not how it was made.

The package is read back into a MIL program (coremltools' own loader), and its operators are computed in float32 and
rounded to float16 where the program says so. This proves weights, layouts and wiring, not Apple's kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from edgekit.export.quiet import silence
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from edgekit.tensors import Array

    Values: TypeAlias = dict[str, Any]
    Operator: TypeAlias = Callable[[Values], torch.Tensor | list[torch.Tensor]]


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
    with torch.no_grad():
        samples = [_one(function, {n: a[i : i + 1] for n, a in inputs.items()}) for i in range(count)]
    return {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}


def _read(package: Path) -> Any:  # noqa: ANN401  # coremltools is untyped
    with extra("export"), silence():
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.proto import Model_pb2
    folder = package / "Data/com.apple.CoreML"
    spec = Model_pb2.Model.FromString((folder / "model.mlmodel").read_bytes())
    with silence():
        return load(spec, spec.specificationVersion, str(folder / "weights")).functions["main"]


def _one(function: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ANN401  # coremltools is untyped
    import torch

    values: dict[str, Any] = {name: torch.as_tensor(array) for name, array in inputs.items()}
    for op in function.operations:
        if op.op_type == "const":
            continue
        results = _compute(op, values)
        for output, result in zip(op.outputs, results, strict=True):
            values[output.name] = result
    return {v.name: values[v.name].float().numpy() for v in function.outputs}


def _compute(op: Any, values: Mapping[str, Any]) -> list[torch.Tensor]:  # noqa: ANN401  # coremltools is untyped
    import torch

    if op.op_type.startswith("constexpr_"):
        return [torch.as_tensor(op.materialized_val_inference()).float()]
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


def _cast(v: Values) -> torch.Tensor:
    import torch

    kinds = {"fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool, "uint8": torch.uint8}
    kinds |= {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
    if v["dtype"] not in kinds:
        raise NotImplementedError(f"the interpreter lacks a cast to {v['dtype']}")
    tensor = torch.as_tensor(v["x"]).to(kinds[v["dtype"]])
    return tensor.float() if tensor.is_floating_point() else tensor


def _padded(v: Values, spatial: int) -> Any:  # noqa: ANN401  # a tensor
    """Apply the padding that a convolution or pooling asks for; ``same`` pads more at the end."""
    import torch

    kind, x = v["pad_type"], v["x"]
    if kind == "valid":
        return x
    if kind != "custom":
        raise NotImplementedError(f"the interpreter lacks pad_type {kind!r}")
    pairs = [v["pad"][2 * i : 2 * i + 2] for i in range(spatial)]
    fill = float("-inf") if v.get("is_max") else 0.0
    return torch.nn.functional.pad(x, [n for pair in reversed(pairs) for n in pair], value=fill)


def _pad(v: Values) -> torch.Tensor:
    """Pad the last axes; MIL lists begin and end from the first padded axis on, PyTorch from the last."""
    import torch

    modes = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}
    amounts = v["pad"]
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    while len(pairs) > 1 and pairs[0] == [0, 0]:
        pairs.pop(0)  # PyTorch mirrors the spatial axes only
    flat = [n for pair in reversed(pairs) for n in pair]
    mode = modes[v.get("mode", "constant")]
    if mode == "constant":
        return torch.nn.functional.pad(v["x"], flat, value=float(v.get("constant_val", 0.0)))
    return torch.nn.functional.pad(v["x"], flat, mode=mode)


def _conv(v: Values) -> torch.Tensor:
    import torch

    spatial = v["weight"].dim() - 2
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[spatial - 1]
    x = _padded(v, spatial)
    return function(x, v["weight"], v.get("bias"), tuple(v["strides"]), 0, tuple(v["dilations"]), v["groups"])


def _max_pool(v: Values) -> torch.Tensor:
    import torch

    _refuse_ceil(v)
    return torch.nn.functional.max_pool2d(_padded({**v, "is_max": True}, 2), v["kernel_sizes"], v["strides"])


def _avg_pool(v: Values) -> torch.Tensor:
    import torch

    _refuse_ceil(v)
    total = torch.nn.functional.avg_pool2d(_padded(v, 2), v["kernel_sizes"], v["strides"])
    if not v["exclude_padding_from_average"]:
        return total
    share = torch.nn.functional.avg_pool2d(
        _padded({**v, "x": torch.ones_like(v["x"])}, 2), v["kernel_sizes"], v["strides"]
    )
    return total / share


def _refuse_ceil(v: Values) -> None:
    if v.get("ceil_mode"):
        raise NotImplementedError("the interpreter lacks ceil_mode in pooling")


def _batch_norm(v: Values) -> torch.Tensor:
    import torch

    return torch.nn.functional.batch_norm(
        v["x"], v["mean"], v["variance"], v.get("gamma"), v.get("beta"), eps=v["epsilon"]
    )


def _layer_norm(v: Values) -> torch.Tensor:
    import torch

    shape = [v["x"].shape[axis] for axis in v["axes"]]
    return torch.nn.functional.layer_norm(v["x"], shape, v.get("gamma"), v.get("beta"), v["epsilon"])


def _matmul(v: Values) -> torch.Tensor:
    x = v["x"].transpose(-1, -2) if v.get("transpose_x") else v["x"]
    y = v["y"].transpose(-1, -2) if v.get("transpose_y") else v["y"]
    product: torch.Tensor = x @ y
    return product


def _linear(v: Values) -> torch.Tensor:
    import torch

    return torch.nn.functional.linear(v["x"], v["weight"], v.get("bias"))


def _gelu(v: Values) -> torch.Tensor:
    import torch

    modes = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    if v.get("mode", "EXACT") not in modes:
        raise NotImplementedError(f"the interpreter lacks gelu {v['mode']!r}")
    return torch.nn.functional.gelu(v["x"], approximate=modes[v.get("mode", "EXACT")])


def _concat(v: Values) -> torch.Tensor:
    import torch

    return torch.cat(v["values"], v["axis"])


OPERATORS: dict[str, Operator] = {
    "add": lambda v: v["x"] + v["y"],
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": lambda v: v["x"].clamp(v["alpha"], v["beta"]),
    "concat": _concat,
    "conv": _conv,
    "expand_dims": lambda v: v["x"].reshape(_expanded(v["x"].shape, v["axes"])),
    "gelu": _gelu,
    "identity": lambda v: v["x"],
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _max_pool,
    "mul": lambda v: v["x"] * v["y"],
    "pad": _pad,
    "real_div": lambda v: v["x"] / v["y"],
    "reduce_mean": lambda v: v["x"].mean(v["axes"], keepdim=v["keep_dims"]),
    "reduce_sum": lambda v: v["x"].sum(v["axes"], keepdim=v["keep_dims"]),
    "relu": lambda v: v["x"].clamp(min=0),
    "relu6": lambda v: v["x"].clamp(0, 6),
    "reshape": lambda v: v["x"].reshape(v["shape"]),
    "sigmoid": lambda v: v["x"].sigmoid(),
    "sigmoid_hard": lambda v: (v["x"] * v["alpha"] + v["beta"]).clamp(0, 1),
    "silu": lambda v: v["x"] * v["x"].sigmoid(),
    "softmax": lambda v: v["x"].softmax(v["axis"]),
    "split": lambda v: list(v["x"].split(v["split_sizes"], v["axis"])),
    "squeeze": lambda v: v["x"].squeeze(tuple(v["axes"])),
    "sub": lambda v: v["x"] - v["y"],
    "tanh": lambda v: v["x"].tanh(),
    "transpose": lambda v: v["x"].permute(v["perm"]),
}


def _expanded(shape: tuple[int, ...], axes: list[int]) -> list[int]:
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes}
    sizes = iter(shape)
    return [1 if axis in new else next(sizes) for axis in range(rank)]
