"""AWQ: factors that change nothing in float and much after rounding."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import digits, planted

from edgekit import grid, workload
from edgekit.compress.layers import layers
from edgekit.compress.passes.awq import Awq
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.rounding import canonical
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
nn = torch.nn


class Gated(nn.Module):
    """A block of a transformer, whose normalization has two takers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.gate, self.down = nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x):
        inner = self.norm(x)
        return x + self.down(torch.relu(self.up(inner)) * torch.sigmoid(self.gate(inner)))


def salient():
    """A block in which few channels carry large activations, as in language models."""
    torch.manual_seed(0)
    block = Gated().eval()
    with torch.no_grad():
        block.norm.weight.mul_(torch.where(torch.arange(64) % 16 == 3, 20.0, 1.0))
    inputs = np.random.default_rng(0).normal(size=(64, 8, 64)).astype(np.float32)
    split = Split({"x": inputs[:48]})
    return workload.from_module("gated", block, Data(split, test=Split({"x": inputs[48:]})))


def convolutions():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()]
    inputs = np.random.default_rng(0).normal(size=(32, 3, 10, 10)).astype(np.float32)
    network = nn.Sequential(*parts, nn.Conv2d(8, 4, 1)).eval()
    return workload.from_module("net", network, Data(Split({"x": inputs}), test=Split({"x": inputs})))


def planned(model, **options):
    return Quantize(**{"bits": 4, "activations": "none", **options}).apply(model, silent)


def only(outputs):
    (found,) = outputs.values()
    return found


def error(model, reference):
    inputs = reference.data.test.inputs
    return float(np.square(only(planned_network(model).run(inputs)) - only(reference.network.run(inputs))).mean())


@pytest.mark.parametrize(
    "model", [salient(), convolutions(), planted.with_a_wide_channel(16.0)], ids=["gated", "convolutions", "digits"]
)
def test_the_factors_leave_the_float_network_as_it_was(model):
    start = planned(model, bits=3)
    balanced, _, count = Awq().balanced(start, silent)
    assert count >= 1
    inputs = model.data.test.inputs
    before, after = only(model.network.run(inputs)), only(balanced.network.run(inputs))
    np.testing.assert_allclose(before, after, atol=1e-4 * np.abs(before).max())
    untouched = only(start.network.run(inputs))
    np.testing.assert_allclose(before, untouched, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize("options", [{}, {"granularity": "group", "group": 32}])
def test_salient_channels_lose_less_on_inputs_never_seen(options):
    model = salient()
    start = planned(model, **options)
    result = Awq().apply(start, silent)
    assert error(result, model) < 0.75 * error(start, model)
    assert result.plan.precision == start.plan.precision
    assert result.lineage[-1].measured["balanced"] == 1


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_clipping_helps_beyond_the_factors(granularity):
    model = salient()
    start = planned(model, bits=3, granularity=granularity)
    plain, clipped = (Awq(clip=clip).apply(start, silent) for clip in (False, True))
    assert error(clipped, model) < error(plain, model)
    assert clipped.lineage[-1].measured["clip_gain"] > 0
    assert plain.lineage[-1].measured["clip_gain"] == 0


def test_weights_lie_on_the_grid_and_the_same_seed_gives_the_same_bytes():
    start = planned(digits.model(), granularity="group", group=32)
    first, again = (Awq().apply(start, silent) for _ in range(2))
    assert first.plan == again.plan
    for layer, other in zip(layers(first), layers(again), strict=True):
        rule = canonical(first.plan.weights[layer.weight])
        np.testing.assert_array_equal(grid.rounded(layer.values, rule), layer.values)
        assert layer.values.tobytes() == other.values.tobytes()
    assert error(first, digits.model()) < error(start, digits.model())


def test_what_it_cannot_do_is_refused_with_the_way_out():
    with pytest.raises(CompressionError, match="no plan") as caught:
        Awq().apply(digits.model(), silent)
    assert "put quantize before it" in caught.value.hint
    with pytest.raises(CompressionError, match="fixed ranges") as caught:
        Awq().apply(planned(digits.model(), activations="static"), silent)
    assert "smooth before quantize" in caught.value.hint
    with pytest.raises(CompressionError, match="no calibration data"):
        Awq().apply(replace(planned(digits.model()), data=None), silent)
    file = workload.load(str(digits.onnx_file()), None, digits.example().data())
    with pytest.raises(CompressionError, match="no PyTorch network") as caught:
        Awq().apply(planned(file), silent)
    assert "Python workload" in caught.value.hint
