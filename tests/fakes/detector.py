"""A detector whose weights are written by hand: it finds bright and dark tiles of a grey picture, and nothing else."""

import io

import numpy as np
from PIL import Image

from edgekit.manifest import Detection, ImagePreprocess
from edgekit.model import Data, Split

SIDE, TILE = 32, 8
PICTURE = ImagePreprocess(
    input="image", resize=SIDE, crop=SIDE, fit="pad", fill=128, mode="L", mean=(128.0,), std=(128.0,)
)
HOW = Detection(boxes="boxes", scores="scores", box_format="cxcywh", activation="sigmoid", labels=("bright", "dark"),
                score_threshold=0.5)  # fmt: skip


def network():
    """Return a module of image [n, 1, 32, 32] to boxes [n, 49, 4] and scores [n, 49, 2]: a tile every four pixels."""
    import torch
    from torch import nn

    class Tiles(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Conv2d(1, 2, TILE, stride=TILE // 2)
            with torch.no_grad():
                self.mean.weight[0], self.mean.weight[1] = 16 / TILE**2, -16 / TILE**2
                self.mean.bias.fill_(-10.0)
            steps = torch.arange(0, SIDE - TILE + 1, TILE // 2) + TILE / 2
            rows, columns = torch.meshgrid(steps, steps, indexing="ij")
            sides = torch.full_like(rows, TILE)
            self.register_buffer("tiles", torch.stack([columns, rows, sides, sides], -1).reshape(1, -1, 4))

        def forward(self, image):
            scores = self.mean(image).flatten(2).transpose(1, 2)
            return self.tiles + 0 * scores[..., :1], scores

    return Tiles().eval()


def data(count=16):
    """Return calibration pictures with one bright and one dark tile each, somewhere."""
    chance = np.random.default_rng(0)
    images = np.zeros((count, 1, SIDE, SIDE), np.float32)
    for image in images:
        for value in (1.0, -1.0):
            x, y = chance.integers(0, SIDE - TILE, 2)
            image[0, y : y + TILE, x : x + TILE] = value
    return Data(Split({"image": images}), preprocess=PICTURE, detection=HOW, outputs=("boxes", "scores"))


def scene(width=128, height=64):
    """Return a picture of grey, PNG, with a bright tile at (16, 32, 48, 64) and a dark one at (80, 0, 112, 32)."""
    picture = Image.new("L", (width, height), 128)
    picture.paste(255, (16, 32, 48, 64))
    picture.paste(0, (80, 0, 112, 32))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


SEEN = [("bright", (16.0, 32.0, 48.0, 64.0)), ("dark", (80.0, 0.0, 112.0, 32.0))]
"""The objects of `scene`: four of its pixels are one of the network's, sixteen grey rows above and below."""
