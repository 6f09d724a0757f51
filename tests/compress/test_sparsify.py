"""Sparsity: the pattern holds after training and after quantization, the rest of the weights make up for it."""

import numpy as np
import pytest
from fakes import digits

from edgekit import grid, workload
from edgekit.compress import compress, evaluate
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.passes.sparsify import Sparsify
from edgekit.compress.recipe import Recipe
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(scope="module")
def sparse():
    return Sparsify(epochs=2, lr=2e-3).apply(digits.model(), silent)


def zeros(model, name):
    return (model.network.module.get_submodule(name).weight == 0).numpy()


def test_of_every_four_neighbours_along_the_inputs_two_are_zero_after_training(sparse):
    for name in ("near.0.first", "down", "far.0.second", "classifier"):
        gone = np.moveaxis(zeros(sparse, name), 1, -1)
        assert (gone.reshape(*gone.shape[:-1], -1, 4).sum(-1) == 2).all()
    assert not zeros(sparse, "stem").any()  # one input channel: no four to choose of


def test_accuracy_survives_and_the_original_is_untouched(sparse):
    assert evaluate.top1(sparse.network, digits.model().data.test) > 0.96
    assert not zeros(digits.model(), "down").any()


def test_the_smallest_of_each_four_leave():
    cut = Sparsify(epochs=0).apply(digits.model(), silent)
    before = digits.model().network.module.classifier.weight.detach().abs().numpy().reshape(10, -1, 4)
    kept = ~zeros(cut, "classifier").reshape(10, -1, 4)
    assert (np.where(kept, before, np.inf).min(-1) >= np.where(kept, -np.inf, before).max(-1)).all()


def test_zeros_stay_zeros_in_the_integers():
    model = compress(digits.model(), Recipe((("sparsify", Sparsify(epochs=1)), ("quantize", Quantize()))))
    state = model.network.module.state_dict()
    for name, rule in model.plan.weights.items():
        if "stem" in name:
            continue
        integers = grid.quantized(state[name].numpy(), rule)
        share = (integers.reshape(state[name].shape) == 0).mean()
        assert share >= 0.5
        assert (state[name].numpy() == 0).mean() == pytest.approx(0.5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_unstructured_zeros_take_the_share_that_was_asked_for(scope):
    cut = Sparsify(pattern="unstructured", sparsity=0.8, scope=scope, epochs=1).apply(digits.model(), silent)
    measured = cut.lineage[-1].measured
    assert measured["sparsity"] == pytest.approx(0.8, abs=0.01)
    shares = [value for name, value in measured.items() if name.startswith("sparsity:")]
    assert (max(shares) - min(shares) < 0.02) == (scope == "layer")
    assert measured["sparsity:down.weight"] == pytest.approx(zeros(cut, "down").mean())
    assert measured["packed_bytes"] < 0.4 * measured["packed_bytes_before"]


def test_a_network_without_fours_is_refused():
    images = np.zeros((2, 3), np.float32)
    model = workload.from_module("plain", nn.Linear(3, 2), Data(Split({"x": images})))
    with pytest.raises(CompressionError, match="no layer that 2:4 fits") as caught:
        Sparsify(epochs=0).apply(model, silent)
    assert "unstructured" in caught.value.hint
    with pytest.raises(CompressionError, match="no train split"):
        Sparsify().apply(model, silent)


def test_transposed_convolutions_stay_dense_for_their_second_axis_counts_outputs():
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    model = workload.from_module("up", net.eval(), Data(Split({"x": np.zeros((2, 4, 4, 4), np.float32)})))
    cut = Sparsify(epochs=0).apply(model, silent)
    assert zeros(cut, "0").mean() == 0.5
    assert not zeros(cut, "2").any()
    anywhere = Sparsify(pattern="unstructured", epochs=0).apply(model, silent)
    assert zeros(anywhere, "2").mean() == 0.5
    up = workload.from_module("up", net[2:].eval(), Data(Split({"x": np.zeros((2, 8, 4, 4), np.float32)})))
    with pytest.raises(CompressionError, match="no layer that 2:4 fits"):
        Sparsify(epochs=0).apply(up, silent)
