"""The image networks that are compressed: float file, calibration by seed, validation that chooses, test that judges.

CIFAR-10: 512 calibration pictures from train, 2,000 validation, 10,000 test. EfficientNet-Lite0: of the 1,000
labelled photographs, calibration is drawn from 128, 272 choose and 600 judge.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import _cifar
import numpy as np
from _setting import HERE, ROOT, SHARED

from edgekit import device_profiles, plugins, workload
from edgekit.export import PACKAGE
from edgekit.model import Data, Split
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edgekit.model import Model
    from edgekit.tensors import Array

PHOTOGRAPHS = SHARED / "imagenet_sample256_jpg.zip"
EFFICIENTNET = "efficientnet-lite0"


@dataclass(frozen=True)
class Subject:
    """One network and its data. ``calibration`` gives samples for a seed."""

    name: str
    workload: str
    checkpoint: Path | None
    input: str
    calibration: Callable[[int], Array]
    validation: Split
    test: Split

    def model(self, seed: int, *, validation: bool = False) -> Model:
        """Load the float network with the calibration of one seed."""
        data = Data(Split({self.input: self.calibration(seed)}), validation=self.validation if validation else None)
        return workload.load(self.workload, self.checkpoint, data)

    def float_file(self, folder: Path) -> Path:
        """Write the float network as ONNX, where the peers begin."""
        path = folder / f"{self.name}.onnx"
        if not path.is_file():
            write_onnx(self.model(0), folder / self.name, path)
        return path

    def smaller(self, count: int) -> Subject:
        """Keep the first pictures, spread over the classes, for a quick look."""
        cut = np.random.default_rng(0).permutation(len(self.test))[:count]
        return replace(self, validation=self.validation.head(count), test=_chosen(self.test, cut))


def write_onnx(model: Model, folder: Path, path: Path, profile: str = "x86-64") -> Path:
    """Write a model with its plan as one hardware class wants it, without the proofs of a whole export."""
    folder.mkdir(parents=True, exist_ok=True)
    exporter = plugins.load(PACKAGE, "onnx", "format")
    made = exporter.export(model, device_profiles.load(profile), folder, silent)  # type: ignore[attr-defined]  # an Exporter
    (folder / made.main).replace(path)
    return path


def wanted(names: Iterable[str]) -> list[str]:
    """Return the networks that ``EDGEKIT_BENCH_ONLY`` names, with commas between them; all where it is not set."""
    only = os.environ.get("EDGEKIT_BENCH_ONLY", "")
    return [name for name in names if not only or name in only.split(",")]


def cifar(name: str) -> Subject:
    """Return one of the ResNets, adapted to the JPEGs; trains it where the cache has none."""
    return Subject(
        name=name,
        workload=f"{HERE / '_cifar.py'}:{name}",
        checkpoint=_cifar.adapted_path(name),
        input=_cifar.INPUT,
        calibration=lambda seed: _cifar.data(512, seed).calibration.inputs[_cifar.INPUT],
        validation=_cifar.split("train", _cifar.parts()[1]),
        test=_cifar.split("test"),
    )


def efficientnet(count: int = 32) -> Subject:
    """Return EfficientNet-Lite0 with ``count`` calibration photographs a seed."""
    os.environ["EDGEKIT_IMAGENET_SAMPLE"] = str(PHOTOGRAPHS)
    source = ROOT / "examples/efficientnet.py"
    data = workload.load_data(f"{source}:sample_data")
    rest = data.validation
    assert rest is not None, "the sample has photographs that judge"
    order = np.random.default_rng(1).permutation(len(rest))
    pool = data.calibration.inputs["image"]
    return Subject(
        name=EFFICIENTNET,
        workload=f"{source}:build",
        checkpoint=None,
        input="image",
        calibration=lambda seed: pool[np.random.default_rng(seed).permutation(len(pool))[:count]],
        validation=_chosen(rest, np.sort(order[:272])),
        test=_chosen(rest, np.sort(order[272:])),
    )


def _chosen(split: Split, indices: Array) -> Split:
    labels = None if split.labels is None else split.labels[indices]
    return Split({name: array[indices] for name, array in split.inputs.items()}, labels)
