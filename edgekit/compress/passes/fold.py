"""Folds batch normalization into the convolution or linear layer before it, found by data flow, not by names."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.compress import graph, onnx_folding
from edgekit.compress.passes import CompressionPass
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    import torch
    from torch import fx

    from edgekit.model import Model
    from edgekit.progress import Progress


class Fold(CompressionPass, frozen=True):
    """Replace every batch normalization that follows one weighted layer; the network computes the same."""

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the folded model.

        Raises:
            CompressionError: not a PyTorch network.
        """
        progress("fold: batch normalization", 0, 1)
        if not isinstance(model.network, TorchNetwork):
            raise CompressionError(f"{model.name} is no PyTorch network", "give its Python workload instead")
        folded, count = fold(model)
        return replace(folded, lineage=(*model.lineage, Step(name="fold", measured={"folded": count})))


def fold(model: Model) -> tuple[Model, int]:
    """Fold on a deep copy of a network, PyTorch or ONNX; return it with the number of normalizations folded.

    A pair folds when the layer's output goes into the normalization only, and both stand once in the graph
    (Jacob et al. 2018, section 3.2). Other networks come back as they are.
    """
    if isinstance(model.network, OnnxNetwork):
        network, count = onnx_folding.folded(model.network)
        return replace(model, network=network), count
    if not isinstance(model.network, TorchNetwork):
        return model, 0
    with extra("compress"):
        import torch
    traced = trace(model).module(check_guards=False)
    pairs = _pairs(traced.graph)
    if isinstance(model.network.module, torch.fx.GraphModule):
        for layer, norm in pairs:
            _fold_nodes(traced, layer, norm)
        traced.recompile()
        return replace(model, network=replace(model.network, module=traced)), len(pairs)
    module = copy.deepcopy(model.network.module)
    count = sum(_fold_modules(module, layer, norm) for layer, norm in pairs)
    return replace(model, network=replace(model.network, module=module)), count


def _pairs(traced: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Find weighted layers with the normalizations that alone follow them."""
    found = []
    for layer, _ in graph.weighted(traced):
        followers = list(layer.users)
        if len(followers) != 1 or graph.operation(followers[0]) != "batch_norm":
            continue
        parts = (graph.argument(layer, 1), graph.argument(followers[0], 3))
        if all(part and graph.parameter(part) and len(part.users) == 1 for part in parts) and _folds(layer):
            found.append((layer, followers[0]))
    return found


def _folds(layer: fx.Node) -> bool:
    """Convolutions fold, and linear layers whose features lie on the axis that is normalized."""
    kind = graph.operation(layer)
    return kind in graph.CONVOLUTIONS or (kind == "linear" and layer.meta["val"].dim() == 2)


def _fold_modules(module: torch.nn.Module, layer: fx.Node, norm: fx.Node) -> bool:
    """Fold in a tree of modules, if the normalization is PyTorch's own: a subclass may do more than normalize."""
    from torch import nn

    owner, _, _ = str(graph.parameter(graph.argument(layer, 1))).rpartition(".")
    place, _, _ = str(graph.parameter(graph.argument(norm, 3))).rpartition(".")
    parts, stats = module.get_submodule(owner), module.get_submodule(place)
    if type(stats) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or not hasattr(parts, "bias"):
        return False
    parts.weight, parts.bias = _fused(module, layer, norm)
    parent, _, name = place.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Identity())
    return True


def _fold_nodes(module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    """Fold in a graph that has no modules left: a network that edgekit saved."""
    weight = graph.argument(layer, 1)
    owner, _, _ = str(graph.parameter(weight)).rpartition(".")
    parts = module.get_submodule(owner)
    parts.weight, parts.bias = _fused(module, layer, norm)
    if graph.argument(layer, 2) is None:
        with module.graph.inserting_before(layer):
            bias = module.graph.get_attr(f"{owner}.bias" if owner else "bias")
        layer.args = (*layer.args[:2], bias, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    place, _, _ = str(graph.parameter(graph.argument(norm, 3))).rpartition(".")
    module.graph.erase_node(norm)
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users and str(node.target).startswith(f"{place}."):
            module.graph.erase_node(node)
    module.delete_submodule(place)


def _fused(module: torch.nn.Module, layer: fx.Node, norm: fx.Node) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return weight and bias of a layer that normalizes by itself: both scaled by gamma / sqrt(variance + eps)."""
    import torch

    weight, bias = (_tensor(module, layer, position) for position in (1, 2))
    gamma, beta, mean, variance = (_tensor(module, norm, position) for position in (1, 2, 3, 4))
    if weight is None or mean is None or variance is None:
        raise CompressionError(f"batch normalization {norm.name} keeps no statistics, so it cannot be folded")
    scale = torch.rsqrt(variance + float(str(norm.args[7])))
    scale = scale if gamma is None else scale * gamma
    shifted = -mean * scale if bias is None else (bias - mean) * scale
    folded = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return torch.nn.Parameter(folded.detach()), torch.nn.Parameter(
        (shifted if beta is None else shifted + beta).detach()
    )


def _tensor(module: torch.nn.Module, node: fx.Node, position: int) -> torch.Tensor | None:
    """Return the stored tensor that a call takes at that position."""
    name = graph.parameter(graph.argument(node, position))
    if name is None:
        return None
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return found


PLUGIN: type[CompressionPass] = Fold
