"""Palettized weights: each takes one of few values, so that a table and short indices can hold it (Core ML does).

The weights stay floats that lie on the table; no plan is made. A format without tables holds them as they are.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress.layer import Change
from edgekit.compress.layers import layers, with_parameters
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.fold import fold
from edgekit.errors import CompressionError, UnknownName
from edgekit.manifest import Step
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.model import Model
    from edgekit.progress import Progress
    from edgekit.tensors import Array

CELLS = 512
"""Into how many runs of neighbours values are gathered before they are cut into clusters."""
ROUNDS = 100


class Palettize(CompressionPass, frozen=True):
    """Fold batch normalization, then set each weight to the nearest of 2 to the power of ``bits`` values.

    The values are the k-means of a layer's weights, or of each ``group`` output channels; a layer whose channels it does
    not divide has one table. An error counts by the width of its channel, so that narrow ones get values, too. k-means in one dimension has an exact solution by dynamic programming (Wang and Song 2011,
    "Ckmeans.1d.dp"); here it is exact in ``CELLS`` runs of neighbours, and Lloyd's iterations (1982) finish it. Zeros stay
    zeros. ``keep`` names weights that stay as they are. Needs no data. What rescales or trains weights comes before;
    `quantize` may follow, for the formats that hold integers: Core ML keeps the tables.
    """

    bits: Literal[8, 6, 4, 3, 2, 1] = 4
    group: Annotated[int, msgspec.Meta(ge=0)] = 0
    keep: tuple[str, ...] = ()

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the folded model with palettized weights; the step tells their SQNR in dB and the bytes of a file.

        Raises:
            CompressionError: a plan is there already, nothing to palettize, or weights that are not finite.
            UnknownName: ``keep`` names no weight.
        """
        with extra("compress"):
            import numpy as np
        if model.plan is not None:
            raise CompressionError(
                f"{model.name} has a plan ({model.precision}), which holds for the weights as they are",
                "put palettize before quantize",
            )
        folded, count = fold(model)
        found = layers(folded)
        for name in self.keep:
            if name not in {layer.weight for layer in found}:
                raise UnknownName("weight", name, [layer.weight for layer in found])
        changes, signal, noise, size = {}, 0.0, 0.0, 0
        for done, layer in enumerate(found):
            progress("palettize", done, len(found))
            if layer.weight in self.keep or layer.weight in changes:
                continue
            if not np.isfinite(layer.values).all():
                raise CompressionError(f"{layer.weight!r} holds NaN or infinity", "check the checkpoint")
            values, tables = self.palettized(layer.values)
            changes[layer.weight] = Change(values)
            signal += float(np.square(layer.values, dtype=np.float64).sum())
            noise += float(np.square(values - layer.values, dtype=np.float64).sum())
            size += math.ceil(values.size * self.bits / 8) + 2 * tables * 2**self.bits
        progress("palettize", len(found), len(found))
        if not changes:
            raise CompressionError(f"{model.name} has no weight to palettize", "drop the pass, or keep less")
        measured = {"folded": float(count), "layers": float(len(changes)), "palette_bytes": float(size)}
        if noise and signal:
            measured["weight_sqnr_db"] = round(10 * math.log10(signal / noise), 2)
        made = with_parameters(folded, changes)
        return replace(made, lineage=(*model.lineage, Step(name="palettize", measured=measured)))

    def palettized(self, values: Array) -> tuple[Array, int]:
        """Return a weight whose output channels lie on the first axis on its tables, and how many these are."""
        import numpy as np

        tables = len(values) // self.group if self.group and len(values) % self.group == 0 else 1
        flat = values.reshape(len(values), -1).astype(np.float64)
        power = np.square(flat).mean(axis=1, keepdims=True)
        counts = np.broadcast_to(1 / np.where(power > 0, power, 1), flat.shape).reshape(tables, -1)
        rows = values.reshape(tables, -1)
        made = [_nearest(row, own, 2**self.bits) for row, own in zip(rows, counts, strict=True)]
        return np.stack(made).reshape(values.shape), tables


def _nearest(values: Array, counts: Array, size: int) -> Array:
    """Return each value's nearest of ``size`` means; zero is one of these where there are zeros."""
    import numpy as np

    alive = values != 0
    room = size - int(not alive.all())
    if not room or not alive.any():
        return np.zeros_like(values)
    own = means(values[alive], counts[alive], room).astype(np.float32)
    middles = (own[1:] + own[:-1]) / 2
    return np.where(alive, own[np.searchsorted(middles, values)], np.float32(0))


def means(values: Array, counts: Array, size: int) -> Array:
    """Return at most ``size`` means, ascending, of least squared distance to all values [n], each times its count [n]."""
    import numpy as np

    order = np.argsort(values, kind="stable")
    ordered = values[order].astype(np.float64)
    own = counts[order].astype(np.float64)
    moments = [np.concatenate([[0], np.cumsum(own * ordered**power)]) for power in range(3)]
    starts = _cells(ordered)
    edges = starts if len(starts) - 1 <= size else _cut(starts, moments, size)
    for _ in range(ROUNDS):
        found = _centres(moments, edges)
        nearest = np.searchsorted(ordered, (found[1:] + found[:-1]) / 2)
        moved = np.unique(np.concatenate([[0], nearest, [len(ordered)]]))
        if np.array_equal(moved, edges):
            break
        edges = moved
    return _centres(moments, edges)


def _centres(moments: Sequence[Array], edges: Array) -> Array:
    import numpy as np

    centres: Array = np.diff(moments[1][edges]) / np.diff(moments[0][edges])
    return centres


def _cells(ordered: Array) -> Array:
    """Return where the runs of neighbours start [cells + 1]: each value for itself, or as many as a fine table needs.

    The best steps of a table lie as dense as the cube root of the values' density (Panter and Dite 1951).
    """
    import numpy as np

    alone = np.concatenate([[0], 1 + np.flatnonzero(np.diff(ordered)), [len(ordered)]])
    if len(alone) <= CELLS + 1:
        return alone
    counts, edges = np.histogram(ordered, CELLS)
    share = np.concatenate([[0], np.cumsum(np.cbrt(counts))])
    limits = np.interp(np.linspace(0, share[-1], CELLS + 1)[1:-1], share, edges)
    return np.unique(np.concatenate([[0], np.searchsorted(ordered, limits), [len(ordered)]]))


def _cut(starts: Array, moments: Sequence[Array], size: int) -> Array:
    """Return the edges [size + 1] of the clusters of least squared distance that are made of whole cells."""
    import numpy as np

    apart, total, square = (moment[starts][None, :] - moment[starts][:, None] for moment in moments)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = square - total**2 / apart
    cost[apart <= 0] = np.inf  # from a start to a later one
    least, choices = cost[0], []
    for _ in range(size - 1):
        tried = least[:, None] + cost
        choices.append(tried.argmin(axis=0))
        least = tried.min(axis=0)
    edges = [len(starts) - 1]
    for choice in reversed(choices):
        edges.append(int(choice[edges[-1]]))
    found: Array = starts[[0, *reversed(edges)]]
    return found


PLUGIN: type[CompressionPass] = Palettize
