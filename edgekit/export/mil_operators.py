"""What each operator of a Core ML program computes, in PyTorch. Knows no file; `mil` reads programs and runs them.

Sources: the operators' definitions in the documentation of coremltools (MIL ops); names of arguments are theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Values: TypeAlias = dict[str, Any]
    Operator: TypeAlias = Callable[[Values], torch.Tensor | list[torch.Tensor]]


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


def _stack(v: Values) -> torch.Tensor:
    import torch

    return torch.stack(v["values"], v["axis"])


def _slice(v: Values) -> torch.Tensor:
    """Cut each axis from begin to end by stride, all of it where masked; squeezed axes keep the entry at begin."""
    x = v["x"]
    none = [False] * x.dim()
    masks = [v.get(f"{name}_mask") or none for name in ("begin", "end", "squeeze")]
    stride = v.get("stride") or [1] * x.dim()
    index: list[Any] = []
    for axis, (begin, end, step) in enumerate(zip(v["begin"], v["end"], stride, strict=True)):
        if masks[2][axis]:
            index.append(begin)
        elif step < 0:
            raise NotImplementedError("the interpreter lacks slices that go backwards")
        else:
            index.append(slice(None if masks[0][axis] else begin, None if masks[1][axis] else end, step))
    cut: torch.Tensor = x[tuple(index)]
    return cut


def _gather(v: Values) -> torch.Tensor:
    import torch

    if v.get("batch_dims"):
        raise NotImplementedError("the interpreter lacks gather with batch_dims")
    x, indices = torch.as_tensor(v["x"]), torch.as_tensor(v["indices"]).long()
    axis = v.get("axis", 0) % x.dim()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    taken = x.index_select(axis, indices.reshape(-1))
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _select(v: Values) -> torch.Tensor:
    import torch

    return torch.where(torch.as_tensor(v["cond"]).bool(), torch.as_tensor(v["a"]), torch.as_tensor(v["b"]))


def _pair(name: str) -> Operator:
    """Return the function of PyTorch of that name over ``x`` and ``y``, either of which may be a constant."""

    def compute(v: Values) -> torch.Tensor:
        import torch

        found: torch.Tensor = getattr(torch, name)(torch.as_tensor(v["x"]), torch.as_tensor(v["y"]))
        return found

    return compute


def _instance_norm(v: Values) -> torch.Tensor:
    import torch

    return torch.nn.functional.instance_norm(v["x"], weight=v.get("gamma"), bias=v.get("beta"), eps=v["epsilon"])


def _upsampled(v: Values) -> torch.Tensor:
    import torch

    factors = (float(v["scale_factor_height"]), float(v["scale_factor_width"]))
    return torch.nn.functional.interpolate(v["x"], scale_factor=factors, mode="nearest")


def _conv_transpose(v: Values) -> torch.Tensor:
    """Compute all that the kernel reaches, then cut off the padding; ``output_shape`` says how much is left."""
    import torch

    spatial = v["weight"].dim() - 2
    if v["pad_type"] not in ("valid", "custom") or spatial > 2:
        raise NotImplementedError(f"the interpreter lacks conv_transpose {spatial}d with pad_type {v['pad_type']!r}")
    function = (torch.nn.functional.conv_transpose1d, torch.nn.functional.conv_transpose2d)[spatial - 1]
    pad = v["pad"] if v["pad_type"] == "custom" else [0] * 2 * spatial
    full = function(v["x"], v["weight"], v.get("bias"), tuple(v["strides"]), 0, 0, v["groups"], tuple(v["dilations"]))
    wanted = [full.shape[axis + 2] - pad[2 * axis] - pad[2 * axis + 1] for axis in range(spatial)]
    wanted = list(v["output_shape"])[2:] if v.get("output_shape") else wanted
    for axis, size in enumerate(wanted):
        if pad[2 * axis] + size > full.shape[axis + 2]:
            raise NotImplementedError("the interpreter lacks conv_transpose with output padding")
        full = full.narrow(axis + 2, pad[2 * axis], size)
    return full


def _tile(v: Values) -> torch.Tensor:
    tiled: torch.Tensor = v["x"].repeat(*v["reps"])
    return tiled


OPERATORS: dict[str, Operator] = {
    "abs": lambda v: v["x"].abs(),
    "add": lambda v: v["x"] + v["y"],
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": lambda v: v["x"].clamp(v["alpha"], v["beta"]),
    "concat": _concat,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "cos": lambda v: v["x"].cos(),
    "elu": lambda v: v["x"].where(v["x"] > 0, v["alpha"] * v["x"].expm1()),
    "equal": _pair("eq"),
    "erf": lambda v: v["x"].erf(),
    "exp": lambda v: v["x"].exp(),
    "expand_dims": lambda v: v["x"].reshape(_expanded(v["x"].shape, v["axes"])),
    "floor": lambda v: v["x"].floor(),
    "gather": _gather,
    "gelu": _gelu,
    "greater": _pair("gt"),
    "greater_equal": _pair("ge"),
    "identity": lambda v: v["x"],
    "instance_norm": _instance_norm,
    "inverse": lambda v: 1 / (v["x"] + v["epsilon"]),
    "layer_norm": _layer_norm,
    "leaky_relu": lambda v: v["x"].where(v["x"] > 0, v["alpha"] * v["x"]),
    "less": _pair("lt"),
    "less_equal": _pair("le"),
    "linear": _linear,
    "log": lambda v: (v["x"] + v["epsilon"]).log(),
    "logical_and": _pair("logical_and"),
    "logical_not": lambda v: v["x"].logical_not(),
    "logical_or": _pair("logical_or"),
    "matmul": _matmul,
    "max_pool": _max_pool,
    "maximum": _pair("maximum"),
    "minimum": _pair("minimum"),
    "mul": lambda v: v["x"] * v["y"],
    "not_equal": _pair("ne"),
    "pad": _pad,
    "pow": _pair("pow"),
    "real_div": lambda v: v["x"] / v["y"],
    "reduce_argmax": lambda v: v["x"].argmax(v["axis"], keepdim=v["keep_dims"]),
    "reduce_l2_norm": lambda v: v["x"].norm(dim=v["axes"], keepdim=v["keep_dims"]),
    "reduce_max": lambda v: v["x"].amax(v["axes"], keepdim=v["keep_dims"]),
    "reduce_mean": lambda v: v["x"].mean(v["axes"], keepdim=v["keep_dims"]),
    "reduce_min": lambda v: v["x"].amin(v["axes"], keepdim=v["keep_dims"]),
    "reduce_sum": lambda v: v["x"].sum(v["axes"], keepdim=v["keep_dims"]),
    "relu": lambda v: v["x"].clamp(min=0),
    "relu6": lambda v: v["x"].clamp(0, 6),
    "reshape": lambda v: v["x"].reshape(v["shape"]),
    "rsqrt": lambda v: (v["x"] + v["epsilon"]).rsqrt(),
    "select": _select,
    "sigmoid": lambda v: v["x"].sigmoid(),
    "sigmoid_hard": lambda v: (v["x"] * v["alpha"] + v["beta"]).clamp(0, 1),
    "silu": lambda v: v["x"] * v["x"].sigmoid(),
    "sin": lambda v: v["x"].sin(),
    "slice_by_index": _slice,
    "softmax": lambda v: v["x"].softmax(v["axis"]),
    "softplus": lambda v: v["x"].clamp(min=0) + (-v["x"].abs()).exp().log1p(),
    "split": lambda v: list(v["x"].split(v["split_sizes"], v["axis"])),
    "sqrt": lambda v: v["x"].sqrt(),
    "squeeze": lambda v: v["x"].squeeze(tuple(v["axes"])),
    "stack": _stack,
    "sub": lambda v: v["x"] - v["y"],
    "tanh": lambda v: v["x"].tanh(),
    "thresholded_relu": lambda v: v["x"].where(v["x"] >= v["alpha"], 0 * v["x"]),
    "tile": _tile,
    "transpose": lambda v: v["x"].permute(v["perm"]),
    "upsample_nearest_neighbor": _upsampled,
}


def _expanded(shape: tuple[int, ...], axes: list[int]) -> list[int]:
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes}
    sizes = iter(shape)
    return [1 if axis in new else next(sizes) for axis in range(rank)]
