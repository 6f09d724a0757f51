"""Structured pruning: whole channels and heads leave the network, which then learns to do without them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress.dependencies import (
    Importance,
    Scope,
    channel_padding,
    choose,
    cut,
    example,
    families,
    size,
)
from edgekit.compress.latency import Compared, Stopwatch
from edgekit.compress.losses import Labels, Seen, truth_of
from edgekit.compress.passes._learning import LearningPass, recovery, train_split, trainable
from edgekit.compress.processes import rank_and_size
from edgekit.compress.reconstruction import largest_output, outputs_left, reconstruct
from edgekit.compress.training import train
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import whole_batches
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from edgekit.compress.dependencies import Family
    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model, Split, TorchNetwork
    from edgekit.progress import Progress

Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
RATIO = 0.3
CLOSE = 0.01
"""How near a search has to come to the share of MACs that was asked for; of latency, which is noisy, thrice that."""

SAMPLES, HELD = 512, 1 << 26
"""How many samples a reconstruction sees, and how many numbers a layer may make of them: all go through at once."""


class Prune(LearningPass, frozen=True, kw_only=True):
    """Remove the least important channels and attention heads, then train for ``epochs``.

    How many: ``ratio`` of the channels; or as many as leave the share ``macs`` of the multiply-accumulates; or the
    share ``latency`` of what a sample takes here, on one thread. ``scope``: the least important of all layers, or as
    many of each. Channels that depend on each other leave together (Fang et al. 2023, DepGraph), judged by their
    group's norm (``l1``, ``l2``; Li et al. 2017), by the scale of batch norm (``bn_scale``; Liu et al. 2017; layers
    without one stay whole, attention heads go by ``l2``) or by weight times gradient (``taylor``; Molchanov et al.
    2019). What stays of a layer is a multiple of ``round_to``; 0 takes up to 8, but at least four steps a layer.
    ``keep_modules`` stay whole; the outputs keep their sizes. ``reconstruct`` gives what stays the least-squares
    weights towards its outputs before the cut (He et al. 2017), from samples without labels: the network answers
    nearly as before even without an epoch. ``auto`` does so where no epoch follows: what then trains does better from
    the weights that it had (by 0.2 to 0.6 points after three epochs on ResNet-20 and ResNet-56).

    Recovery learns the labels by ``1 - alpha`` and by ``alpha`` the scores of the network before pruning, those alone
    where there are no labels. ``steps`` cuts and recovers in so many turns. ``timed`` measures the latency before and
    after on this machine, which makes the lineage differ from run to run.
    """

    ratio: Annotated[float, msgspec.Meta(gt=0, lt=1)] = RATIO
    macs: Share = 0.0
    latency: Share = 0.0
    scope: Scope = "layer"
    importance: Importance = "l2"
    round_to: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    keep_modules: tuple[str, ...] = ()
    reconstruct: Literal["auto", "on", "off"] = "auto"
    steps: Annotated[int, msgspec.Meta(ge=1, le=32)] = 1
    alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    timed: Literal["", "onnx", "torch"] = ""

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the smaller, fine-tuned model.

        Raises:
            CompressionError: not a PyTorch network with modules, no train split, a module that stands in the way, or
                nothing left to remove.
        """
        network = trainable(model, "prune")
        self._refuse_contradiction()
        if self.epochs:
            train_split(model, "prune", "recover on:give data with one, or set epochs = 0 to only cut")
        work = _Work(model, network, self, progress)
        now = copy.deepcopy(network.module)
        loss = None
        for turn in range(1, self.steps + 1):
            now = work.smaller(now, turn)
            loss = work.recover(now, turn)
        changed = replace(model, network=replace(network, module=now))
        measured = work.figures(changed) | ({} if loss is None else {"train_loss": loss})
        return replace(changed, lineage=(*model.lineage, Step(name="prune", measured=measured)))

    def _refuse_contradiction(self) -> None:
        if self.macs and self.latency:
            raise CompressionError(f"macs {self.macs} and latency {self.latency} are both asked for", "drop one")
        if self.ratio != RATIO and (self.macs or self.latency):
            other = f"macs {self.macs}" if self.macs else f"latency {self.latency}"
            raise CompressionError(f"ratio {self.ratio} and {other} are both asked for", "drop one")
        if self.latency and rank_and_size()[1] > 1:
            raise CompressionError(
                f"latency {self.latency} is measured, and each of the processes would measure another",
                "prune in one process, or ask for macs",
            )


@dataclass(frozen=True)
class _Work:
    """One pruning: the model as it came, and what is asked of it."""

    model: Model
    network: TorchNetwork
    options: Prune
    progress: Progress

    def smaller(self, module: nn.Module, turn: int) -> nn.Module:
        """Return a copy with fewer channels, as far as this turn goes."""
        options, share = self.options, turn / self.options.steps
        self.progress("prune: how much each channel matters", turn - 1, options.steps)
        weighed = copy.deepcopy(module)
        if options.importance == "taylor":
            _feel(self.model, weighed)
        found = families(self.model, weighed, options.importance, options.keep_modules)
        if not found:
            self._refuse_nothing(module, module, found)
        tried: dict[tuple[int, ...], nn.Module] = {}
        counts: dict[int, dict[str, int]] = {}

        def candidate(ratio: float) -> nn.Module:
            kept = choose(found, ratio, options.scope, options.round_to, by_cost=bool(options.macs or options.latency))
            key = tuple(kept[one.name] for one in found)
            if key not in tried:
                tried[key] = copy.deepcopy(module)
                cut(self.model, tried[key], found, kept)
                counts[id(tried[key])] = kept
            return tried[key]

        if not options.macs and not options.latency:
            # of what the turns before left, so much leaves that the ratio is reached at the end
            before = options.ratio * (turn - 1) / options.steps
            result = candidate((options.ratio * share - before) / (1 - before))
        else:
            measure, goal, close = self._goal(share)
            result = _search(candidate, measure, self.progress, goal=goal, close=close)
        self._refuse_nothing(module, result, found)
        solves = options.reconstruct == "on" or (options.reconstruct == "auto" and not options.epochs)
        if solves and (samples := self._samples()) is not None:
            self.progress("prune: weights that make up for what left", turn - 1, options.steps)
            left = outputs_left(
                module, lambda copied: cut(self.model, copied, found, counts[id(result)]), copy.deepcopy(module)
            )
            reconstruct(copy.deepcopy(module), result, left, samples)
        return result

    def _samples(self) -> tuple[torch.Tensor, ...] | None:
        """Return what a reconstruction sees: up to 512 samples, fewer where a layer makes much of each."""
        import torch

        if self.model.data is None:
            return None
        split, size = whole_batches(self.model, self.model.data.train or self.model.data.calibration)
        is_fixed = any(spec.shape and spec.shape[0] > 0 for spec in self.model.inputs)
        most = HELD // largest_output(self.network.module, example(self.model))
        seen = split.head(size if is_fixed else min(SAMPLES, max(1, most)))
        return tuple(torch.as_tensor(seen.inputs[spec.name]) for spec in self.model.inputs)

    def _goal(self, share: float) -> tuple[Callable[[nn.Module], float], float, float]:
        """Return what is measured of a candidate, how much of it may be left after this turn, and how exactly."""
        if self.options.macs:
            whole = size(self.model, copy.deepcopy(self.network.module))[0]
            return lambda module: size(self.model, module)[0] / whole, 1 - share * (1 - self.options.macs), CLOSE
        watch = Stopwatch(self.model, self.options.timed or "onnx")
        return (
            lambda module: watch.compare(self._as_model(module)).fraction,
            1 - share * (1 - self.options.latency),
            3 * CLOSE,
        )

    def _refuse_nothing(self, before: nn.Module, after: nn.Module, found: list[Family]) -> None:
        if not found and self.options.importance == "bn_scale":
            raise CompressionError(
                f"{self.model.name} has no batch normalization behind channels that can leave: bn_scale has no scales"
                " to go by",
                'set importance = "l2"',
            )
        if not found or size(self.model, after)[1] >= size(self.model, copy.deepcopy(before))[1]:
            raise CompressionError(
                f"ratio {self.options.ratio} with round_to {self.options.round_to} removes no channel of"
                f" {self.model.name}, which has {len(found)} layers with channels that can leave",
                "raise ratio or lower round_to",
            )

    def recover(self, module: nn.Module, turn: int) -> float | None:
        """Train what is left, by this turn's part of the epochs; return the last loss."""
        options = self.options
        epochs = options.epochs * turn // options.steps - options.epochs * (turn - 1) // options.steps
        if not epochs:
            return None
        lesson = recovery(self.model, options.alpha, options.temperature)
        return train(replace(self.network, module=module), lesson, options.schedule(epochs), self.progress)

    def figures(self, changed: Model) -> dict[str, float]:
        """Measure before and after, side by side."""
        before = size(self.model, copy.deepcopy(self.network.module))
        macs, parameters = size(changed, copy.deepcopy(_module(changed)))
        found = {
            "macs_before": before[0],
            "macs": macs,
            "parameters_before": before[1],
            "parameters": parameters,
            "layers_held_by_padding": float(len(channel_padding(self.model))),
        }
        engine = self.options.timed or ("onnx" if self.options.latency else "")
        return found | (_timed(Stopwatch(self.model, engine).compare(changed), self.progress) if engine else {})

    def _as_model(self, module: nn.Module) -> Model:
        return replace(self.model, network=replace(self.network, module=module))


def _search(
    candidate: Callable[[float], nn.Module],
    measure: Callable[[nn.Module], float],
    progress: Progress,
    *,
    goal: float,
    close: float,
) -> nn.Module:
    """Find the largest network that holds the goal, by halving; each candidate is measured once.

    Raises:
        CompressionError: even the smallest does not reach it.
    """
    low, high = 0.0, 0.95
    best = candidate(high)
    least = measure(best)
    if least > goal + close:
        raise CompressionError(
            f"{goal:.2f} cannot be reached: with a tenth of its channels the network still has {least:.2f}",
            "ask for more of macs or latency, or lower round_to",
        )
    known = {id(best): least}
    for turn in range(8):
        ratio = (low + high) / 2
        one = candidate(ratio)
        share = known[id(one)] if id(one) in known else measure(one)
        known[id(one)] = share
        progress(f"prune: {ratio:.3f} of the channels leave {share:.3f}, goal {goal:.3f}", turn + 1, 8)
        if share > goal + close / 2:
            low = ratio
        else:
            high, best = ratio, one
            if share > goal - close / 2:
                break
    return best


def _feel(model: Model, module: nn.Module) -> None:
    """Leave in every weight's ``grad`` the root of the sum of its squared gradients over up to 32 batches of 16.

    Weight times that estimates what leaving it out costs (Molchanov et al. 2019, equation 8). Where there are no
    labels, the network's own choices stand for them; where it has no classes to choose of, its squared outputs are the
    loss.
    """
    with extra("compress"):
        import torch
    if model.data is None:
        raise CompressionError("taylor needs samples to compute gradients on", "give data")
    split: Split = (model.data.train or model.data.calibration).head(512)
    truth = truth_of(model, split, 0)  # labels that no output scores are no truth, and no reason to refuse
    module.eval()
    squares = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    for part in split.batches(16):
        module.zero_grad()
        result = module(*[torch.as_tensor(part.inputs[spec.name]) for spec in model.inputs])
        loss = _felt(tuple(result) if isinstance(result, tuple | list) else (result,), part, truth)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        for name, weight in module.named_parameters():
            if weight.grad is not None:
                squares[name] += weight.grad.square()
    for name, weight in module.named_parameters():
        weight.grad = squares[name].sqrt()


def _felt(outputs: tuple[torch.Tensor, ...], part: Split, truth: Labels | None) -> torch.Tensor:
    """Return the loss of one batch."""
    import torch

    has_choice = outputs[0].dim() > 1 and outputs[0].shape[1] > 1
    if not has_choice and (truth is None or truth.kind == "classes"):
        # the cross entropy of a single class is 0 whatever the weights are, and so are its gradients
        return torch.stack([output.float().square().mean() for output in outputs]).sum()
    if truth is None:
        return Labels()(Seen(outputs=outputs, targets=outputs[0].detach().argmax(1)))
    known = {name: torch.as_tensor(array) for name, array in part.inputs.items()}
    targets = known.get("input_ids") if part.labels is None else torch.as_tensor(part.labels)
    return truth(Seen(outputs=outputs, targets=targets, mask=known.get("attention_mask")))


def _timed(compared: Compared, progress: Progress) -> dict[str, float]:
    found = {"ms_before": compared.before_ms, "ms": compared.after_ms}
    if compared.fraction >= 1:
        progress(f"prune: WARNING not faster here: {compared.before_ms:.3f} -> {compared.after_ms:.3f} ms", 1, 1)
        found["slower"] = 1.0
    return found


def _module(model: Model) -> nn.Module:
    return trainable(model, "prune").module


PLUGIN: type[CompressionPass] = Prune
