"""Chooses a GGUF type for each group of tensors under a size, by what narrowing that group alone costs in KL.

A group is a part of the network in one third of its depth: narrowing tensor by tensor would take hours and measure
noise. What a wider type costs follows from the error of the weights, weighted by the importance of their columns: KL
grows with its square (a second-order expansion around the float network, whose KL has no slope). Computes no model and
writes no file.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.export import blocks
from edgekit.export.narrowing import WINDOWS, Narrowing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekit.export.families import Shape
    from edgekit.model import Split
    from edgekit.progress import Progress
    from edgekit.tensors import Array

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""From the smallest to the largest."""
_THIRDS = ("first", "middle", "last")
_TOGETHER = {"attn_q": "attn_q+k", "attn_k": "attn_q+k", "ffn_gate": "ffn_gate+up", "ffn_up": "ffn_gate+up"}


def bits_asked(precision: str) -> float | None:
    """Read ``4.8bpw``: bits a weight over all tensors of the file; None for any other precision."""
    found = re.fullmatch(r"(\d{1,2}(?:\.\d{1,3})?)bpw", precision)
    return float(found[1]) if found else None


@dataclass(frozen=True)
class Group:
    """Tensors that take one type: their names, how many numbers they hold, and the KL of each type, in nats."""

    name: str
    tensors: tuple[str, ...]
    weights: int
    kl: Mapping[str, float]

    def size(self, kind: str) -> int:
        """Return its size in bits."""
        return int(self.weights * _bits(kind))


def _bits(kind: str) -> float:
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return float(8 * size / numbers)


def apart(samples: Split) -> tuple[Split, Split]:
    """Cut calibration text into windows for the importance matrix, and the last ones, which choose.

    Raises:
        UsageError: there is one window only.
    """
    few = max(1, min(WINDOWS, len(samples) // 4))
    if len(samples) < 2:
        raise UsageError(
            f"a choice by bits needs at least 2 windows of calibration text, this has {len(samples)}",
            "give more text in data.toml",
        )
    return samples.take(slice(len(samples) - few)), samples.take(slice(len(samples) - few, None))


def spend(groups: Sequence[Group], rest: int, weights: int, bits: float) -> dict[str, str]:
    """Give each group a type by name: the smallest first, then where a byte lowers KL most, while the size lasts.

    ``rest``: bits of tensors that have no choice; ``weights``: how many numbers the file holds in all.

    Raises:
        UsageError: even the smallest types are larger; names the smallest size.
    """
    chosen = dict.fromkeys((group.name for group in groups), TYPES[0])
    left = int(bits * weights) - rest - sum(group.size(TYPES[0]) for group in groups)
    if left < 0:
        least = -(-100 * (int(bits * weights) - left) // weights) / 100  # rounded up
        raise UsageError(f"{bits:g} bits a weight are too few for this model", f"the least is {least:.2f}bpw")
    while True:
        steps = [
            ((group.kl[chosen[group.name]] - group.kl[kind]) / more, group.name, kind, more)
            for group in groups
            for kind in TYPES[TYPES.index(chosen[group.name]) + 1 :]
            if (more := group.size(kind) - group.size(chosen[group.name])) <= left
        ]
        gain, name, kind, more = max(steps, default=(0.0, "", "", 0))
        if gain <= 0:
            return chosen
        chosen[name] = kind
        left -= more


def measure(
    folder: Path, shape: Shape, samples: Split, columns: Mapping[str, Array], *, progress: Progress
) -> tuple[list[Group], int, int]:
    """Narrow each group of the folder's network alone and measure the KL of its words on ``samples``.

    ``columns``: importance by GGUF tensor name. Returns the groups, the bits of all other tensors, and how many
    numbers there are in all.
    """
    narrowing = Narrowing(folder, shape, samples, types=TYPES, columns=columns)
    members: dict[str, list[str]] = defaultdict(list)
    numbers = {name: math.prod(dims) for name, (_, dims) in narrowing.tensors.items()}
    rest = 0
    for name, (_, dims) in narrowing.tensors.items():
        if len(dims) == 2 and dims[1] % blocks.BLOCK == 0:
            members[_group(name, shape.layers)].append(name)
        else:
            rest += numbers[name] * (32 if len(dims) < 2 else 16)
    groups = []
    for number, (name, own) in enumerate(members.items()):
        progress("measure what narrow types cost", number, len(members))
        groups.append(Group(name, tuple(own), sum(numbers[n] for n in own), narrowing.cost(own)))
    return groups, rest, sum(numbers.values())


def _group(name: str, layers: int) -> str:
    """Name the group of a GGUF tensor: a part of a third of the depth, or a matrix outside of the blocks."""
    if not name.startswith("blk."):
        return name.removesuffix(".weight")
    _, number, part, _ = name.split(".")
    return f"{_TOGETHER.get(part, part)} {_THIRDS[3 * int(number) // layers]}"


def told(groups: Sequence[Group], chosen: Mapping[str, str]) -> Iterator[str]:
    """Say by type which groups took it."""
    for kind in TYPES:
        if names := [group.name for group in groups if chosen[group.name] == kind]:
            yield f"{kind} by measured KL: {', '.join(names)}"
