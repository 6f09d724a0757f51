"""One view of the layers that multiply with a weight, whether PyTorch or ONNX computes them.

Layers are found in execution order, and put back by `with_parameters`. Knows no plan: `walking` runs a network layer
by layer, as planned.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.compress import graph, onnx_layers
from edgekit.compress.layer import Change, Layer
from edgekit.errors import CompressionError
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import fx

    from edgekit.model import Model


def layers(model: Model) -> tuple[Layer, ...]:
    """Find the layers with a stored weight, in the order in which they compute.

    Raises:
        CompressionError: a language model without data, whose network is not at hand.
    """
    if isinstance(model.network, OnnxNetwork):
        return tuple(onnx_layers.layers_of(model.network.proto()))
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(
            f"{model.name} has no network to look into",
            "give the Hugging Face folder with --data, or a Python workload",
        )
    traced = trace(model).module(check_guards=False)
    return layers_of(traced, _public(traced.graph, model))


def layers_of(traced: fx.GraphModule, public: Mapping[str, str]) -> tuple[Layer, ...]:
    """Find the layers of a traced graph; ``public`` gives the public names of its placeholders."""
    return tuple(_torch_layer(traced, node, name, public) for node, name in graph.weighted(traced.graph))


def _public(traced: fx.Graph, model: Model) -> dict[str, str]:
    places = traced.find_nodes(op="placeholder")
    return {node.name: spec.name for node, spec in zip(places, model.inputs, strict=True)}


def _torch_layer(traced: fx.GraphModule, node: fx.Node, weight: str, public: Mapping[str, str]) -> Layer:
    import numpy as np

    bias = graph.parameter(graph.argument(node, 2))
    axis = graph.weight_axis(node)
    stored = _tensor(traced, weight).detach().float().numpy()
    source = graph.argument(node, 0)
    plain = Layer(
        kind="linear",
        weight=weight,
        bias=bias,
        node=node.name,
        source="" if source is None else public.get(source.name, source.name),
        values=np.ascontiguousarray(np.moveaxis(stored, axis, 0)),
        offsets=None if bias is None else _tensor(traced, bias).detach().float().numpy(),
        axis=axis,
    )
    return plain if graph.operation(node) == "linear" else _sliding(plain, node, stored.shape[2:])


def _sliding(layer: Layer, node: fx.Node, kernel: tuple[int, ...]) -> Layer:
    """Add to a layer how its convolution slides."""
    size = len(kernel)
    if graph.operation(node) in graph.TRANSPOSED:
        stride, padding, extra_padding, groups, dilation = _arguments(node, ((1,), (0,), (0,), 1, (1,)))
        return replace(
            layer,
            kind="transposed",
            stride=_each(stride, size),
            padding=_each(padding, size),
            output_padding=_each(extra_padding, size),
            groups=groups,
            dilation=_each(dilation, size),
        )
    stride, padding, dilation, groups = _arguments(node, ((1,), (0,), (1,), 1))
    dilation = _each(dilation, size)
    return replace(
        layer,
        kind="conv",
        stride=_each(stride, size),
        padding=_same(padding, kernel, dilation) if isinstance(padding, str) else _each(padding, size),
        dilation=dilation,
        groups=groups,
    )


def _arguments(node: fx.Node, defaults: tuple[object, ...]) -> list:  # type: ignore[type-arg]  # ints, tuples, a word
    """Return the arguments behind weight and bias; torch.export leaves out those that have their default."""
    given = list(node.args[3:])
    return [*given, *defaults[len(given) :]]


def _each(value: int | list[int] | tuple[int, ...], size: int) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(int(n) for n in value)
    return found * size if len(found) == 1 else found


def _same(word: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Return the padding at both ends that PyTorch's ``same`` and ``valid`` mean."""
    if word == "valid":
        return (0,) * len(kernel)
    whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return (*(n // 2 for n in whole), *(n - n // 2 for n in whole))


def _tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return found


def with_parameters(model: Model, changes: Mapping[str, Change]) -> Model:
    """Return a copy of the model whose layers, by the names of their weights, have new weights and biases.

    A layer without a bias gets one where ``offsets`` are given and its network can hold one.
    """
    found = {layer.weight: layer for layer in layers(model)}
    if isinstance(model.network, OnnxNetwork):
        return replace(model, network=onnx_layers.with_parameters(model.network, found, changes))
    if not isinstance(model.network, TorchNetwork):
        return model
    with extra("compress"):
        import torch
    traced = isinstance(model.network.module, torch.fx.GraphModule)
    # a traced graph shares its tensors with the network it came from
    module = copy.deepcopy(trace(model).module(check_guards=False) if traced else model.network.module)
    if not traced:  # parameters that several names share keep being one
        module.eval()
    for name, change in changes.items():
        _put(module, found[name], change)
    if isinstance(module, torch.fx.GraphModule):
        module.recompile()
    return replace(model, network=replace(model.network, module=module))


def _put(module: torch.nn.Module, layer: Layer, change: Change) -> None:
    import numpy as np
    import torch

    with torch.no_grad():
        if change.values is not None:
            stored = np.ascontiguousarray(np.moveaxis(change.values, 0, layer.axis))
            _tensor(module, layer.weight).copy_(torch.from_numpy(stored))
        if change.offsets is None:
            return
        offsets = torch.from_numpy(np.ascontiguousarray(change.offsets, np.float32))
        if layer.bias is not None:
            _tensor(module, layer.bias).copy_(offsets)
        else:
            _add_bias(module, layer, offsets)


def _add_bias(module: torch.nn.Module, layer: Layer, offsets: torch.Tensor) -> None:
    """Give a layer a bias that had none."""
    import torch

    owner, _, _ = layer.weight.rpartition(".")
    place = module.get_submodule(owner)
    if isinstance(module, torch.fx.GraphModule):
        node = next(n for n in module.graph.nodes if n.name == layer.node)
        place.register_parameter("bias", torch.nn.Parameter(offsets.clone()))
        with module.graph.inserting_before(node):
            fetched = module.graph.get_attr(f"{owner}.bias" if owner else "bias")
        node.args = (*node.args[:2], fetched, *node.args[3:])
    elif getattr(place, "bias", "") is None:
        place.bias = torch.nn.Parameter(offsets.clone())
    else:
        raise CompressionError(f"{layer.weight!r} belongs to a module that takes no bias", "leave that layer out")
