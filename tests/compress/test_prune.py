"""Pruning: fewer channels, the same doors, nearly the same accuracy."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import compress, evaluate
from edgekit.compress.passes.prune import Prune
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.recipe import Recipe
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(scope="module")
def pruned():
    recipe = Recipe((("prune", Prune(ratio=0.5, epochs=8, lr=3e-3)), ("quantize", Quantize())))
    return compress(digits.model(), recipe)


def test_a_quarter_of_the_weights_keeps_97_percent_even_in_int8(pruned):
    test = digits.model().data.test
    assert evaluate.parameters(pruned) < 0.3 * evaluate.parameters(digits.model())
    assert evaluate.score(pruned, digits.model(), test)[1] > 0.97


def test_the_lineage_tells_what_was_cut(pruned):
    load, prune, quantize = pruned.lineage
    assert (load.name, prune.name, quantize.name) == ("load", "prune", "quantize")
    assert prune.measured["macs"] < 0.3 * prune.measured["macs_before"]
    assert prune.measured["parameters"] < 0.3 * prune.measured["parameters_before"]
    assert prune.measured["validation_top1"] > 0.95
    assert prune.options["ratio"] == 0.5


def test_channels_are_multiples_of_round_to(pruned):
    widths = {m.out_channels for m in pruned.network.module.modules() if isinstance(m, nn.Conv2d)}
    assert widths == {12, 24}


def test_doors_keep_their_sizes_and_the_original_its_weights(pruned):
    assert (pruned.inputs, pruned.outputs) == (digits.model().inputs, digits.model().outputs)
    assert pruned.network.run({"image": np.zeros((3, 1, 8, 8), np.float32)})["scores"].shape == (3, 10)
    assert digits.model().network.module.classifier.in_features == 48


def test_a_pruned_model_comes_back_from_disk_and_computes_the_same(pruned, tmp_path):
    workload.save(pruned, tmp_path / "out")
    again = workload.load(str(tmp_path / "out"))
    images = digits.model().data.test.inputs
    np.testing.assert_allclose(pruned.network.run(images)["scores"], again.network.run(images)["scores"], atol=1e-5)
    assert (again.plan, again.lineage) == (pruned.plan, pruned.lineage)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others():
    def weights(seed):
        options = Prune(ratio=0.5, epochs=1, seed=seed)
        return torch.cat([p.flatten() for p in options.apply(small(), silent).network.module.parameters()])

    one, same, other = weights(1), weights(1), weights(2)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_training_leaves_the_callers_random_numbers_alone():
    model = small()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Prune(ratio=0.5, epochs=1).apply(model, silent)
    assert torch.equal(torch.rand(3), expected)


def small(labels=True):
    """Digits, but little: the network untrained, 100 pictures."""
    data = digits.model().data
    split = data.train.head(100)
    split = split if labels else Split(split.inputs)
    return workload.from_module("student", digits.example().build_student(), Data(data.calibration, train=split))


def test_without_labels_it_learns_the_scores_it_had():
    rate = Prune(ratio=0.5, epochs=1).apply(small(labels=False), silent)
    assert rate.lineage[-1].measured["train_loss"] > 0
    more = Prune(ratio=0.5, epochs=12).apply(small(labels=False), silent)
    assert more.lineage[-1].measured["train_loss"] < rate.lineage[-1].measured["train_loss"]


def test_progress_tells_loss_and_steps():
    said = []
    Prune(ratio=0.5, epochs=2, batch=50).apply(small(), lambda *told: said.append(told))
    steps = [(done, total) for what, done, total in said if what.startswith("train: loss ")]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_epochs_zero_only_cuts_and_needs_no_train_split():
    model = replace(digits.model(), data=Data(digits.model().data.calibration))
    cut = Prune(ratio=0.3, epochs=0).apply(model, silent)
    assert "train_loss" not in cut.lineage[-1].measured
    with pytest.raises(CompressionError, match="no train split") as caught:
        Prune(ratio=0.3).apply(model, silent)
    assert "epochs = 0" in caught.value.hint


class TwoHeads(nn.Module):
    """Outputs that come through an addition and a convolution: none of their channels may go."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.mask = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.relu(self.left(x)) + self.right(x), self.mask(x)


def test_channels_that_reach_an_output_stay():
    images = np.zeros((2, 3, 8, 8), np.float32)
    model = workload.from_module("heads", TwoHeads(), Data(Split({"x": images})))
    cut = Prune(ratio=0.5, epochs=0).apply(model, silent)
    assert cut.network.module.stem.out_channels == 8
    assert [o.shape for o in cut.network.run({"x": images}).values()] == [(2, 8, 8, 8)] * 2


def test_nothing_to_remove_is_an_error():
    with pytest.raises(CompressionError, match="removes no channel"):
        Prune(ratio=0.1, round_to=64, epochs=0).apply(small(), silent)


def test_what_cannot_be_trained_is_refused_with_the_way_out(tmp_path):
    data = digits.model().data
    workload.save(digits.model(), tmp_path / "saved")
    for source in (str(digits.onnx_file()), str(tmp_path / "saved")):
        with pytest.raises(CompressionError, match="needs PyTorch modules") as caught:
            Prune().apply(workload.load(source, None, data), silent)
        assert "file.py:build" in caught.value.hint
    with pytest.raises(CompressionError, match="before quantize"):
        Prune().apply(digits.quantized(), silent)


def test_a_diverging_training_is_noticed():
    with pytest.raises(CompressionError, match="diverged") as caught:
        Prune(ratio=0.5, epochs=3, lr=1e30).apply(small(), silent)
    assert "lr" in caught.value.hint


def test_one_picture_is_not_enough_to_learn_from():
    data = digits.model().data
    model = replace(small(), data=Data(data.calibration, train=data.train.head(1)))
    with pytest.raises(CompressionError, match="1 sample"):
        Prune(ratio=0.5, epochs=1).apply(model, silent)


def test_a_network_without_channels_to_cut_says_so():
    images = np.zeros((2, 4), np.float32)
    model = workload.from_module("plain", nn.Sequential(nn.Linear(4, 3)), Data(Split({"x": images})))
    with pytest.raises(CompressionError, match="removes no channel"):
        Prune(ratio=0.5, round_to=1, epochs=0).apply(model, silent)
