"""Palettized weights: each takes one of few values, so that a table and short indices can hold it (Core ML does).

The weights stay floats that lie on the table; no plan is made. A format without tables holds them as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress.feedback import compensated
from edgekit.compress.gram import Aim, Problem, problem, shifted_offsets
from edgekit.compress.layer import Change
from edgekit.compress.layers import layers, with_parameters
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.fold import fold
from edgekit.compress.refining import calibration
from edgekit.compress.rows import fits, some_rows
from edgekit.compress.walking import walk
from edgekit.errors import CompressionError, UnknownName
from edgekit.manifest import Step
from edgekit.plan import WeightRule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.compress.walking import Visit
    from edgekit.model import Model
    from edgekit.progress import Progress
    from edgekit.tensors import Array

CELLS = 512
"""Into how many runs of neighbours values are gathered before they are cut into clusters."""
ROUNDS, ROWS = 100, 8192
"""Iterations of Lloyd's, at most, and input rows of a layer for ``gptq``, about."""


class Palettize(CompressionPass, frozen=True):
    """Fold batch normalization, then set each weight to one of 2 to the power of ``bits`` values.

    The values are the k-means of a layer's weights, or of each ``group`` output channels; a layer whose channels it
    does not divide has one table. An error counts by the width of its channel, so that narrow ones get values, too.
    k-means in one dimension has an exact solution by dynamic programming (Wang and Song 2011, "Ckmeans.1d.dp"); here it
    is exact in ``CELLS`` runs of neighbours, and Lloyd's iterations (1982) finish it. ``gptq`` takes the weights one
    after the other and lets the rest make up for what each loses, as the pass of that name, with its ``damping`` and on
    the first ``samples`` of the calibration data; ``nearest`` takes the nearest and looks at no data. Zeros stay zeros.
    ``keep`` names weights that stay as they are. What rescales or trains weights comes before; `quantize` may follow,
    for the formats that hold integers: Core ML keeps the tables.
    """

    bits: Literal[8, 6, 4, 3, 2, 1] = 4
    group: Annotated[int, msgspec.Meta(ge=0)] = 0
    keep: tuple[str, ...] = ()
    rounding: Literal["gptq", "nearest"] = "gptq"
    damping: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    samples: Annotated[int, msgspec.Meta(ge=1)] = 512

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the folded model with palettized weights; the step tells their SQNR in dB and the bytes of a file.

        Raises:
            CompressionError: a plan is there already, nothing to palettize, weights that are not finite, or with
                ``gptq`` no calibration data.
            UnknownName: ``keep`` names no weight.
        """
        if model.plan is not None:
            raise CompressionError(
                f"{model.name} has a plan ({model.precision}), which holds for the weights as they are",
                "put palettize before quantize",
            )
        folded, count = fold(model)
        found = {layer.weight: layer for layer in layers(folded)}
        for name in self.keep:
            if name not in found:
                raise UnknownName("weight", name, found)
        wanted = {name: layer for name, layer in found.items() if name not in self.keep}
        if not wanted:
            raise CompressionError(f"{model.name} has no weight to palettize", "drop the pass, or keep less")
        if self.rounding == "gptq":
            changes = walk(folded, calibration(folded, self.samples), self._chooser(wanted), progress, what="palettize")
        else:
            changes = {}
            for done, layer in enumerate(wanted.values()):
                progress("palettize", done, len(wanted))
                changes[layer.weight] = Change(_on_tables(layer.values, self._tables(layer)))
            progress("palettize", len(wanted), len(wanted))
        measured = {"folded": float(count), "layers": float(len(changes)), **self._measured(wanted, changes)}
        made = with_parameters(folded, changes)
        return replace(made, lineage=(*model.lineage, Step(name="palettize", measured=measured)))

    def _tables(self, layer: Layer) -> Array:
        """Return the values that each run of a layer's channels may take, ascending, [tables, 2 ** bits].

        Zero is one of them where there are zeros; a run that needs fewer repeats its last.
        """
        import numpy as np

        values = layer.values
        if not np.isfinite(values).all():
            raise CompressionError(f"{layer.weight!r} holds NaN or infinity", "check the checkpoint")
        flat = values.reshape(len(values), -1).astype(np.float64)
        power = np.square(flat).mean(axis=1, keepdims=True)
        counts = np.broadcast_to(1 / np.where(power > 0, power, 1), flat.shape)
        rows, own = (part.reshape(self._runs(values), -1) for part in (flat, counts))
        return np.stack([_table(row, count, 2**self.bits) for row, count in zip(rows, own, strict=True)])

    def _runs(self, values: Array) -> int:
        return len(values) // self.group if self.group and len(values) % self.group == 0 else 1

    def _chooser(self, wanted: Mapping[str, Layer]) -> Visit:
        def visit(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> Change | None:
            if layer.weight not in wanted:
                return None
            tables = self._tables(layer)
            if not fits(layer):
                return Change(_on_tables(layer.values, tables))
            rows = some_rows(layer, floats, planned, ROWS, seed=0)
            aim = Aim(damping=self.damping, is_asymmetric=True, is_centred=layer.offsets is not None)
            task = on_tables(problem(layer, WeightRule(), rows, aim), layer.values, tables)
            values = task.as_weight(task.values(compensated(task, by_activations=True)))
            return Change(values, shifted_offsets(layer, rows, values))

        return visit

    def _measured(self, wanted: Mapping[str, Layer], changes: Mapping[str, Change]) -> dict[str, float]:
        """Tell how far the weights moved, and what indices and tables of half floats take."""
        import numpy as np

        signal, noise, size = 0.0, 0.0, 0
        for name, change in changes.items():
            values, made = wanted[name].values, change.values
            if made is not None:
                signal += float(np.square(values, dtype=np.float64).sum())
                noise += float(np.square(made - values, dtype=np.float64).sum())
                size += math.ceil(values.size * self.bits / 8) + 2 * self._runs(values) * 2**self.bits
        told = {"weight_sqnr_db": round(10 * math.log10(signal / noise), 2)} if noise and signal else {}
        return told | {"palette_bytes": float(size)}


@dataclass(frozen=True, kw_only=True)
class OnTables(Problem):
    """Which values of tables to take in the place of integers; ``tables`` is [groups, outputs / groups, size].

    ``scales`` is 0 where a weight has to stay zero, else 1, and ``zeros`` is 0.
    """

    tables: torch.Tensor

    def integers(self, values: torch.Tensor, at: int | None = None) -> torch.Tensor:
        """Return the nearest values of the tables, of all inputs or of the one ``at``."""
        import torch

        asked = values if at is None else values[:, :, None]
        middles = ((self.tables[:, :, 1:] + self.tables[:, :, :-1]) / 2).contiguous()
        found = self.tables.gather(2, torch.searchsorted(middles, asked.contiguous()))
        return found if at is None else found[:, :, 0]


def on_tables(task: Problem, values: Array, tables: Array) -> OnTables:
    """Return a layer's problem with tables in the place of its grid; ``values`` is its weight, whose zeros stay."""
    import numpy as np
    import torch

    groups, outputs, _ = task.weight.shape
    spread = np.repeat(tables, len(values) // len(tables), axis=0).reshape(groups, outputs, -1)
    alive = torch.from_numpy(values != 0).reshape(task.weight.shape).double()
    known = {field.name: getattr(task, field.name) for field in fields(task)}
    known |= {"scales": alive, "zeros": torch.zeros_like(alive)}
    return OnTables(**known, tables=torch.from_numpy(spread).double())


def _on_tables(values: Array, tables: Array) -> Array:
    """Return each value's nearest in the table of its run of channels; zeros stay."""
    import numpy as np

    rows = values.reshape(len(tables), -1)
    made = [own[np.searchsorted((own[1:] + own[:-1]) / 2, row)] for own, row in zip(tables, rows, strict=True)]
    return np.where(values != 0, np.stack(made).reshape(values.shape), np.float32(0))


def _table(values: Array, counts: Array, size: int) -> Array:
    """Return the means of values, ascending, float32 [size]."""
    import numpy as np

    alive = values != 0
    room = size - int(not alive.all())
    own = means(values[alive], counts[alive], room) if room and alive.any() else np.zeros(0)
    whole = own if alive.all() else np.sort(np.append(own, 0.0))
    return np.pad(whole, (0, size - len(whole)), mode="edge").astype(np.float32)


def means(values: Array, counts: Array, size: int) -> Array:
    """Return at most ``size`` means, ascending: of least squared distance to values [n], each ``counts`` [n] times."""
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
