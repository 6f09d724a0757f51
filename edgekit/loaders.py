"""From what people's loaders give to splits: arrays, tensors, or batches as PyTorch's DataLoader yields them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from edgekit.errors import UnknownName, UsageError
from edgekit.model import SPLITS, Data, Split

if TYPE_CHECKING:
    from edgekit.tensors import Array

ALONE = "input"
"""The name of an only input that comes without one."""


def data_of(source: str, result: object) -> Data:
    """Return what a data function gave as `Data`: itself, or a dict with an entry a split.

    An entry is a `Split`; an array of inputs, or several by name; a pair of those and their labels; or an iterable of
    such batches.

    Raises:
        UsageError: something else, no calibration split, or arrays that do not belong together.
    """
    if isinstance(result, Data):
        return result
    if not isinstance(result, Mapping):
        raise UsageError(
            f"{source} returned {type(result).__name__}, not edgekit.model.Data or a dict of splits",
            'return {"calibration": …, "validation": (inputs, labels), "test": DataLoader(…)}',
        )
    for name in result:
        if name not in SPLITS:
            raise UnknownName("split", str(name), SPLITS)
    if "calibration" not in result:
        raise UsageError(
            f"{source} returned no calibration split", f"it returned {', '.join(map(str, result)) or 'nothing'}"
        )
    return Data.of({name: split_of(f"{source}, {name}", entry) for name, entry in result.items()})


def split_of(where: str, entry: object) -> Split:
    """Return one split of what a loader gave; ``where`` names it in messages.

    Raises:
        UsageError: it is none.
    """
    import numpy as np

    if isinstance(entry, Split):
        return entry
    if isinstance(entry, Mapping) or _is_array(entry) or isinstance(entry, tuple):
        return _batch(where, entry)
    if not isinstance(entry, Iterable):
        raise UsageError(f"{where}: a {type(entry).__name__} is no split", "give arrays, or an iterable of batches")
    batches = [_batch(where, batch) for batch in entry]
    if not batches:
        raise UsageError(f"{where} is empty", "check what the loader reads")
    if any(batch.inputs.keys() != batches[0].inputs.keys() for batch in batches):
        raise UsageError(f"{where}: batches have different inputs", "give every batch the same ones")
    labels = [batch.labels for batch in batches if batch.labels is not None]
    try:
        inputs = {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
        return Split(inputs, np.concatenate(labels) if labels else None)
    except ValueError as error:
        raise UsageError(f"{where}: batches do not fit together: {error}", "pad them to one shape") from error


def _batch(where: str, batch: object) -> Split:
    """Read inputs, or (inputs, labels): a DataLoader's collate function makes lists of tuples."""
    inputs, labels = batch, None
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise UsageError(
                f"{where}: a batch of {len(batch)} parts is neither inputs nor (inputs, labels)",
                "put several inputs into a dict by name: ({'left': …, 'right': …}, labels)",
            )
        inputs, labels = batch if len(batch) == 2 else (batch[0], None)
    named = _named(inputs)
    return Split(
        {name: _array(f"{where}.{name}", value) for name, value in named.items()},
        None if labels is None else _array(f"{where}.labels", labels),
    )


def _named(inputs: object) -> dict[str, object]:
    if isinstance(inputs, Mapping):
        return {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, tuple | list) and inputs and all(map(_is_array, inputs)):
        return {f"{ALONE}_{number}": value for number, value in enumerate(inputs)}
    return {ALONE: inputs}


def _is_array(value: object) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _array(where: str, value: object) -> Array:
    """Take arrays and tensors as they are, lists of numbers as NumPy reads them."""
    import numpy as np

    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: {error}", "give arrays or tensors of one shape") from error
    if not array.ndim or array.dtype.kind not in "fiub":
        raise UsageError(
            f"{where} is {type(value).__name__} ({array.dtype}{list(array.shape)}), not an array of numbers",
            "samples lie on the first axis",
        )
    return array
