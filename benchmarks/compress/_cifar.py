"""CIFAR-10 from JPEGs, and the ResNets that learned it, adapted to the JPEGs before anything is taken from them.

The pictures lie in ``cifar10_jpg.zip``, the checkpoints of He et al. 2016 (section 4.2, shortcuts of kind A) in
``resnet_cifar10``, both in the folder that ``EDGEKIT_BENCH_DATA`` names, else in ``../shared/data``. The checkpoints
were trained on lossless pictures and lose ten points on the copies: `adapted` trains them two epochs more on the
train split. Of the 50,000 train pictures, 2,000 are for validation and train nothing here (the checkpoints saw their
lossless originals, and ResNet-20 was adapted elsewhere, so validation reads higher than test). Knows no compression.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import nn

from edgekit.manifest import ImagePreprocess
from edgekit.model import Data, Split

if TYPE_CHECKING:
    from edgekit.tensors import Array

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEKIT_BENCH_DATA") or ROOT.parent / "shared/data")
CACHE = Path(os.environ.get("EDGEKIT_BENCH_CACHE") or ROOT / "bench-out/cache")
PICTURES = SHARED / "cifar10_jpg.zip"
CHECKPOINTS = SHARED / "resnet_cifar10"
ADAPTED_ELSEWHERE = {"resnet20": CHECKPOINTS / "resnet20_jpegft.pt"}
PUBLISHED = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet44": "resnet44-014dd654.th",
    "resnet56": "resnet56-4bfd9763.th",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 2000
INPUT = "image"


class Block(nn.Module):
    """Two convolutions and a shortcut without weights: every second pixel, new channels are zero."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.shrinks, self.added = stride > 1, (wide - narrow) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Go both ways and join them."""
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.shrinks or self.added:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return torch.relu(inner + x)


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, from pictures [N, 3, 32, 32] to the scores [N, 10]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, blocks, 1)
        self.layer2 = stage(16, 32, blocks, 2)
        self.layer3 = stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Score the ten classes."""
        x = torch.relu(self.bn1(self.conv1(image)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def stage(narrow: int, wide: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(narrow, wide, stride), *(Block(wide, wide, 1) for _ in range(blocks - 1)))


def resnet20() -> nn.Module:
    return ResNet(3)


def resnet32() -> nn.Module:
    return ResNet(5)


def resnet44() -> nn.Module:
    return ResNet(7)


def resnet56() -> nn.Module:
    return ResNet(9)


BUILDERS = {"resnet20": resnet20, "resnet32": resnet32, "resnet44": resnet44, "resnet56": resnet56}


def there() -> bool:
    """Say whether pictures and checkpoints are at hand."""
    return PICTURES.is_file() and CHECKPOINTS.is_dir()


@functools.cache
def pictures() -> dict[str, Array]:
    """Return ``train`` [50000, 32, 32, 3] and ``test`` [10000, …] as bytes, and their labels; decoded once."""
    path = CACHE / "cifar10.npz"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(draft, **_decoded())
        draft.replace(path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _decoded() -> dict[str, Array]:
    found = {}
    with zipfile.ZipFile(PICTURES) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        for part in ("train", "test"):
            own = [name for name in names if name.startswith(f"{part}/")]
            found[part] = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in own])
            found[f"{part}_labels"] = np.array([classes.index(n.split("/")[1]) for n in own], np.int64)
    return found


def normalized(bytes_: Array) -> Array:
    """Scale [N, 32, 32, 3] bytes to what the networks take, [N, 3, 32, 32]."""
    scaled = (bytes_.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def parts() -> tuple[Array, Array]:
    """Return the indices of the train pictures that train, and of those held out, shuffled once for all."""
    order = np.random.default_rng(0).permutation(50_000)
    return order[HELD_OUT:], np.sort(order[:HELD_OUT])


def split(part: str, chosen: Array | None = None) -> Split:
    """Return the chosen pictures of ``train`` or ``test``, all where none are chosen."""
    everything = pictures()
    images, labels = everything[part], everything[f"{part}_labels"]
    if chosen is not None:
        images, labels = images[chosen], labels[chosen]
    return Split({INPUT: normalized(images)}, labels)


def data(calibration: int = 512, seed: int = 0, *, train: bool = False, test: bool = False) -> Data:
    """Draw the calibration from the train pictures by ``seed``; validation is always the same 2,000."""
    training, held_out = parts()
    drawn = np.random.default_rng(1000 + seed).choice(training, calibration, replace=False)
    scale = 255.0
    return Data(
        calibration=split("train", drawn),
        train=split("train", training) if train else None,
        validation=split("train", held_out),
        test=split("test") if test else None,
        preprocess=ImagePreprocess(
            input=INPUT,
            resize=32,
            crop=32,
            mean=tuple(m * scale for m in MEAN),
            std=tuple(s * scale for s in STD),
        ),
    )


def published(name: str) -> nn.Module:
    """Return a network as it was published, trained on the lossless pictures."""
    return _filled(name, CHECKPOINTS / PUBLISHED[name])


def _filled(name: str, path: Path) -> nn.Module:
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    network = BUILDERS[name]()
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return network.eval()


def adapted(name: str) -> nn.Module:
    """Return a network adapted to the JPEGs, from the cache where it was made before."""
    return _filled(name, adapted_path(name))


def adapted_path(name: str) -> Path:
    """Return the checkpoint of `adapted`; trains it where there is none (an hour of one core for ResNet-56)."""
    if name in ADAPTED_ELSEWHERE and ADAPTED_ELSEWHERE[name].is_file():
        return ADAPTED_ELSEWHERE[name]
    path = CACHE / f"{name}-adapted-{_recipe_digest()}.pt"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        torch.save(train(published(name), epochs=2).state_dict(), draft)
        draft.replace(path)
    return path


def _recipe_digest() -> str:
    code = "".join(inspect.getsource(part) for part in (train, augmented, parts, normalized, ResNet, Block))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def train(network: nn.Module, *, epochs: int, rate: float = 0.02, seed: int = 0) -> nn.Module:
    """Train in place on the train pictures: SGD, momentum, a cosine from ``rate`` to 0, flips and shifted crops."""
    torch.manual_seed(seed)
    chosen, _ = parts()
    images = torch.as_tensor(normalized(pictures()["train"][chosen]))
    labels = torch.as_tensor(pictures()["train_labels"][chosen])
    network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // 128 * 128].split(128):
            with torch.autocast("cpu", torch.bfloat16):  # 1.5 to 2 times as fast where the CPU has the units
                scores = network(augmented(images[batch]))
            loss = nn.functional.cross_entropy(scores.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().to(memory_format=torch.contiguous_format)


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Shift every picture by up to four pixels and mirror half of them."""
    count = len(images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, count))
    rows = down[:, None] + torch.arange(32)
    columns = right[:, None] + torch.arange(32)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    shifted = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def accuracy(network: nn.Module, judged: Split) -> float:
    """Return top-1 of a float network in percent."""
    images = torch.as_tensor(judged.inputs[INPUT])
    with torch.no_grad():
        found = torch.cat([network(batch).argmax(1) for batch in images.split(250)]).numpy()
    return 100 * float((found == judged.labels).mean())


def main(names: list[str]) -> None:
    """Adapt the named networks and tell how good they are on the held-out pictures."""
    for name in names or BUILDERS:
        began = time.perf_counter()
        before = accuracy(published(name), split("train", parts()[1]))
        path = adapted_path(name)
        after = accuracy(adapted(name), split("train", parts()[1]))
        print(f"{name}: {before:.2f} -> {after:.2f} % validation, {time.perf_counter() - began:.0f} s, {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
