"""Smoothing: the same function with smaller outliers, wherever a factor may go and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress.evaluate import top1
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.passes.smooth import Smooth
from edgekit.compress.producers import rescaled, seams
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
nn = torch.nn


class RootMean(nn.Module):
    """The normalization of Llama, spelled out: its weight is a product with a parameter."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Gated(nn.Module):
    """A block of a transformer before its residual sum: two layers take one normalization."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.up, self.gate, self.down = nn.Linear(12, 20), nn.Linear(12, 20, bias=False), nn.Linear(20, 12)

    def forward(self, x):
        inner = self.norm(x)
        return x + self.down(torch.relu(self.up(inner)) * torch.sigmoid(self.gate(inner)))


class TakenTwice(nn.Module):
    """The normalization's value is also added: no factor may enter it."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x):
        inner = self.norm(x)
        return inner + self.up(inner)


class Tied(nn.Module):
    """One weight used twice: a factor for one use would change the other."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x):
        return self.up(torch.sigmoid(self.up(self.norm(x))))


def convolutions(between):
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), between, nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()]
    return nn.Sequential(*parts, nn.Conv2d(8, 8, 3, groups=2), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))


def model_of(module, shape):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    inputs = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
    return workload.from_module("net", module.eval(), Data(Split({"x": inputs})))


CASES = [
    (Gated(nn.LayerNorm(12)), (5, 12), 1),
    (Gated(RootMean(12)), (5, 12), 1),
    (Gated(nn.RMSNorm(12)), (5, 12), 1),
    (Gated(nn.LayerNorm(12, elementwise_affine=False)), (5, 12), 0),
    (nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), (6,), 1),
    (nn.Sequential(nn.Linear(6, 12), nn.ReLU6(), nn.Linear(12, 3)), (6,), 0),
    (nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)), (6,), 0),
    (nn.Sequential(nn.Linear(6, 12), nn.MaxPool1d(2), nn.Linear(6, 3)), (4, 6), 0),
    (TakenTwice(), (5, 12), 0),
    (Tied(), (5, 12), 0),
    (convolutions(nn.ReLU()), (3, 12, 12), 3),
    (convolutions(nn.ReLU6()), (3, 12, 12), 2),
    (nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3)), (3, 12), 1),
    (nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 3)), (3, 6, 6), 0),
]


@pytest.mark.parametrize(("module", "shape", "count"), CASES)
def test_smoothing_computes_the_same_and_happens_only_where_it_may(module, shape, count):
    model = model_of(module, shape)
    result = Smooth(alpha=0.7).apply(model, silent)
    assert result.lineage[-1].measured["smoothed"] == count
    inputs = model.data.calibration.inputs
    before, after = (next(iter(m.network.run(inputs).values())) for m in (model, result))
    np.testing.assert_allclose(before, after, atol=1e-4 * np.abs(before).max())


def test_any_positive_factors_leave_the_function_and_the_model_that_came_in():
    model = model_of(Gated(nn.LayerNorm(12)), (5, 12))
    (seam,) = seams(model)
    assert [taker.weight for taker in seam.takers] == ["up.weight", "gate.weight"]
    assert [part.name for part in seam.parts] == ["norm.weight", "norm.bias"]
    inputs = model.data.calibration.inputs
    before = next(iter(model.network.run(inputs).values()))
    factors = np.exp(np.random.default_rng(1).normal(size=12)).astype(np.float32)
    result = rescaled(model, (seam,), {seam.source: factors})
    np.testing.assert_allclose(next(iter(result.network.run(inputs).values())), before, atol=1e-4)
    own, old = (dict(m.network.module.named_parameters()) for m in (result, model))
    np.testing.assert_allclose(own["norm.weight"].detach(), old["norm.weight"].detach() / factors, rtol=1e-6)
    np.testing.assert_array_equal(before, next(iter(model.network.run(inputs).values())))


def test_an_outlier_of_one_channel_is_shared_with_the_weights():
    model = model_of(Gated(nn.LayerNorm(12)), (5, 12))
    with torch.no_grad():
        model.network.module.norm.weight[3] = 200.0
    inputs = model.data.calibration.inputs
    truth = next(iter(model.network.run(inputs).values()))
    errors = {}
    for name, start in (("plain", model), ("smooth", Smooth().apply(model, silent))):
        found = planned_network(Quantize().apply(start, silent)).run(inputs)
        errors[name] = float(np.square(next(iter(found.values())) - truth).mean())
    assert errors["smooth"] < 0.5 * errors["plain"]


def test_digits_stay_right_after_smoothing_as_int8():
    model = digits.model()
    result = Quantize().apply(Smooth().apply(model, silent), silent)
    assert result.lineage[-2].measured["smoothed"] >= 2
    assert top1(planned_network(result), model.data.test) > top1(model.network, model.data.test) - 0.01


def test_it_is_refused_behind_quantize_without_data_and_for_onnx_files():
    with pytest.raises(CompressionError, match="quantized already") as caught:
        Smooth().apply(digits.quantized(), silent)
    assert "before" in caught.value.hint
    with pytest.raises(CompressionError, match="no calibration data"):
        Smooth().apply(replace(digits.model(), data=None), silent)
    file = workload.load(str(digits.onnx_file()), None, digits.example().data())
    with pytest.raises(CompressionError, match="no PyTorch network") as caught:
        Smooth().apply(file, silent)
    assert "Python workload" in caught.value.hint
