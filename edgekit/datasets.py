"""Reads the splits of a data set, and refuses those that a network does not take. Knows no files of models."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit import image_folder, text
from edgekit.errors import UsageError
from edgekit.loaders import data_of
from edgekit.model import SPLITS, Data, Split
from edgekit.overlap import kept, refuse_shared
from edgekit.plugins import extra
from edgekit.sources import call, first_line
from edgekit.tensors import DYNAMIC, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.model import Model
    from edgekit.tensors import Array

IGNORED = -100
"""Stands for the class where labels have one a position and this one does not count, as PyTorch's losses have it."""


def load_data(source: str) -> Data:
    """Read data from ``file.py:function``, a ``.npz``, a ``data.toml``, or a folder of pictures with one.

    A function returns `Data` or a dict of splits (see `loaders.data_of`). An ``.npz`` holds ``<split>.<input>``
    arrays, ``<split>.labels`` and ``<split>.groups``, splits ``calibration``, ``train``, ``validation``, ``test``.

    Raises:
        UsageError: nothing there, no calibration split, something else, or a sample in two splits.
    """
    path = Path(source)
    if path.is_dir():
        return _load_toml(_toml_of(path), path)
    if path.suffix == ".toml":
        return _load_toml(path, None)
    if path.suffix == ".npz":
        data = _load_npz(path)
    elif ":" in source:
        data = data_of(source, call(source))
    else:
        raise UsageError(
            f"{source!r} is no data",
            "give file.py:function, package.module:function, data.npz, data.toml or a folder of pictures",
        )
    refuse_overlap(data)
    return data


def _toml_of(folder: Path) -> Path:
    """Find ``data.toml`` in a folder, or beside it under the folder's name."""
    places = (folder / "data.toml", folder.resolve().parent / f"{folder.resolve().name}.toml")
    for place in places:
        if place.is_file():
            return place
    raise UsageError(
        f"{folder} has no data.toml, and pictures without stated preprocessing are not guessed",
        f"write {places[0]}:\n\n{image_folder.EXAMPLE}",
    )


def _load_toml(path: Path, folder: Path | None) -> Data:
    if not path.is_file():
        raise UsageError(f"there is no data at {path}", "check --data")
    try:
        spec = msgspec.toml.decode(path.read_bytes(), type=image_folder.Images | text.Text | text.Table)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        hint = f"pictures, for one, are stated so:\n\n{image_folder.EXAMPLE}"
        raise UsageError(f"{path} does not state data: {first_line(error)}", hint) from error
    beside = path.parent
    if isinstance(spec, image_folder.Images):
        if folder is not None:
            spec, beside = msgspec.structs.replace(spec, folder="."), folder
        return image_folder.read(spec, beside)
    data = text.read_text(spec, beside) if isinstance(spec, text.Text) else text.read_table(spec, beside)
    if spec.overlap == "drop":
        return without_overlap(data)
    refuse_overlap(data)
    return data


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
        if split not in SPLITS or not name:
            raise UsageError(f"{path} holds {key!r}", "name arrays <split>.<input>, as calibration.image")
        if not array.ndim:
            raise UsageError(f"{path} holds one number as {key!r}", "samples lie on the first axis of an array")
        splits.setdefault(split, {})[name] = array
    if "calibration" not in splits:
        raise UsageError(f"{path} has no calibration split", "name arrays <split>.<input>, as calibration.image")
    cut = {name: Split(part, part.pop("labels", None), part.pop("groups", None)) for name, part in splits.items()}
    return Data.of(cut)


def refuse_overlap(data: Data) -> None:
    """Raise UsageError where a sample of ``test`` is in another split, or one of ``validation`` steers or trains."""
    way_out = "leave it out of one: edgekit.datasets.without_overlap(data) does"
    refuse_shared(_hashes(data), lambda _, number: f"sample {number}", way_out)


def without_overlap(data: Data) -> Data:
    """Return the data without those samples that a split which judges has too; ``test`` keeps all of its own."""
    import numpy as np

    splits = data.splits()
    left = {name: splits[name].take(np.array(rows, np.int64)) for name, rows in kept(_hashes(data)).items()}
    return data.with_splits(left)


def _hashes(data: Data) -> dict[str, list[str]]:
    return {name: [_hash(split, number) for number in range(len(split))] for name, split in data.splits().items()}


def _hash(split: Split, number: int) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(split.inputs):
        found.update(split.inputs[name][number].tobytes())
    return found.hexdigest()


def refuse_unfit(model: Model) -> None:
    """Raise UsageError where a split lacks an input, has another shape or type, holds NaN, or labels beside the scores.

    The same for a split without a sample. Labels are integers for which the first output has a score, one a sample or
    one a position, or floats in the first output's shape. Integers of another shape are for a metric of the user's own.
    """
    if model.data is None or not model.inputs:
        return
    _refuse_detection(model.data, [spec.name for spec in model.outputs])
    vector = model.data.embedding
    if vector and vector.output not in {spec.name for spec in model.outputs}:
        raise UsageError(
            f"embedding reads the output {vector.output!r}, the network gives "
            f"{', '.join(spec.name for spec in model.outputs)}",
            "name it: Data(…, outputs=(…,))",
        )
    for part, split in model.data.splits().items():
        if not len(split):
            raise UsageError(f"the {part} split is empty", "give it samples, or leave the whole split out")
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
            _refuse_nan(f"the {part} split's {spec.name}", array)
        if split.labels is not None and model.outputs:
            _refuse_labels(part, split.labels, model.outputs[0])


def _refuse_detection(data: Data, outputs: Sequence[str]) -> None:
    how = data.detection
    if how is None:
        return
    for name in (how.boxes, how.scores):
        if name not in outputs:
            raise UsageError(
                f"detection reads the output {name!r}, the network gives {', '.join(outputs)}",
                'name them: Data(…, outputs=("boxes", "scores")), or outputs in data.toml',
            )
    if data.preprocess is None:
        raise UsageError(
            "detection needs the preprocessing of the pictures, to tell where in them the boxes lie",
            "give Data(…, preprocess=ImagePreprocess(…)), or a data.toml of pictures",
        )


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return TensorSpec(spec.name, spec.dtype, (DYNAMIC, *spec.shape[1:])).accepts(shape)


def _refuse_nan(what: str, array: Array) -> None:
    import numpy as np

    if array.dtype.kind != "f" or np.isfinite(np.sum(array, dtype=np.float64)):
        return
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
    raise UsageError(
        f"{what} holds NaN or infinity in {bad.sum()} sample(s), the first is {bad.argmax()}",
        "leave them out, or mend what prepares the data",
    )


def _refuse_labels(part: str, labels: Array, scores: TensorSpec) -> None:
    if labels.dtype.kind == "f" and _are_targets(labels.shape, scores.shape):
        _refuse_nan(f"the {part} split's labels", labels)
        return
    is_one_hot = labels.ndim == 2 and _are_alike(labels.shape[1:], scores.shape[1:])
    if labels.dtype.kind not in "iu" or is_one_hot:
        raise UsageError(
            f"the labels of the {part} split are {labels.dtype}{list(labels.shape)}, not one integer each",
            f"give the number of the class of each sample or position, counted from 0, or float targets as {scores}",
        )
    axis = class_axis(labels.shape, scores.shape)
    if axis is None and labels.ndim > 1:
        return
    counted = labels if labels.ndim == 1 else labels[labels != IGNORED]
    classes = DYNAMIC if axis is None else scores.shape[axis]
    if counted.size and (counted.min() < 0 or 0 < classes <= counted.max()):
        raise UsageError(
            f"the labels of the {part} split go from {counted.min()} to {counted.max()}, {scores} has no such class",
            "count classes from 0" + (f"; {IGNORED} marks a position that does not count" if labels.ndim > 1 else ""),
        )


def class_axis(labels: tuple[int, ...], scores: tuple[int, ...]) -> int | None:
    """Return which axis of the scores goes over the classes of the labels, both given as shapes; None where none does.

    The last one for tokens [samples, tokens, classes], the second for pictures [samples, classes, height, width]; the
    other where only that one fits. One score a position tells no classes apart.
    """
    second, last = 1, len(scores) - 1
    for axis in (last, second) if len(scores) == 3 else (second, last):
        if last > 0 and _are_alike(labels[1:], scores[1:axis] + scores[axis + 1 :]):
            return None if len(labels) > 1 and scores[axis] == 1 else axis
    return None


def _are_targets(labels: tuple[int, ...], output: tuple[int, ...]) -> bool:
    """Compare the shapes behind the samples; one number a sample may come without its axis."""
    wanted, given = output[1:], labels[1:]
    return _are_alike(given, wanted) or (not given and wanted == (1,))


def _are_alike(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    pairs = zip(given, wanted, strict=False)
    return len(given) == len(wanted) and all(other in (one, DYNAMIC) for one, other in pairs)
