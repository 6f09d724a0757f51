"""Reads pictures from ``folder/<class>/*.jpg`` as ``data.toml`` states. Knows no model."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.errors import InputError, UsageError
from edgekit.manifest import Detection, ImagePreprocess
from edgekit.model import SPLITS, Data, Split
from edgekit.overlap import kept, refuse_shared
from edgekit.pictures import picture_to_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 8 << 30
"""Arrays of all splits together: they are held in memory."""

EXAMPLE = """kind = "images"
resize = 256                      # shorter side
crop = 224                        # of the centre
mode = "RGB"                      # or "L"
interpolation = "bilinear"        # or "bicubic", "nearest"
mean = [123.675, 116.28, 103.53]  # of values 0..255
std = [58.395, 57.12, 57.375]

[counts]                          # for splits that have no folder of their own
calibration = 128
validation = 500
test = 1000
"""

Count = Annotated[int, msgspec.Meta(ge=1)]


class Images(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="images"):
    """What ``data.toml`` says of pictures; nothing of the preprocessing has a default but that the centre is cropped.

    With ``detection`` the pictures are a detector's: they need not lie in folders of classes, and have no labels.
    """

    resize: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    crop: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    mode: Literal["RGB", "L"]
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["crop", "pad", "stretch"] = "crop"
    fill: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    detection: Detection | None = None
    outputs: tuple[str, ...] = ()
    folder: str = "."
    input: str = "image"
    counts: dict[Literal["calibration", "train", "validation", "test"], Count] = {}
    seed: int = 0
    overlap: Literal["refuse", "drop"] = "refuse"

    def preprocess(self) -> ImagePreprocess:
        """Return what a bundle says to the device."""
        return ImagePreprocess(
            input=self.input,
            resize=self.resize,
            crop=self.crop,
            fit=self.fit,
            fill=self.fill or 0,
            mode=self.mode,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )


def read(spec: Images, beside: Path) -> Data:
    """Read the pictures of every split; ``beside`` is the folder of ``data.toml``.

    ``train/``, ``calibration/``, ``validation/`` and ``test/`` are splits where they are all that the folder holds;
    what has no folder is drawn by ``counts`` from ``train/``, else from the whole: evenly over the classes, in an
    order that ``seed`` makes.

    Raises:
        UsageError: no pictures, no calibration split, fewer pictures than stated, a picture in two splits, or a
            damaged one; names the file.
    """
    _refuse_odd(spec)
    folder = beside / spec.folder
    chosen = _chosen(spec, folder)
    chosen = _apart(chosen, folder, spec.overlap)
    classes = sorted({path.parent.name for paths in chosen.values() for path in paths})
    total = sum(map(len, chosen.values())) * len(spec.mean if spec.mode == "L" else "RGB") * spec.crop**2 * 4
    if total > MAX_BYTES:
        raise UsageError(
            f"the pictures of {folder} take {total / 2**30:.1f} GiB as arrays, more than {MAX_BYTES / 2**30:.0f}",
            "state smaller [counts] in data.toml, also for train",
        )
    splits = {name: _split(spec, paths, classes) for name, paths in chosen.items()}
    labels = () if spec.detection else tuple(classes)
    return replace(Data.of(splits, spec.preprocess(), labels), outputs=spec.outputs, detection=spec.detection)


def _refuse_odd(spec: Images) -> None:
    channels = 3 if spec.mode == "RGB" else 1
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, channels):
            raise UsageError(
                f"data.toml states {len(values)} numbers as {name}, {spec.mode} needs {channels}",
                "give one number for each channel, or one for all",
            )
        if not all(math.isfinite(value) for value in values):
            raise UsageError(f"data.toml states {name} = {list(values)}", "give finite numbers, for values 0..255")
    if not all(value > 0 for value in spec.std):
        raise UsageError(f"data.toml states std = {list(spec.std)}", "deviations are above 0, for values 0..255")
    if spec.crop > spec.resize:
        raise UsageError(f"data.toml crops {spec.crop} from a shorter side of {spec.resize}", "crop at most resize")
    if (spec.fit == "pad") != (spec.fill is not None):
        raise UsageError(
            f'data.toml states fit = "{spec.fit}" {"without" if spec.fill is None else "with"} fill',
            'fill goes with fit = "pad": what lies around the picture, 0 to 255',
        )
    if spec.fit != "crop" and spec.crop != spec.resize:
        raise UsageError(
            f'data.toml states fit = "{spec.fit}" with resize = {spec.resize} and crop = {spec.crop}',
            "the whole picture comes to one size: state it as both",
        )


def _chosen(spec: Images, folder: Path) -> dict[str, list[Path]]:
    pools = _pools(folder, classes=spec.detection is None)
    source = "train" if "train" in pools else "" if "" in pools else None
    found: dict[str, list[Path]] = {}
    for split in ("test", "validation", "calibration", "train"):  # what judges is drawn first, so it stays the same
        count = spec.counts.get(split)
        pool = split if split in pools else source
        if pool is None or (count is None and pool != split):
            continue
        ready = _drawn(pools[pool], spec.seed)
        if count is not None and count > len(ready):
            raise UsageError(
                f"data.toml wants {count} pictures for {split}, {folder / pool} has {len(ready)} left",
                "state smaller [counts]",
            )
        found[split] = ready[:count]
        taken = set(found[split])
        pools[pool] = [path for path in pools[pool] if path not in taken]
    if not found.get("calibration"):
        raise UsageError(
            f"{folder} has no calibration split", "state [counts] calibration = 128 in data.toml, or make calibration/"
        )
    return {name: paths for name, paths in found.items() if paths}


def _pools(folder: Path, *, classes: bool) -> dict[str, list[Path]]:
    """Return the pictures by split, or all of them under the empty name; only those in folders of ``classes``."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "check folder in data.toml")
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if inside and set(inside) <= set(SPLITS):
        return {name: _pictures(folder / name, classes=classes) for name in inside}
    return {"": _pictures(folder, classes=classes)}


def _pictures(folder: Path, *, classes: bool) -> list[Path]:
    paths = sorted([*folder.glob("*/*"), *([] if classes else folder.glob("*"))])
    found = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found and not classes:
        raise UsageError(f"{folder} holds no pictures", f"put some there, as NAME{SUFFIXES[0]}")
    if not found:
        raise UsageError(
            f"{folder} holds no pictures in folders of classes", f"make {folder / 'CLASS'}/NAME{SUFFIXES[0]}"
        )
    return found


def _drawn(paths: Sequence[Path], seed: int) -> list[Path]:
    """Order pictures so that any beginning holds the classes evenly."""
    chance = random.Random(seed)  # noqa: S311  # a choice of samples, no secret
    by_class: dict[str, list[Path]] = {}
    for path in paths:
        by_class.setdefault(path.parent.name, []).append(path)
    for group in by_class.values():
        chance.shuffle(group)
    ordered: list[Path] = []
    while by_class:
        turn = list(by_class)
        chance.shuffle(turn)
        ordered += [by_class[name].pop() for name in turn]
        by_class = {name: group for name, group in by_class.items() if group}
    return ordered


def _apart(chosen: dict[str, list[Path]], folder: Path, overlap: str) -> dict[str, list[Path]]:
    keys = {n: [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] for n, paths in chosen.items()}
    if overlap == "drop":
        return {name: [chosen[name][i] for i in numbers] for name, numbers in kept(keys).items()}
    refuse_shared(
        keys, lambda split, i: str(chosen[split][i].relative_to(folder)), 'delete one, or state overlap = "drop"'
    )
    return chosen


def _split(spec: Images, paths: Sequence[Path], classes: Sequence[str]) -> Split:
    import numpy as np

    numbers: Mapping[str, int] = {name: number for number, name in enumerate(classes)}
    how = spec.preprocess()
    arrays = np.empty((len(paths), 3 if spec.mode == "RGB" else 1, spec.crop, spec.crop), np.float32)
    for row, path in enumerate(paths):
        try:
            arrays[row] = picture_to_tensor(path.read_bytes(), how)[0]
        except InputError as error:
            raise UsageError(f"{path}: {error.message}", "delete it, or fetch it again") from error
    if spec.detection:
        return Split({spec.input: arrays})
    return Split({spec.input: arrays}, np.array([numbers[path.parent.name] for path in paths], np.int64))
