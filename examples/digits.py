"""The smallest real workload: scikit-learn's 8x8 digits and a residual CNN that learns them in seconds.

Run it to train the network and write its checkpoint::

    python examples/digits.py digits.safetensors

`build` makes the network, `build_student` a much smaller one for distillation, `data` the splits.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekit.manifest import ImagePreprocess
from edgekit.model import Data, Split

CUTS = (0, 1001, 1129, 1397, 1797)
"""Where train, calibration, validation and test begin and end among the 1,797 shuffled pictures."""


class Residual(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the shape."""
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(inner)))


class DigitsNet(nn.Module):
    """From a picture [N, 1, 8, 8] to the scores [N, 10]."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.near = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(2 * width)
        self.far = nn.Sequential(*[Residual(2 * width) for _ in range(blocks)])
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Score the ten digits."""
        x = torch.relu(self.stem_norm(self.stem(image)))
        x = torch.relu(self.down_norm(self.down(self.near(x))))
        return self.classifier(self.far(x).mean((2, 3)))


def build() -> nn.Module:
    """Make the network of 63,000 parameters; its weights come from the checkpoint."""
    return DigitsNet(width=24, blocks=1)


def build_student() -> nn.Module:
    """Make a network of 4,000 parameters that a teacher can train."""
    torch.manual_seed(0)
    return DigitsNet(width=6, blocks=1)


def data() -> Data:
    """Load the digits, scaled to 0..1, in four splits that share no picture."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    splits = [Split({"image": images[start:end]}, labels[start:end]) for start, end in itertools.pairwise(CUTS)]
    train_split, calibration, validation, test = splits
    return Data(
        calibration=calibration,
        train=train_split,
        validation=validation,
        test=test,
        preprocess=ImagePreprocess(input="image", resize=8, crop=8, mode="L", mean=(0.0,), std=(255.0,)),
        labels=tuple("0123456789"),
    )


def train(network: nn.Module, split: Split, *, epochs: int = 15, seed: int = 0) -> nn.Module:
    """Train in place with labels on pictures shifted by up to one pixel; return the network in eval mode."""
    torch.manual_seed(seed)
    images, labels = torch.as_tensor(split.inputs["image"]), torch.as_tensor(split.labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: len(images) // 50 * 50].split(50):
            loss = nn.functional.cross_entropy(network(shifted(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Shift a batch by up to one pixel to any side."""
    down, right = torch.randint(0, 3, (2,)).tolist()
    return nn.functional.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]


def write_checkpoint(path: Path, *, epochs: int = 15) -> Path:
    """Train `build` and write its weights as safetensors."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    split = data().train
    if split is None:
        raise ValueError("the digits have a train split")
    save_file(train(build(), split, epochs=epochs).state_dict(), path)
    return path


def main(path: Path) -> None:
    """Train, write the checkpoint and print the accuracy on the validation pictures."""
    from edgekit import workload
    from edgekit.compress.evaluate import top1

    everything = data()
    write_checkpoint(path)
    model = workload.load(f"{__file__}:build", path, everything)
    if everything.validation is not None:
        print(f"{path}: validation top-1 {top1(model.network, everything.validation):.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits.safetensors"))
