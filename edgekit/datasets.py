"""Reads the splits of a data set, and refuses those that a network does not take. Knows no files of models."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.model import Data, Split
from edgekit.plugins import extra
from edgekit.sources import call, first_line
from edgekit.tensors import DYNAMIC, TensorSpec

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.tensors import Array


def load_data(source: str) -> Data:
    """Read data from ``file.py:function`` (returns `Data`) or a ``.npz``.

    An ``.npz`` holds ``<split>.<input>`` arrays and ``<split>.labels``, splits ``calibration``, ``train``,
    ``validation`` and ``test``.

    Raises:
        UsageError: nothing there, no calibration split, or the function returns something else.
    """
    if source.endswith(".npz"):
        return _load_npz(Path(source))
    if ":" not in source:
        raise UsageError(f"{source!r} is no data", "give file.py:function, package.module:function or data.npz")
    result = call(source)
    if not isinstance(result, Data):
        raise UsageError(f"{source} returned {type(result).__name__}, not edgekit.model.Data")
    return result


def _load_npz(path: Path) -> Data:
    with extra("compress"):
        import numpy as np
    if not path.is_file():
        raise UsageError(f"there is no data at {path}", "check --data")
    if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle, and advise to trust it
        raise UsageError(f"{path} is no .npz file, or only the beginning of one", "write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is no .npz file: {first_line(error)}", "write it again with numpy.savez") from error
    splits: dict[str, dict[str, Array]] = {}
    for key, array in arrays.items():
        split, _, name = key.partition(".")
        if split not in ("calibration", "train", "validation", "test") or not name:
            raise UsageError(f"{path} holds {key!r}", "name arrays <split>.<input>, as calibration.image")
        if not array.ndim:
            raise UsageError(f"{path} holds one number as {key!r}", "samples lie on the first axis of an array")
        splits.setdefault(split, {})[name] = array
    if "calibration" not in splits:
        raise UsageError(f"{path} has no calibration split", "name arrays <split>.<input>, as calibration.image")
    cut = {name: Split(part, part.pop("labels", None)) for name, part in splits.items()}
    return Data(cut["calibration"], cut.get("train"), cut.get("validation"), cut.get("test"))


def refuse_unfit(model: Model) -> None:
    """Raise UsageError where a split lacks an input, has another shape or type, or labels that no score stands for."""
    if model.data is None or not model.inputs:
        return
    for part in ("calibration", "train", "validation", "test"):
        split: Split | None = getattr(model.data, part)
        if split is None:
            continue
        if set(split.inputs) != {spec.name for spec in model.inputs}:
            wanted = ", ".join(str(spec) for spec in model.inputs)
            raise UsageError(
                f"the {part} split has {sorted(split.inputs)}, the network takes {wanted}",
                f"name the arrays as the network's inputs, as {part}.{model.inputs[0].name}",
            )
        for spec in model.inputs:
            array = split.inputs[spec.name]
            if str(array.dtype) != spec.dtype or not _fits(spec, array.shape):
                raise UsageError(
                    f"the {part} split has {spec.name}: {array.dtype}{list(array.shape)}, the network takes {spec}",
                    "samples lie on the first axis",
                )
        if split.labels is not None and model.outputs:
            _refuse_labels(part, split.labels, model.outputs[0])


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return TensorSpec(spec.name, spec.dtype, (DYNAMIC, *spec.shape[1:])).accepts(shape)


def _refuse_labels(part: str, labels: Array, scores: TensorSpec) -> None:
    classes = scores.shape[-1] if len(scores.shape) == 2 and scores.shape[-1] != DYNAMIC else None
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UsageError(
            f"the labels of the {part} split are {labels.dtype}{list(labels.shape)}, not one integer each",
            "give the number of the class of each sample, counted from 0",
        )
    if len(labels) and (labels.min() < 0 or (classes is not None and labels.max() >= classes)):
        raise UsageError(
            f"the labels of the {part} split go from {labels.min()} to {labels.max()}, {scores} has no such class",
            "count classes from 0",
        )
