"""Where a scale a channel may wander from one layer into the next without changing what the network computes.

A seam is a value whose every taker multiplies it with a stored weight, and whose maker has parameters that scale it
channel by channel: a normalization with a weight, a product with a parameter, or a convolution or linear layer, on
the way perhaps a ReLU or a maximum, which let positive factors pass. Knows no plan and chooses no factors.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekit.compress import graph
from edgekit.compress.layers import layers
from edgekit.errors import CompressionError
from edgekit.model import TorchNetwork
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import fx

    from edgekit.compress.layer import Layer
    from edgekit.model import Model
    from edgekit.tensors import Array

PASSES_FACTORS = ("relu", "relu_", "max_pool1d", "max_pool2d", "contiguous", "clone", "alias", "dropout")
"""Operations that give ``f(s * x) == s * f(x)`` for positive ``s``, channel by channel, and keep the axes."""

NORMALIZATIONS = {"layer_norm": (2, 3), "rms_norm": (2,)}
"""Where their parameters lie among the arguments."""


@dataclass(frozen=True)
class Part:
    """A parameter of a maker, and which of its axes counts the channels of the value."""

    name: str
    axis: int


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A value of ``size`` channels: ``parts`` scale it where it is made, ``takers`` are all that multiply with it.

    ``source`` is the name that `Layer.source` has; ``maker`` is the layer that makes it, None for a normalization;
    ``through`` are the operations between, the maker's side first.
    """

    source: str
    size: int
    parts: tuple[Part, ...]
    takers: tuple[Layer, ...]
    maker: Layer | None = None
    through: tuple[str, ...] = ()


def seams(model: Model) -> tuple[Seam, ...]:
    """Find the seams of a PyTorch network, in the order of execution.

    Raises:
        CompressionError: not a PyTorch network.
    """
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(
            f"{model.name} is no PyTorch network: factors cannot be moved between its layers",
            "give its Python workload instead of the file",
        )
    found = {layer.node: layer for layer in layers(model)}
    traced = trace(model).module(check_guards=False)
    fetched = Counter(str(node.target) for node in traced.graph.find_nodes(op="get_attr") for _ in node.users)
    shared = _shared(traced) | {name for name, count in fetched.items() if count > 1}
    made = (_seam(node, found, traced) for node in traced.graph.nodes if node.op == "call_function")
    return tuple(seam for seam in made if seam is not None and not _names(seam) & shared)


def _names(seam: Seam) -> set[str]:
    return {part.name for part in seam.parts} | {taker.weight for taker in seam.takers}


def _shared(module: torch.nn.Module) -> set[str]:
    """Name the parameters that have several names: a factor in one place would show in another."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _seam(node: fx.Node, found: Mapping[str, Layer], traced: fx.GraphModule) -> Seam | None:
    """Return the seam at the value of a node, None where there is none."""
    takers = tuple(found[user.name] for user in node.users if user.name in found)
    if not takers or len(takers) != len(node.users) or any(_inputs(taker) == 0 for taker in takers):
        return None
    size = _inputs(takers[0])
    start, through = _start(node)
    maker = found.get(start.name)
    last = -1 if takers[0].kind == "linear" else 1
    parts = tuple(_parts(start, maker, traced, on_last_axis=last == -1))
    sizes = {int(_parameter(traced, part.name).shape[part.axis]) for part in parts} | {_inputs(t) for t in takers}
    if not parts or sizes != {size} or int(node.meta["val"].shape[last]) != size:
        return None
    if last == -1 and any("pool" in name for name in through):
        return None  # it would take the largest of several channels
    return Seam(source=node.name, size=size, parts=parts, takers=takers, maker=maker, through=through)


def _start(node: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
    """Walk up from a value to what may scale it, through operations that let factors pass."""
    through: list[str] = []
    while graph.operation(node) in PASSES_FACTORS:
        before = graph.argument(node, 0)
        if before is None or len(before.users) != 1:
            break
        through.insert(0, graph.operation(node))
        node = before
    return node, tuple(through)


def _parts(start: fx.Node, maker: Layer | None, traced: fx.GraphModule, *, on_last_axis: bool) -> Iterator[Part]:
    """Give the parameters that scale the value of a node along its channels."""
    kind = graph.operation(start)
    if maker is not None:
        bias_is_computed = maker.bias is None and graph.argument(start, 2) is not None
        if maker.kind == "transposed" or (maker.kind == "linear") != on_last_axis or bias_is_computed:
            return
        yield Part(maker.weight, maker.axis)
        if maker.bias is not None:
            yield Part(maker.bias, 0)
        return
    if not on_last_axis:
        return
    positions = NORMALIZATIONS.get(kind, ())
    if kind == "mul":
        positions = tuple(p for p in (0, 1) if graph.parameter(graph.argument(start, p)))
    names = [graph.parameter(graph.argument(start, position)) for position in positions]
    for name in names:
        if name is not None and names[0] is not None and _parameter(traced, name).dim() == 1:
            yield Part(name, 0)


def _inputs(layer: Layer) -> int:
    """Return how many channels a layer takes; 0 where factors cannot be multiplied into its weight."""
    if layer.kind == "transposed":
        return 0
    each = layer.values.shape[1]
    return int(each * layer.groups)


def rescaled(model: Model, found: tuple[Seam, ...], factors: Mapping[str, Array]) -> Model:
    """Return a copy that computes the same, with the values of seams divided by ``factors``, by `Seam.source`.

    Factors [channels] are positive. What makes a value is divided by them, what takes it is multiplied.
    """
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(f"{model.name} is no PyTorch network", "give its Python workload instead of the file")
    with extra("compress"):
        import torch
    traced = isinstance(model.network.module, torch.fx.GraphModule)
    module = trace(model).module(check_guards=False) if traced else copy.deepcopy(model.network.module).eval()
    for seam in found:
        if seam.source not in factors:
            continue
        own = torch.as_tensor(factors[seam.source], dtype=torch.float32)
        with torch.no_grad():
            for part in seam.parts:
                tensor = _parameter(module, part.name)
                tensor.div_(own.reshape([-1 if axis == part.axis else 1 for axis in range(tensor.dim())]))
            for taker in seam.takers:
                own_factors = for_taker(taker, factors[seam.source])
                _parameter(module, taker.weight).mul_(torch.from_numpy(own_factors))
    return replace(model, network=replace(model.network, module=module))


def for_taker(taker: Layer, factors: Array) -> Array:
    """Return the factors in a shape that multiplies `Layer.values`, [outputs, inputs / groups, 1 …]."""
    import numpy as np

    outputs, each = taker.values.shape[:2]
    wide = np.repeat(factors.reshape(taker.groups, each), outputs // taker.groups, axis=0)
    found: Array = wide.astype(np.float32).reshape(outputs, each, *[1] * (taker.values.ndim - 2))
    return found


def _parameter(module: torch.nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return found
