"""Gives the layers that a smaller network kept of a larger one the weights with which they answer as they did before.

Layers are visited in the order in which they compute, in one go: each gets the least-squares weight for the inputs that
the layers before it make by now, towards what the same channels gave before (He et al. 2017, "Channel Pruning for
Accelerating Very Deep Neural Networks", section 3.1, for one layer; the changed inputs as Nagel et al. 2020,
equation 25). Knows not why the channels left, and trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgekit.compress.layer import Layer
from edgekit.compress.rows import LARGEST, patches, places
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn

ROWS = 16384
DAMPING = 0.01
"""What is added to the diagonal of the Gram matrix, as a share of its mean: pulls towards the weight as it was."""

SAME = 1e-5
"""A layer whose answers are that near to what they were, as a share of the largest, lost nothing."""


def reconstruct(
    before: nn.Module, after: nn.Module, kept: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]
) -> int:
    """Solve the layers of ``after`` in place; return how many.

    ``kept`` tells by the names of modules which outputs of ``before`` are left (`outputs_left`). ``inputs`` are what
    both networks take, all samples at once. Layers that lost nothing, that run twice, that share their weight, or that
    are no plain convolution or linear layer keep what they have.
    """
    with extra("compress"):
        import torch
    parts = {name: layer for name in kept if (layer := _layer(after, name)) is not None}
    before, was = before.eval(), after.training
    work = _Work(parts, kept)
    calls = [before.get_submodule(name).register_forward_hook(work.remembers(name)) for name in parts]
    try:
        with torch.no_grad():
            before(*inputs)
            calls += [after.get_submodule(name).register_forward_pre_hook(work.solves(name)) for name in work.wanted]
            after.eval()(*inputs)
    finally:
        for call in calls:
            call.remove()
    after.train(was)
    return len(work.solved)


def outputs_left(module: nn.Module, cut: Callable[[nn.Module], None], copied: nn.Module) -> dict[str, torch.Tensor]:
    """Return which outputs ``cut`` leaves of each layer of ``module``. ``copied``, a copy, is cut to find out.

    Each weight of the copy is the number of its output, so that what is left tells where it was.
    """
    with extra("compress"):
        import torch
    names = [name for name, part in module.named_modules() if isinstance(part, _kinds())]
    weights = dict(copied.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in names:
            weight = weights[f"{name}.weight"]
            numbers = torch.arange(len(weight), dtype=weight.dtype, device=weight.device)
            weight.copy_(numbers.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight))
    cut(copied)
    weights = dict(copied.named_parameters(remove_duplicate=False))
    return {name: weights[f"{name}.weight"].detach().flatten(1)[:, 0].long() for name in names}


def largest_output(module: nn.Module, one: Sequence[torch.Tensor]) -> int:
    """Return how many numbers the largest layer makes of one sample."""
    import torch

    found = [1]
    parts = [part for part in module.modules() if isinstance(part, _kinds())]
    calls = [part.register_forward_hook(lambda _m, _i, output: found.append(output.numel())) for part in parts]
    try:
        with torch.no_grad():
            module(*one)
    finally:
        for call in calls:
            call.remove()
    return max(found)


@dataclass
class _Work:
    """What the hooks of one reconstruction know of each other."""

    layers: Mapping[str, Layer]
    kept: Mapping[str, torch.Tensor]
    wanted: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    solved: set[str] = field(default_factory=set)

    def remembers(self, name: str) -> Callable[..., None]:
        """Return a hook that keeps some of what the layer gives."""
        import torch

        layer, random, met = self.layers[name], torch.Generator().manual_seed(0), []

        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            met.append(name)
            if len(met) > 1:
                self.wanted.pop(name, None)
                return
            flat = _flat(layer, output)
            unknown = layer.values[0].size
            most = min(max(ROWS, 4 * unknown), LARGEST // (unknown * layer.groups))
            self.seen[name] = torch.randperm(flat.shape[1], generator=random)[: max(1, most // len(flat))]
            self.wanted[name] = flat[:, self.seen[name]][..., self.kept[name]].flatten(0, 1)

        return hook

    def solves(self, name: str) -> Callable[..., None]:
        """Return a hook that gives the layer its weight before it computes."""
        layer, wanted, seen = self.layers[name], self.wanted[name], self.seen[name]

        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if _solve(module, layer.groups, _rows(layer, inputs[0], seen).double(), wanted.double()):
                self.solved.add(name)

        return hook


def _solve(module: Any, groups: int, rows: torch.Tensor, wanted: torch.Tensor) -> bool:  # noqa: ANN401  # a layer
    """Set weight and bias where answers differ; ``rows`` is [groups, rows, inputs], ``wanted`` [rows, outputs]."""
    import torch

    weight = module.weight.detach().double().reshape(groups, len(module.weight) // groups, -1)
    answers = wanted.reshape(len(wanted), groups, -1).transpose(0, 1)
    offsets = 0.0 if module.bias is None else module.bias.detach().double().reshape(groups, 1, -1)
    if (answers - rows @ weight.mT - offsets).abs().max() <= SAME * answers.abs().max():
        return False
    taken, given = rows, answers
    if module.bias is not None:  # it restores the mean, which the weight need not
        taken, given = rows - rows.mean(1, keepdim=True), answers - answers.mean(1, keepdim=True)
    gram = taken.mT @ taken / rows.shape[1]
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    floor = torch.where(mean > 0, DAMPING * mean, 1.0)[:, None].expand(-1, gram.shape[1])
    missing = taken.mT @ (given - taken @ weight.mT) / rows.shape[1]
    if not (gram.isfinite().all() and missing.isfinite().all()):
        return False
    weight = weight + torch.linalg.solve(gram + torch.diag_embed(floor), missing).mT
    module.weight.copy_(weight.reshape(module.weight.shape))
    if module.bias is not None:
        module.bias.copy_((answers - rows @ weight.mT).mean(1).reshape(-1))
    return True


def _rows(layer: Layer, batch: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return what the weight is multiplied with at the positions ``seen``, [groups, samples x positions, inputs]."""
    if layer.kind == "linear":
        return batch.reshape(len(batch), -1, batch.shape[-1])[:, seen].flatten(0, 1)[None]
    return patches(layer, batch, places(layer, batch)[seen])


def _flat(layer: Layer, output: torch.Tensor) -> torch.Tensor:
    """Return what a layer gave, [samples, positions, outputs]."""
    if layer.kind == "linear":
        return output.reshape(len(output), -1, output.shape[-1])
    return output.flatten(2).transpose(1, 2)


def _kinds() -> tuple[type[nn.Module], ...]:
    from torch import nn

    return (nn.Conv1d, nn.Conv2d, nn.Linear)


def _layer(module: nn.Module, name: str) -> Layer | None:
    """Describe a layer that can be solved, None where it cannot."""
    part: Any = module.get_submodule(name)
    shared = [
        other for other in module.modules() if other is not part and getattr(other, "weight", None) is part.weight
    ]
    if shared or isinstance(getattr(part, "padding", None), str) or getattr(part, "padding_mode", "zeros") != "zeros":
        return None
    plain = {
        "weight": f"{name}.weight",
        "bias": None if part.bias is None else f"{name}.bias",
        "node": name,
        "source": "",
        "values": part.weight.detach().cpu().numpy(),
        "offsets": None,
    }
    if not hasattr(part, "kernel_size"):
        return Layer(kind="linear", **plain)
    slide = {key: getattr(part, key) for key in ("stride", "padding", "dilation", "groups")}
    return Layer(kind="conv", **plain, **slide)
