"""Folding: the same function with fewer layers, found by data flow, and left alone where it would be wrong."""

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import compress
from edgekit.compress.passes.fold import fold
from edgekit.compress.recipe import decode
from edgekit.errors import CompressionError
from edgekit.model import Data, Split

torch = pytest.importorskip("torch")
nn = torch.nn
FOLD = decode('version = 1\n[[pass]]\nname = "fold"\n')


def settled(module, shape):
    """Give every normalization statistics that matter."""
    torch.manual_seed(0)
    module.train()
    for _ in range(3):
        module(torch.randn(16, *shape) * 2 + 1)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.normal_(part.bias)
    return module.eval()


def folded(module, shape):
    images = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    model = workload.from_module("net", settled(module, shape), Data(Split({"x": images})))
    result, count = fold(model)
    for before, after in zip(
        model.network.run({"x": images}).values(), result.network.run({"x": images}).values(), strict=True
    ):
        np.testing.assert_allclose(before, after, atol=1e-4, rtol=1e-4)
    return count


class Flow(nn.Module):
    """A normalization named far from its convolution, defined before it."""

    def __init__(self, twice=False):
        super().__init__()
        self.a_norm = nn.BatchNorm2d(4)
        self.z_conv = nn.Conv2d(2, 4, 3)
        self.twice = twice

    def forward(self, x):
        inner = self.z_conv(x)
        outer = self.a_norm(inner)
        return outer + inner if self.twice else outer


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


@pytest.mark.parametrize(
    ("module", "shape", "count"),
    [
        (nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), (2, 8, 8), 1),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4, affine=False)), (4, 8, 8), 1),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (2, 9), 1),
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)), (5,), 1),
        (nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7)), (5,), 1),
        (Flow(), (2, 6, 6), 1),
        (Flow(twice=True), (2, 6, 6), 0),
        (Shared(), (2, 6, 6), 0),
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(3)), (3, 5), 0),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (2, 6, 6), 0),
        (nn.Sequential(nn.Conv2d(2, 4, 3), Activated(4)), (2, 6, 6), 0),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (2, 6, 6), 0),
    ],
)
def test_a_fold_computes_the_same_and_happens_only_where_it_may(module, shape, count):
    assert folded(module, shape) == count


def test_a_saved_graph_folds_like_the_modules_it_came_from(tmp_path):
    model = digits.model()
    workload.save(model, tmp_path / "m")
    saved = workload.load(str(tmp_path / "m"), None, model.data)
    direct, again = compress(model, FOLD), compress(saved, FOLD)
    assert direct.lineage[-1].measured["folded"] == again.lineage[-1].measured["folded"] == 6
    assert direct.lineage[-1].measured["parameters"] == again.lineage[-1].measured["parameters"]
    images = model.data.test.inputs
    np.testing.assert_allclose(direct.network.run(images)["scores"], again.network.run(images)["scores"], atol=1e-4)
    workload.save(again, tmp_path / "f")
    assert not [n for n in workload.trace(workload.load(str(tmp_path / "f"))).graph.nodes if "norm" in n.name]


def test_an_onnx_file_is_refused():
    with pytest.raises(CompressionError, match="no PyTorch network"):
        compress(workload.load(str(digits.onnx_file()), None, digits.example().data()), FOLD)
