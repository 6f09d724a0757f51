"""Draws from each sample the few numbers whose distribution is watched: at export and on the device by the same code.

A sample is the unit, not a pixel: the pixels of a picture hang together, so a thousand of them prove no more than one
picture does. Knows no engine, and nothing of what is done with the numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from edgekit.errors import HealthError
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.baseline import Observed
    from edgekit.runtime.session import Contract
    from edgekit.tensors import Array

MAX_COLUMNS = 48
"""A sample of so few numbers is watched number by number; a larger one by its mean and spread."""
LOOKED_AT = 4096
"""So many values of a channel, or of a tensor, are looked at: whole rows in fixed steps."""
CHANNELS = (1, 3, 4)


class Drawn(NamedTuple):
    """Numbers by sample: the series [samples, series], and the least and largest value of each column or channel."""

    rows: Array
    least: Array
    most: Array


def names(observed: Observed, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Name the series of a tensor of that shape, in the order in which `draw` gives them; none for another shape."""
    if observed.reading == "columns":
        count = math.prod(shape[1:]) if min(shape, default=0) and DYNAMIC not in shape[1:] else 0
        return tuple(f"number {i}" for i in range(count if count <= MAX_COLUMNS else 0))
    if observed.reading == "picture":
        channels = range(shape[observed.axis] if len(shape) == 4 and shape[observed.axis] in CHANNELS else 0)
        own = [f"{what} of channel {c}" for what in ("mean", "spread") for c in channels]
        return (*own, "detail", *(["first channel minus last"] if len(channels) == 3 else []))
    if observed.reading == "tokens":
        return ("length", *(["share of unknown tokens"] if observed.unknown >= 0 else []), "share of new tokens")
    return {
        "tensor": ("mean", "spread"),
        "labels": ("class", "confidence"),
        "objects": ("class", "confidence", "objects"),
    }[observed.reading]


def draw(observed: Observed, contract: Contract, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Drawn:
    """Draw the numbers of each sample of a batch; what holds NaN or infinity gives such numbers."""
    array = (inputs if observed.role == "input" else outputs)[observed.tensor]
    if observed.reading == "columns":
        rows = array.reshape(len(array), -1)
        return Drawn(rows, rows, rows)
    if observed.reading == "picture":
        return _of_picture(array, observed.axis)
    if observed.reading == "tokens":
        return _unbounded(_of_tokens(observed, array, contract, inputs))
    if observed.reading == "labels":
        return _unbounded(_of_scores(array, contract))
    if observed.reading == "objects":
        return _unbounded(_of_objects(array, contract, outputs))
    return _of_tensor(array)


def _unbounded(rows: Array) -> Drawn:
    return Drawn(rows, rows[:, :0], rows[:, :0])


def _of_picture(array: Array, axis: int) -> Drawn:
    """Return mean and spread of each channel, how much neighbours differ (blur, noise), and first minus last channel.

    The last tells colours in the wrong order, which leave each channel's mean where it may have been.
    """
    import numpy as np

    if axis != 1:
        array = np.moveaxis(array, axis, 1)
    step = max(1, array.shape[2] * array.shape[3] // LOOKED_AT)
    looked = np.ascontiguousarray(array[:, :, step // 2 :: step] if step < array.shape[2] else array, np.float32)
    flat = looked.reshape(*looked.shape[:2], -1)
    mean = flat.mean(2)
    spread = np.sqrt(np.maximum(np.einsum("ncp,ncp->nc", flat, flat) / flat.shape[2] - mean * mean, 0))
    steps = np.abs(looked[..., 1:] - looked[..., :-1])
    detail = steps.reshape(len(steps), -1).mean(1, keepdims=True) if steps.size else mean[:, :1] * 0
    balance = [mean[:, :1] - mean[:, 2:]] if mean.shape[1] == 3 else []
    return Drawn(np.concatenate([mean, spread, detail, *balance], 1), flat.min(2), flat.max(2))


def _of_tensor(array: Array) -> Drawn:
    import numpy as np

    flat = array.reshape(len(array), -1)
    flat = np.asarray(flat[:, :: max(1, flat.shape[1] // LOOKED_AT)], np.float64)
    return Drawn(np.stack([flat.mean(1), flat.std(1)], 1), flat.min(1, keepdims=True), flat.max(1, keepdims=True))


def _of_tokens(observed: Observed, ids: Array, contract: Contract, inputs: Mapping[str, Array]) -> Array:
    """Return how long a text is, and which share of it the tokenizer, or the data of the export, did not know."""
    import numpy as np

    mask = inputs.get(contract.text.mask) if contract.text else None
    there = ids != 0 if mask is None else mask != 0  # texts are filled up with zeros
    length = there.sum(1)
    bits = np.unpackbits(np.frombuffer(observed.seen, np.uint8), bitorder="little")
    known = (ids >= 0) & (ids < len(bits))
    known[known] = bits[ids[known]] != 0
    shares = [(there & (ids == observed.unknown)).sum(1)] if observed.unknown >= 0 else []
    shares.append((there & ~known).sum(1))
    return np.stack([length, *(share / np.maximum(length, 1) for share in shares)], 1)


def _of_scores(scores: Array, contract: Contract) -> Array:
    """Return the best class and its probability, as `labels.best_labels` reads them."""
    import numpy as np

    flat = np.asarray(scores.reshape(len(scores), -1), np.float64)
    best = flat.argmax(1)
    most = flat.max(1)
    softmax = contract.postprocess is not None and contract.postprocess.softmax
    sure = 1 / np.exp(flat - most[:, None]).sum(1) if softmax else most
    return np.stack([best, sure], 1)


def _of_objects(scores: Array, contract: Contract, outputs: Mapping[str, Array]) -> Array:
    """Return the class and the score of the surest candidate (-1: none), and how many candidates count."""
    import numpy as np

    from edgekit.runtime import detection

    if contract.detection is None:
        return np.full((len(scores), 3), np.nan)
    try:
        return detection.surest(outputs, contract.detection)
    except HealthError:  # NaN among them
        return np.full((len(scores), 3), np.nan)
