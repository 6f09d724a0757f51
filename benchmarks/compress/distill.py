"""A small student on Fashion-MNIST, trained with and without a teacher: equal epochs, data and seeds; the gain with its
95 % interval (paired t over the seeds). The students see 4,000 pictures, the teacher saw 20,000, as where a large
network was trained once on all there is, and a small one is made from what is at hand.

The pictures come from Debian's package dataset-fashion-mnist (``EDGEKIT_FASHION`` names another folder). Every choice
(method, alpha, temperature) was made on the validation split; test is read once, at the end, by the finished students.
"""

from __future__ import annotations

import gzip
import itertools
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _report import Row, run  # one folder up

from edgekit import workload
from edgekit.compress.evaluate import top1
from edgekit.compress.losses import Labels
from edgekit.compress.passes.distill import Distill
from edgekit.compress.training import Lesson, Schedule, train
from edgekit.model import Data, Split
from edgekit.progress import silent

PICTURES = Path(os.environ.get("EDGEKIT_FASHION", "/usr/share/datasets/fashion-mnist"))
SEEN_BY_TEACHER, TRAIN, VALIDATION = 20_000, 4_000, 5_000
T_975 = {2: 12.706, 3: 4.303, 5: 2.776}
"""Student's t for a two-sided 95 % interval, by the number of pairs."""


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, each with its norm."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(narrow, narrow, 3, stride, 1, groups=narrow, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(narrow)
        self.pointwise = nn.Conv2d(narrow, wide, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Change the width, and the size by the stride."""
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        return torch.relu(self.pointwise_norm(self.pointwise(x)))


def student() -> nn.Module:
    """Make a DS-CNN of 5,000 parameters."""
    stem = (nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    body = (Separable(16, 24, 1), Separable(24, 40, 2), Separable(40, 40, 1))
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))


def teacher() -> nn.Module:
    """Make a CNN of 160,000 parameters."""
    layers: list[nn.Module] = []
    for narrow, wide, stride in ((1, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1)):
        layers += [nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96, 10))


def fashion(quick: bool) -> Data:
    """Read the splits: train and validation from the training file, test from the test file."""
    images, labels = _read("train")
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    ends = np.cumsum([0, 2_000 if quick else SEEN_BY_TEACHER, 1_000 if quick else VALIDATION])
    parts = [Split({"image": images[a:b]}, labels[a:b]) for a, b in itertools.pairwise(ends)]
    test_images, test_labels = _read("t10k")
    return Data(parts[1].head(64), parts[0], parts[1], Split({"image": test_images}, test_labels))


def main(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    if not PICTURES.is_dir():
        return [Row("student with and without a teacher", None, "no pictures: apt-get install dataset-fashion-mnist")]
    data = fashion(quick)
    seeds, epochs = ((0, 1) if quick else (0, 1, 2)), (1 if quick else 15)
    began = time.monotonic()
    small = replace(data, train=data.train.head(TRAIN))
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "teacher.pt"
        grown = grow(data, 1 if quick else 7)
        torch.save(grown.state_dict(), checkpoint)
        taught_s = time.monotonic() - began
        accuracy = {
            (alpha, seed): taught(small, checkpoint, seed=seed, epochs=epochs, alpha=alpha)
            for seed in seeds
            for alpha in (ALPHA, 0.0)
        }
    best = workload.from_module("teacher", grown, data)
    with_teacher, without = (np.array([accuracy[alpha, seed] for seed in seeds]) for alpha in (ALPHA, 0.0))
    gain = with_teacher - without
    low, middle, high = _interval(gain)
    kind = f"{epochs} epochs on {len(small.train)}, {len(seeds)} seeds"
    return [
        Row("test top-1, teacher", 100 * top1(best.network, data.test, 64), "%"),
        Row(
            f"test top-1, student, {kind}",
            float(with_teacher.mean()),
            "%",
            "without a teacher",
            float(without.mean()),
            "ratio >= 1",
        ),
        Row("gain, mean over the seeds", middle, "points"),
        Row("gain, lower end of the 95 % interval (paired t)", low, "points"),
        Row("gain, upper end of the 95 % interval (paired t)", high, "points"),
        *[Row(f"gain, seed {seed}", float(one), "points") for seed, one in zip(seeds, gain, strict=True)],
        Row("wall time of the teacher", taught_s, "s"),
        Row("wall time, all", time.monotonic() - began, "s"),
    ]


ALPHA, HEAT = 0.9, 2.0


def _interval(gain: np.ndarray) -> tuple[float, float, float]:
    """Return the lower end, the mean and the upper end."""
    half = T_975[len(gain)] * gain.std(ddof=1) / np.sqrt(len(gain))
    return float(gain.mean() - half), float(gain.mean()), float(gain.mean() + half)


def grow(data: Data, epochs: int) -> nn.Module:
    """Train the teacher by the labels."""
    torch.manual_seed(100)
    model = workload.from_module("teacher", teacher().eval(), data)
    how = Schedule(epochs=epochs, lr=4e-3, batch=128, seed=100, shift=2, flip=True, mixed_precision="auto")
    train(model.network, Lesson(data.train, (Labels(),)), how, silent)
    return model.network.module


def taught(data: Data, checkpoint: Path, *, seed: int, epochs: int, alpha: float, **options: object) -> float:
    """Train a student that this seed makes; return its top-1 on test, or on validation where that is asked for."""
    torch.manual_seed(seed)
    model = workload.from_module("student", student().eval(), data)
    judged = options.pop("judged", data.test)
    how = {"temperature": HEAT, "lr": 1e-2, "batch": 64} | options
    source = f"{Path(__file__).resolve()}:teacher"
    learning = Distill(teacher=source, teacher_checkpoint=str(checkpoint), alpha=alpha, epochs=epochs, seed=seed, **how)
    return 100 * top1(learning.apply(model, silent).network, judged, 64)


def _read(name: str) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(PICTURES / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(PICTURES / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return ((images - 72.9) / 90.0).astype(np.float32), labels


if __name__ == "__main__":
    run("Distillation on Fashion-MNIST: a student with and without its teacher", main)
