"""Draws from a model's data, and from its answers, what a device will hold its requests against.

Deterministic: the same model and data give the same bytes. Knows no format.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from edgekit.baseline import MAX_SERIES, MAX_TENSORS, Baseline, Observed, Series
from edgekit.model import GgufFile, LlamaFolder, OnnxNetwork, whole_batches
from edgekit.runtime import divergence, series
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgekit.export.parity import Reference
    from edgekit.model import Data, Model, Split
    from edgekit.runtime import Contract
    from edgekit.tensors import Array, TensorSpec

SAMPLES, FEWEST = 512, 64
WORK = 2**31
"""Samples times weights that are computed for it at most, but for the fewest: seconds of a CPU."""
BINS = 16
IN_A_BIN, OF_CLASSES = 4, 16
"""So many samples lie in a bin at least; more where bins are compared one by one, as those of classes are."""
ALIKE = 1e-6
"""Numbers that differ by less than this share of the largest are one: the last bits differ from machine to machine."""


def baseline_of(model: Model, contract: Contract) -> Baseline | None:
    """Draw the baseline from up to 512 samples of the validation split, else of the calibration split.

    ``None`` for a language model, and where nothing can be watched.
    """
    if model.data is None or isinstance(model.network, LlamaFolder | GgufFile):
        return None
    name, split, size = _samples(model, model.data)
    drafts = [*_inputs(contract, split, _unknown(model)), *_outputs(contract)]
    drawn = _drawn(model, contract, (split, size), drafts)
    found: list[Observed] = []
    room = MAX_SERIES
    for draft, rows in zip(drafts, drawn, strict=True):
        if rows is not None and rows.rows.shape[1] <= room and len(found) < MAX_TENSORS:
            room -= rows.rows.shape[1]
            found.append(_observed(draft, rows, contract))
    found = [_all_seen(one, split) for one in found]
    return Baseline(samples=len(split), split=name, tensors=tuple(found)) if found else None


def shifts_of(reference: Reference, answers: Mapping[str, Array]) -> dict[str, float]:
    """Return how far a file's answers lie from the float model's in each series of the outputs, where not near."""
    inputs, contract = reference.inputs.inputs, reference.contract
    found = {}
    for observed in reference.baseline.tensors if reference.baseline else ():
        if observed.role != "output":
            continue
        ours, theirs = (series.draw(observed, contract, inputs, o).rows for o in (answers, reference.outputs))
        for number, one in enumerate(observed.series):
            counts = [_counts(rows[:, number], one.edges) for rows in (ours, theirs)]
            measure = divergence.stability_index if one.classes else divergence.kolmogorov_smirnov
            if (apart := round(measure(*counts), 4)) >= 0.01:
                found[f"{observed.tensor}: {one.name}"] = apart
    return found


def _samples(model: Model, data: Data) -> tuple[str, Split, int]:
    """Choose samples by a fixed seed, as many as can be computed in reasonable time."""
    import numpy as np

    fixed = max((spec.shape[0] for spec in model.inputs if spec.shape), default=1)
    held_out = data.validation is not None and len(data.validation) >= max(fixed, FEWEST)
    name, split = ("validation", data.validation) if held_out and data.validation else ("calibration", data.calibration)
    most = max(FEWEST, fixed, min(SAMPLES, WORK // max(1, _weights(model))))
    chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:most])
    samples, size = whole_batches(model, split.take(chosen))
    return name, samples, size


def _weights(model: Model) -> int:
    if isinstance(model.network, OnnxNetwork):
        content = model.network.content
        return (model.network.path.stat().st_size if content is None else len(content)) // 4
    return sum(one.numel() for one in model.network.module.parameters()) if hasattr(model.network, "module") else 0


def _unknown(model: Model) -> int:
    """Return the number that a tokenizer gives to what it does not know; -1 where it knows everything."""
    if model.data is None or model.data.text is None:
        return -1
    described = msgspec.json.decode(model.data.text.tokenizer).get("model", {})
    vocabulary, token = described.get("vocab"), described.get("unk_token")
    number = vocabulary.get(token, -1) if isinstance(vocabulary, dict) else described.get("unk_id")
    return number if isinstance(number, int) else -1


def _inputs(contract: Contract, split: Split, unknown: int) -> Iterator[Observed]:
    text = contract.text
    for spec in contract.inputs:
        if text and spec.name == text.ids:
            ids = split.inputs[spec.name]
            common = _bits(token for token, texts in _texts_with(ids).items() if texts > 1)
            # In its own text every token was seen: a text is held against the others, so that its own do not count.
            yield _draft("input", spec.name, "tokens", unknown=unknown, seen=common)
        elif not (text and spec.name in text.inputs):
            yield from _plain("input", spec, contract)


def _outputs(contract: Contract) -> Iterator[Observed]:
    labels, found = contract.postprocess, contract.detection
    for spec in contract.outputs:
        if labels and spec.name == labels.output:
            yield _draft("output", spec.name, "labels")
        elif found and spec.name == found.scores:
            yield _draft("output", spec.name, "objects")
        elif not (found and spec.name == found.boxes):
            yield from _plain("output", spec, contract)


def _plain(role: str, spec: TensorSpec, contract: Contract) -> Iterator[Observed]:
    """Read a tensor by its shape; nothing of what has no batch, or holds no numbers."""
    import numpy as np

    shape = spec.shape
    if not shape or np.dtype(spec.dtype).kind not in "fiub":
        return
    if role == "input" and (axis := _channels(spec, contract)):
        yield _draft(role, spec.name, "picture", axis=axis)
    elif DYNAMIC not in shape[1:] and math.prod(shape[1:]) <= series.MAX_COLUMNS:
        yield _draft(role, spec.name, "columns")
    else:
        yield _draft(role, spec.name, "tensor")


def _channels(spec: TensorSpec, contract: Contract) -> int:
    """Return a picture's axis of channels, 0 for none; pictures that edgekit prepares have it first."""
    if len(spec.shape) != 4:
        return 0
    prepared = contract.preprocess is not None and contract.preprocess.input == spec.name
    axes = (1,) if prepared else (1, 3)
    return next((axis for axis in axes if spec.shape[axis] in series.CHANNELS), 0)


def _draft(role: str, tensor: str, reading: str, **how: object) -> Observed:
    given = {"role": role, "tensor": tensor, "reading": reading, "series": [{"name": "", "counts": [1]}], **how}
    return msgspec.convert(given, Observed)


def _drawn(
    model: Model, contract: Contract, samples: tuple[Split, int], drafts: Sequence[Observed]
) -> list[series.Drawn | None]:
    """Draw batch by batch: the answers of a whole split may not fit into memory."""
    import numpy as np

    split, size = samples
    parts: list[list[series.Drawn] | None] = [[] for _ in drafts]
    for batch in split.batches(size):
        outputs = model.network.run({name: array.copy() for name, array in batch.inputs.items()})
        for number, draft in enumerate(drafts):
            given, taken = (batch.inputs if draft.role == "input" else outputs)[draft.tensor], parts[number]
            if taken is None or given.ndim == 0 or len(given) != len(batch) or not given.size:
                parts[number] = None  # not one row a sample: there is nothing to draw
            else:
                taken.append(series.draw(draft, contract, batch.inputs, outputs))
    return [None if p is None else series.Drawn(*map(np.concatenate, zip(*p, strict=True))) for p in parts]


def _observed(draft: Observed, drawn: series.Drawn, contract: Contract) -> Observed:
    import numpy as np

    specs = contract.inputs if draft.role == "input" else contract.outputs
    shape = next(spec.shape for spec in specs if spec.name == draft.tensor)
    told = series.names(draft, shape)
    finite = np.isfinite(drawn.rows).all(1)
    rows = np.asarray(drawn.rows[finite], np.float64)
    bounds = draft.role == "input" and len(rows)
    least, most = (drawn.least[finite].min(0), drawn.most[finite].max(0)) if bounds else ((), ())
    histograms = [_histogram(name, rows[:, i]) for i, name in enumerate(told)]
    return msgspec.structs.replace(
        draft, series=tuple(histograms), least=tuple(map(_short, least)), most=tuple(map(_short, most))
    )


def _histogram(name: str, values: Array) -> Series:
    """Cut where as many samples lie in each bin as may be, halfway between a value and the next one above."""
    import numpy as np

    classes = name == "class"
    bins = max(2, min(BINS, len(values) // (OF_CLASSES if classes else IN_A_BIN)))
    ordered = np.unique(values)
    near = ALIKE * float(np.abs(ordered).max(initial=0.0))
    cuts = np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf") if len(values) else values
    # Classes that the data never gave have bins of their own at the ends: a model that always said one must be seen.
    edges = {_short(ordered[0] - 0.5), _short(ordered[-1] + 0.5)} if classes and len(ordered) else set()
    for cut in cuts.tolist():
        above = ordered[ordered > cut + near]
        if len(above):
            edges.add(_short((cut + above[0]) / 2))
    kept = tuple(sorted(edges))
    return Series(name=name, edges=kept, counts=_counts(values, kept), classes=classes)


def _counts(values: Array, edges: Sequence[float]) -> tuple[int, ...]:
    import numpy as np

    places = np.searchsorted(np.asarray(edges, np.float64), np.asarray(values, np.float64), side="left")
    return tuple(np.bincount(places, minlength=len(edges) + 1).tolist())


def _short(value: float) -> float:
    return float(f"{float(value):.7g}")


def _texts_with(ids: Array) -> Counter[int]:
    """Count the texts in which each token occurs."""
    return Counter(token for row in ids for token in set(row.tolist()))


def _bits(tokens: Iterator[int]) -> bytes:
    import numpy as np

    numbers = np.array([token for token in tokens if 0 <= token < 1 << 19], np.int64)
    bits = np.zeros(int(numbers.max(initial=-1)) + 1, np.uint8)
    bits[numbers] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _all_seen(observed: Observed, split: Split) -> Observed:
    """Tell the device of every token of the data, once its texts were held against each other."""
    if observed.reading != "tokens":
        return observed
    return msgspec.structs.replace(observed, seen=_bits(iter(_texts_with(split.inputs[observed.tensor]))))
