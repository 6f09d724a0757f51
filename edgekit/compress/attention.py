"""Attention as Hugging Face's networks write it: query, key, value and output layers, and the heads they are made of.

Takes whole heads out; a key head that several query heads share leaves with them. Knows no importance but magnitudes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
OUTPUTS = ("o_proj", "out_proj", "dense", "out_lin", "o")
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads")
WIDTHS = ("all_head_size", "embed_dim", "inner_dim", "dim")


@dataclass(frozen=True)
class Attention:
    """One attention: the names of its module and layers, and how many heads can leave (those of keys and values)."""

    name: str
    layers: tuple[str, str, str]
    output: str
    size: int
    heads: int

    def scores(self, module: nn.Module, measure: str) -> torch.Tensor:
        """Return the importance of each key head with the query heads that read it [heads].

        ``bn_scale`` is ``l2`` here: no batch normalization scales a head.
        """
        import torch

        total = torch.zeros(self.heads)
        for name in (*self.layers, self.output):
            weight = _layer(module, name).weight
            rows = weight.T if name == self.output else weight
            total += _each(rows, measure).reshape(self.heads, -1).sum(1)
        return total / total.mean().clamp_min(1e-30)

    def remove(self, module: nn.Module, heads: Iterable[int]) -> None:
        """Take these heads out of the layers, and correct what the module knows of its heads."""
        gone = set(heads)
        kept = [head for head in range(self.heads) if head not in gone]
        inner = _layer(module, self.layers[0]).out_features
        for name in (*self.layers, self.output):
            _keep(_layer(module, name), kept, self.heads, is_input=name == self.output)
        self._correct(module.get_submodule(self.name), len(kept), inner)

    def _correct(self, owner: nn.Module, kept: int, inner: int) -> None:
        for name in COUNTS:
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, getattr(owner, name) * kept // self.heads)
        for name in WIDTHS:
            if getattr(owner, name, None) == inner:
                setattr(owner, name, inner * kept // self.heads)


def attentions(module: nn.Module) -> tuple[Attention, ...]:
    """Find every attention whose heads can be told apart."""
    found = (_attention(module, name, owner) for name, owner in module.named_modules())
    return tuple(one for one in found if one is not None)


def _attention(module: nn.Module, name: str, owner: nn.Module) -> Attention | None:
    for names in NAMES:
        layers = [_linear(owner, one) for one in names]
        output = _output(module, name)
        if all(layers) and output:
            wide, narrow = layers[0].out_features, layers[1].out_features  # type: ignore[union-attr]  # all() saw them
            size = _head_size(owner, wide)
            if size and wide % size == 0 and narrow % size == 0 and wide % narrow == 0:
                one, two, three = (f"{name}.{part}" for part in names)
                return Attention(name, (one, two, three), output, size, narrow // size)
    return None


def _output(module: nn.Module, name: str) -> str:
    """Find the layer that joins the heads: inside the attention, or beside it as BERT has it."""
    beside = f"{name.rpartition('.')[0]}.output"
    known = dict(module.named_modules())
    for place in (*(f"{name}.{one}" for one in OUTPUTS), f"{beside}.dense"):
        if place in known and hasattr(known[place], "in_features"):
            return place
    return ""


def _head_size(owner: nn.Module, width: int) -> int:
    for name in HEAD_SIZES:
        if isinstance(getattr(owner, name, None), int):
            return int(getattr(owner, name))
    counts = [getattr(owner, name) for name in COUNTS[:3] if isinstance(getattr(owner, name, None), int)]
    return width // int(counts[0]) if counts else 0


def _layer(module: nn.Module, name: str) -> nn.Linear:
    return cast("nn.Linear", module.get_submodule(name))


def _linear(owner: nn.Module, name: str) -> nn.Linear | None:
    from torch import nn

    found = getattr(owner, name, None)
    return found if isinstance(found, nn.Linear) else None


def _keep(layer: nn.Linear, kept: list[int], heads: int, *, is_input: bool) -> None:
    """Keep the rows of some heads, or the columns where the layer reads them."""
    import torch
    from torch import nn

    axis = 1 if is_input else 0
    size = layer.weight.shape[axis] // heads
    chosen = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept])
    with torch.no_grad():
        layer.weight = nn.Parameter(layer.weight.index_select(axis, chosen))
        if layer.bias is not None and not is_input:
            layer.bias = nn.Parameter(layer.bias.index_select(0, chosen))
    setattr(layer, "in_features" if is_input else "out_features", len(chosen))


def _each(weight: torch.Tensor, measure: str) -> torch.Tensor:
    if measure == "taylor" and weight.grad is not None:
        return (weight * weight.grad).abs().detach()
    return weight.detach().abs() if measure == "l1" else weight.detach().square()
