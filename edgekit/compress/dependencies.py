"""Which channels leave a network together, how much each matters, and how they are taken out.

Families of channels come from the dependency graph (Fang et al. 2023, "DepGraph", section 3) of Torch-Pruning; whole
attention heads are families, too. Chooses no ratio and trains nothing.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgekit.compress import graph
from edgekit.compress.attention import Attention, attentions
from edgekit.errors import CompressionError
from edgekit.plugins import extra
from edgekit.sources import first_line
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import fx, nn

    from edgekit.model import Model
    from edgekit.tensors import Array

Importance = Literal["l1", "l2", "bn_scale", "taylor"]
Scope = Literal["global", "layer"]
BROKEN = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)
"""What Torch-Pruning and a network with wrong channels raise."""


@dataclass(frozen=True)
class Family:
    """Channels that can leave one by one, each with all that depends on it.

    ``name``: the layer that makes them. ``scores``: importance, normalized to a mean of 1. ``copies``: how often the
    channels repeat along the layer, as the groups of a grouped convolution do. ``cost``: multiply-accumulates that one
    channel takes, in all layers that make or read it.
    """

    name: str
    scores: Array
    copies: int = 1
    heads: Attention | None = None
    cost: float = 0.0

    @property
    def size(self) -> int:
        """How many channels can leave, at most all but one."""
        return len(self.scores)

    def kept(self, count: float, round_to: int) -> int:
        """Round how many channels stay to what hardware likes: never none, never more than there are."""
        unit = 1 if self.heads else _unit(self.size, round_to)
        return min(self.size, max(unit, round(count / unit) * unit))


def families(model: Model, module: nn.Module, importance: Importance, keep: tuple[str, ...] = ()) -> list[Family]:
    """Find all families of ``module``, a copy of the model's; ``keep`` names modules that stay as they are.

    Raises:
        CompressionError: the graph cannot be followed, or a score is no number; names the module.
    """
    heads = [one for one in attentions(module) if not any(_within(layer, keep) for layer in one.layers)]
    found = []
    with _named(model, module) as inside:
        tree = _tree(model, module)
        names = {part: name for name, part in module.named_modules()}
        score, costs = _scorer(importance), _costs(model, module)
        for group in tree.get_all_groups(ignored_layers=_held(model, module, keep), root_module_types=_roots()):
            inside[:] = [names[group[0].dep.target.module]]
            scores = score(group)
            if scores is not None and len(scores) > 1 and _is_complete(group, tree):
                copies = _copies(group)
                cost = copies * sum(_shares(group, tree, costs))
                found.append(Family(inside[0], scores.reshape(copies, -1).mean(0).numpy(), copies, cost=cost))
    for one in heads:
        if one.heads > 1:
            cost = sum(costs.get(module.get_submodule(name), 0) for name in (*one.layers, one.output)) / one.heads
            found.append(Family(one.name, one.scores(module, importance).numpy(), heads=one, cost=cost))
    _refuse_no_numbers(model, found, importance)
    return found


def _refuse_no_numbers(model: Model, found: list[Family], importance: Importance) -> None:
    """Raise CompressionError where channels cannot be told apart: scores of nothing but zeros have no mean of 1."""
    import numpy as np

    for one in found:
        if not np.isfinite(one.scores).all():
            what = {"taylor": "weights times gradients", "bn_scale": "batch norm's scales"}.get(importance, "weights")
            raise CompressionError(
                f"{model.name} cannot be pruned by {importance}: the {what} of {one.name!r} are all zero, or hold NaN",
                f"keep it as it is: keep_modules = [{one.name!r}]"
                + (', or set importance = "l2"' if importance not in ("l1", "l2") else ""),
            )


def choose(found: list[Family], ratio: float, scope: Scope, round_to: int, *, by_cost: bool = False) -> dict[str, int]:
    """Return how many channels stay of each family, when ``ratio`` of all leave: the least important, or of each.

    ``by_cost`` weighs importance by one over the root of the channel's cost: on the way to a share of MACs, the same
    damage buys more where channels are dear. The root, for importance is a mean of 1 in every family, not a loss.
    """
    import numpy as np

    if scope == "layer":
        return {one.name: one.kept(one.size * (1 - ratio), round_to) for one in found}
    scores = {one.name: one.scores / math.sqrt(one.cost if by_cost and one.cost else 1.0) for one in found}
    everything = np.sort(np.concatenate([*scores.values()]))
    limit = everything[min(len(everything) - 1, int(len(everything) * ratio))]
    # a tenth of every layer stays: a layer without channels ends the network, however small its weights are
    return {one.name: one.kept(max(one.size / 10, float((scores[one.name] >= limit).sum())), round_to) for one in found}


def cut(model: Model, module: nn.Module, found: list[Family], kept: Mapping[str, int]) -> None:
    """Take the least important channels of every family out of ``module``, in place.

    Raises:
        CompressionError: the smaller network does not compute; names the module that stands in the way.
    """
    with extra("compress"):
        import numpy as np
    with _named(model, module) as inside:
        tree = _tree(model, module)
        for one in found:
            inside[:] = [one.name]
            gone = np.sort(np.argsort(one.scores, kind="stable")[: one.size - kept[one.name]])
            if one.heads is None and len(gone):
                layer = module.get_submodule(one.name)
                indices = [int(i) + copy * one.size for copy in range(one.copies) for i in gone]
                tree.get_pruning_group(layer, tree.get_pruner_of_module(layer).prune_out_channels, indices).prune()
        for one in found:
            if one.heads is not None:
                order = np.argsort(one.scores, kind="stable")
                one.heads.remove(module, [int(i) for i in order[: one.size - kept[one.name]]])
    refuse_broken(model, module)


def refuse_broken(model: Model, module: nn.Module) -> None:
    """Raise CompressionError where the module does not compute outputs of the model's sizes."""
    with extra("compress"):
        import torch
    with _named(model, module), torch.no_grad():
        result = module(*example(model))
    outputs = result if isinstance(result, tuple | list) else (result,)
    for spec, output in zip(model.outputs, outputs, strict=True):
        if any(n not in (-1, m) for n, m in zip(spec.shape[1:], output.shape[1:], strict=True)):
            raise CompressionError(
                f"{model.name} cannot be pruned: output {spec.name!r} would become {list(output.shape[1:])}",
                'keep the layer that makes it: keep_modules = ["its.name"]',
            )


def size(model: Model, module: nn.Module) -> tuple[float, float]:
    """Return multiply-accumulates of one sample, and parameters."""
    with extra("compress"):
        import torch_pruning
    macs, parameters = torch_pruning.utils.count_ops_and_params(module.eval(), example(model))
    return float(macs), float(parameters)


def example(model: Model) -> tuple[torch.Tensor, ...]:
    """Return one sample: a real one where there is data, for integers may be indices."""
    with extra("compress"):
        import torch
    if model.data is not None:
        return tuple(torch.as_tensor(model.data.calibration.head(1).inputs[spec.name]) for spec in model.inputs)
    shapes = [[max(1, n) for n in spec.shape[1:]] for spec in model.inputs]
    return tuple(
        torch.zeros(1, *shape, dtype=getattr(torch, spec.dtype))
        for shape, spec in zip(shapes, model.inputs, strict=True)
    )


def channel_padding(model: Model) -> list[fx.Node]:
    """Find where zeros are padded onto channels, as shortcuts without weights do: no graph follows those channels."""
    traced = trace(model).module(check_guards=False)
    return [node for node in traced.graph.nodes if _pads_channels(node)]


def _tree(model: Model, module: nn.Module) -> Any:  # noqa: ANN401  # torch_pruning has no types
    with extra("compress"):
        import torch_pruning
    return torch_pruning.DependencyGraph().build_dependency(module.eval(), example_inputs=example(model))


def _roots() -> tuple[Any, ...]:
    from torch import nn

    return (nn.modules.conv._ConvNd, nn.Linear)  # noqa: SLF001  # torch has no public name for all convolutions


def _scorer(importance: Importance) -> Any:  # noqa: ANN401  # torch_pruning has no types
    with extra("compress"):
        from torch_pruning import importance as kinds
    if importance == "bn_scale":
        return kinds.BNScaleImportance()
    if importance == "taylor":
        return kinds.GroupTaylorImportance()
    return kinds.GroupMagnitudeImportance(p=1 if importance == "l1" else 2)


def _costs(model: Model, module: nn.Module) -> dict[nn.Module, float]:
    """Return the multiply-accumulates of every convolution and linear layer for one sample."""
    import torch

    found: dict[nn.Module, float] = {}

    def count(layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        found[layer] = float(layer.weight.numel()) * output.numel() / _width(layer)  # type: ignore[operator]  # a tensor

    hooks = [part.register_forward_hook(count) for part in module.modules() if isinstance(part, _roots())]
    with torch.no_grad():
        module(*example(model))
    for hook in hooks:
        hook.remove()
    return found


def _width(layer: Any) -> int:  # noqa: ANN401  # a convolution or a linear layer
    return int(layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)


def _shares(group: Any, tree: Any, costs: Mapping[nn.Module, float]) -> Iterator[float]:  # noqa: ANN401  # torch_pruning has no types
    """Give what one channel of a group costs in each layer that makes or reads it."""
    for dep, indices in group:
        layer = dep.target.module
        if layer in costs:
            is_output = tree.is_out_channel_pruning_fn(dep.handler)
            width = (tree.get_out_channels if is_output else tree.get_in_channels)(layer)
            yield costs[layer] * len(indices) / width / max(1, len(group[0].idxs))


def _copies(group: Any) -> int:  # noqa: ANN401  # torch_pruning has no types
    """Return how often the channels repeat: by the groups of a convolution or norm, or by the heads of attention."""
    from torch import nn

    most = 1
    for dep, _ in group:
        layer = dep.target.module
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups != layer.out_channels:  # noqa: SLF001  # as above
            most = max(most, layer.groups)
        elif isinstance(layer, nn.GroupNorm):
            most = max(most, layer.num_groups)
        elif isinstance(layer, nn.MultiheadAttention):
            most = max(most, layer.num_heads)
    return most


def _is_complete(group: Any, tree: Any) -> bool:  # noqa: ANN401  # torch_pruning has no types
    """Say whether every channel of the root leads to channels that are there; a pad of channels breaks that."""
    for dep, indices in group:
        is_output = tree.is_out_channel_pruning_fn(dep.handler)
        width = (tree.get_out_channels if is_output else tree.get_in_channels)(dep.target.module)
        if width is not None and indices and max(indices) >= width:
            return False
    return True


def _held(model: Model, module: nn.Module, keep: tuple[str, ...]) -> list[nn.Module]:
    """Find the layers whose channels have to stay: before outputs and padded channels, embeddings, heads, the named.

    The graph is walked back from the outputs and from the padding to the layers that made the channels.
    """
    from torch import nn

    known = dict(module.named_modules())
    for name in keep:
        if name not in known:
            raise CompressionError(
                f"keep_modules names {name!r}, which {model.name} lacks", "name modules, as layer1.0.conv1"
            )
    traced = trace(model).module(check_guards=False)
    ends = list(traced.graph.output_node().all_input_nodes)
    ends += [source for node in traced.graph.nodes if _pads_channels(node) for source in node.all_input_nodes]
    names = _makers(ends, dict(graph.weighted(traced.graph)))
    embeddings = [name for name, part in known.items() if isinstance(part, nn.Embedding)]
    inside = [name for name in known if _within(name, keep)]
    heads = [layer for one in attentions(module) for layer in one.layers]
    return [module.get_submodule(name) for name in sorted({*names, *embeddings, *inside, *heads})]


def _makers(ends: list[fx.Node], weights: Mapping[fx.Node, str]) -> set[str]:
    found: set[str] = set()
    seen = set(ends)
    while ends:
        node = ends.pop()
        if node in weights:
            found.add(weights[node].rpartition(".")[0])
            continue
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        ends += new
    return found


def _pads_channels(node: fx.Node) -> bool:
    if graph.operation(node) not in ("pad", "constant_pad_nd") or len(node.args) < 2:
        return False
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]  # the first argument of a pad is a node
    amounts = list(node.args[1])  # type: ignore[arg-type]  # the second is a list of integers
    return any(amounts[2 * (rank - 2) : 2 * (rank - 2) + 2])


def _within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _unit(size: int, round_to: int) -> int:
    """Return what the number of channels is a multiple of; 0 chooses up to 8, but at least four steps a layer."""
    return round_to or min(8, 1 << max(0, int(math.log2(size / 4)) if size >= 4 else 0))


@contextmanager
def _named(model: Model, module: nn.Module) -> Iterator[list[str]]:
    """Turn what a network raises into an error that names the module in which it happened."""
    inside: list[str] = []
    hooks = []
    for name, part in module.named_modules():
        hooks += [
            part.register_forward_pre_hook(lambda *_, name=name: inside.append(name)),
            part.register_forward_hook(lambda *_: inside.__delitem__(-1)),
        ]
    try:
        yield inside
    except BROKEN as error:
        failed = inside[-1:]  # the module that was entered last and never left
        where = (
            f"the module {failed[0]!r} stands in the way" if failed and failed[0] else "its graph cannot be followed"
        )
        raise CompressionError(
            f"{model.name} cannot be pruned: {where}: {first_line(error)}",
            f"keep it as it is: keep_modules = {failed or ['its.name']}, or drop the pass from the recipe",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
