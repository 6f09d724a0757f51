"""The smallest workload that all passes take: 8 numbers in, 3 classes out, learned from 96 samples."""

import numpy as np
import torch

from edgekit.model import Data, Split


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
    )


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(160, 8)).astype(np.float32)
    y = (x @ random.normal(size=(8, 3))).argmax(1).astype(np.int64)
    parts = [Split({"x": x[a:b]}, y[a:b]) for a, b in ((0, 96), (96, 112), (112, 136), (136, 160))]
    return Data(parts[1], train=parts[0], validation=parts[2], test=parts[3], labels=("red", "green", "<blue>"))
