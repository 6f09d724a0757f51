"""Structured pruning: whole channels leave the network, which then learns to do without them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress import graph
from edgekit.compress.losses import mimicry, truth_of
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes._learning import trainable
from edgekit.compress.training import Lesson, Schedule, train
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    import torch
    from torch import fx

    from edgekit.model import Model
    from edgekit.progress import Progress


class Prune(CompressionPass, frozen=True):
    """Remove the ``ratio`` of channels with the smallest weights from every layer, then fine-tune for ``epochs``.

    Channels that depend on each other leave together (Fang et al. 2023, DepGraph), by the norm of the group's weights
    (Li et al. 2017). What is left is a multiple of ``round_to``. The outputs of the network keep their sizes. Recovery
    learns the labels of the train split, or, where it has none, the scores of the network before pruning.
    """

    ratio: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.3
    round_to: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    importance: Literal["l1", "l2"] = "l2"
    epochs: Annotated[int, msgspec.Meta(ge=0)] = 10
    lr: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    batch: Annotated[int, msgspec.Meta(ge=2)] = 32
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the smaller, fine-tuned model.

        Raises:
            CompressionError: not a PyTorch network with modules, no train split, nothing left to remove.
        """
        network = trainable(model, "prune")
        if self.epochs and (model.data is None or model.data.train is None):
            raise CompressionError(
                "prune has no train split to recover on", "give data with one, or set epochs = 0 to only cut"
            )
        progress("prune: channels", 0, 1)
        smaller = replace(network, module=copy.deepcopy(network.module))
        measured = _cut(model, smaller.module, self)
        changed = replace(model, network=smaller)
        if self.epochs and model.data and model.data.train:
            split = model.data.train
            truth = truth_of(model, split)
            losses = mimicry(model, 1.0, 1.0) if truth is None else (truth,)
            lesson = Lesson(split, losses, network if truth is None else None)
            schedule = Schedule(epochs=self.epochs, lr=self.lr, batch=self.batch, seed=self.seed)
            measured["train_loss"] = train(smaller, lesson, schedule, progress)
        return replace(changed, lineage=(*model.lineage, Step(name="prune", measured=measured)))


def _cut(model: Model, module: torch.nn.Module, options: Prune) -> dict[str, float]:
    """Remove the channels in place; return multiply-accumulates and parameters before and after."""
    with extra("compress"):
        import torch
        import torch_pruning
    example = tuple(torch.zeros(1, *spec.shape[1:], dtype=getattr(torch, spec.dtype)) for spec in model.inputs)
    count = torch_pruning.utils.count_ops_and_params
    before = count(module, example)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1 if options.importance == "l1" else 2)
    try:
        pruner = torch_pruning.pruner.BasePruner(
            module,
            example,
            importance,
            pruning_ratio=options.ratio,
            round_to=options.round_to,
            ignored_layers=_output_layers(model, module),
        )
        pruner.step()
        after = count(module.eval(), example)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CompressionError(f"{model.name} cannot be pruned: {error}", "drop the pass from the recipe") from error
    if after[1] >= before[1]:
        raise CompressionError(
            f"ratio {options.ratio} with round_to {options.round_to} removes no channel of {model.name}",
            "raise ratio or lower round_to",
        )
    return dict(zip(("macs_before", "parameters_before", "macs"), (*before, after[0]), strict=True))


def _output_layers(model: Model, module: torch.nn.Module) -> list[torch.nn.Module]:
    """Find the layers whose channels are the network's outputs, by walking the graph back from its end."""
    traced = trace(model).module(check_guards=False)
    weights = dict(graph.weighted(traced.graph))
    found: set[str] = set()
    open_nodes: list[fx.Node] = list(traced.graph.output_node().all_input_nodes)
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node in weights:
            found.add(weights[node].rpartition(".")[0])
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        open_nodes += new
    return [module.get_submodule(name) for name in sorted(found)]


PLUGIN: type[CompressionPass] = Prune
