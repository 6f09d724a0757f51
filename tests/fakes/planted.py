"""Trained networks with a weakness planted into them that changes nothing in float."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import numpy as np
from fakes import digits

from edgekit import workload
from edgekit.model import Data, Split

CHANNEL = 3
"""The channel between ``near.0.first`` and ``near.0.second`` that is made wide."""


@functools.cache
def sound():
    """Return the folded digits network with fewer samples to calibrate and to choose by."""
    from edgekit.compress.passes.fold import fold

    folded, _ = fold(digits.model())
    data = folded.data
    return replace(
        folded, data=replace(data, calibration=data.calibration.head(48), validation=data.validation.head(160))
    )


def with_a_wide_channel(factor=300.0):
    """Make one channel much wider, and what follows it so much narrower."""
    import torch

    model = sound()
    module = copy.deepcopy(model.network.module)
    block = module.near[0]
    with torch.no_grad():
        block.first.weight[CHANNEL] *= factor
        block.first.bias[CHANNEL] *= factor
        block.second.weight[:, CHANNEL] /= factor
    return replace(model, network=replace(model.network, module=module))


def with_an_outlier(value=150.0):
    """Let one pixel of one calibration picture be far too bright."""
    model = sound()
    images = np.array(model.data.calibration.inputs["image"])
    images[5, 0, 0, 0] = value
    return replace(model, data=replace(model.data, calibration=Split({"image": images})))


def with_a_saturating_layer():
    """Show the picture to the first layer twice, with half the weights each: neighbours that are large together."""
    import torch
    from torch import nn

    model = sound()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model.network.module)
            old, self.inner.stem = self.inner.stem, nn.Conv2d(2, 24, 3, padding=1)
            self.eye = nn.Conv2d(1, 2, 1, bias=False)
            with torch.no_grad():
                self.eye.weight.fill_(1.0)
                self.inner.stem.weight.copy_(old.weight.repeat(1, 2, 1, 1) / 2)
                self.inner.stem.bias.copy_(old.bias)

        def forward(self, image):
            return self.inner(self.eye(image))

    return replace(model, network=replace(model.network, module=Twice().eval()))


def bright_inputs(*, strong):
    """Return two convolutions with bright inputs; ``strong`` weights are all of one sign, so that pairs add up."""
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        for part, is_strong in ((net[0], strong), (net[2], False)):
            part.weight.copy_(torch.rand_like(part.weight) * 0.2 + 0.9 if is_strong else torch.randn_like(part.weight))
            if not is_strong:  # one large weight a channel: the others are small integers
                part.weight.mul_(0.001)
                part.weight[:, 0, 0, 0] = 1.0
    images = np.random.default_rng(0).uniform(0.8, 1.0, (16, 4, 6, 6)).astype(np.float32)
    return workload.from_module("planted", net.eval(), Data(Split({"image": images})))
