"""What a pruned network kept answers as before, from samples alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import evaluate
from edgekit.compress.passes import prune
from edgekit.compress.passes.prune import Prune
from edgekit.compress.reconstruction import largest_output, outputs_left, reconstruct
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
nn = torch.nn


def twins(*, bias=True):
    """A network whose hidden channels come in pairs of which the second is half of the first."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.Conv2d(8, 4, 3, padding=1)
    with torch.no_grad():
        first.weight[1::2] = first.weight[::2] / 2
        if bias:
            first.bias[1::2] = first.bias[::2] / 2
    return nn.Sequential(first, nn.ReLU(), second).eval()


def only(model, samples):
    (found,) = model.network.run({"x": samples}).values()
    return found


def pruned(module, samples, **options):
    data = Data(Split({"x": samples}))
    model = workload.from_module("twins", module, data)
    asked = {"ratio": 0.5, "epochs": 0, "round_to": 1} | options
    return only(model, samples), Prune(**asked).apply(model, silent)


@pytest.mark.parametrize("bias", [True, False])
def test_what_can_be_said_by_the_channels_that_stay_is_said(bias):
    samples = np.random.default_rng(0).normal(size=(32, 3, 6, 6)).astype(np.float32)
    for solves, most in (("auto", 0.02), ("off", np.inf)):
        wanted, made = pruned(twins(bias=bias), samples, reconstruct=solves)
        assert made.network.module[0].out_channels == 4
        apart = np.abs(only(made, samples) - wanted).max()
        assert apart < most
    assert apart > 0.2, "without, the answer is another"


def test_a_network_cut_to_half_of_its_channels_still_reads_digits_without_an_epoch():
    model = digits.model()
    found = [
        evaluate.top1(Prune(ratio=0.5, epochs=0, reconstruct=solves).apply(model, silent).network, model.data.test)
        for solves in ("off", "on")
    ]
    assert found[0] < 0.7
    assert found[1] > 0.85


def test_what_trains_keeps_the_weights_it_had_unless_told_otherwise(monkeypatch):
    calls = []
    monkeypatch.setattr(prune, "reconstruct", lambda *given: calls.append(given) or 0)
    model = digits.model()
    for solves, epochs, times in (("auto", 1, 0), ("on", 1, 1), ("auto", 0, 1), ("off", 0, 0)):
        calls.clear()
        Prune(ratio=0.5, epochs=epochs, reconstruct=solves).apply(model, silent)
        assert len(calls) == times, (solves, epochs)


def test_calibration_is_enough_and_labels_are_not_needed():
    model = digits.model()
    bare = replace(model, data=Data(Split(model.data.calibration.inputs)))
    made = Prune(ratio=0.5, epochs=0).apply(bare, silent)
    assert evaluate.top1(made.network, model.data.test) > 0.8


class Odd(nn.Module):
    """One layer that runs twice, two that share a weight, one that pads with reflections, one depthwise, in groups."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.mirror = nn.Conv1d(6, 6, 3, padding=1, padding_mode="reflect")
        self.deep = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv1d(6, 4, 3, stride=2, dilation=2, groups=2)

    def forward(self, x):
        x = self.other(self.tied(self.twice(torch.relu(self.twice(x)))))
        return self.grouped(self.deep(self.mirror(x.transpose(1, 2))))


def test_only_plain_layers_are_solved_and_those_come_near():
    torch.manual_seed(0)
    before = Odd().eval()
    after = copy.deepcopy(before)
    inputs = (torch.randn(64, 9, 6),)
    with torch.no_grad():
        for name in ("twice", "tied", "mirror", "deep", "grouped"):
            after.get_submodule(name).weight += 0.1 * torch.randn_like(after.get_submodule(name).weight)
        rough = (after(*inputs) - before(*inputs)).square().mean()
    left = outputs_left(before, lambda module: None, copy.deepcopy(before))
    assert {name: list(kept) for name, kept in left.items()} == {
        name: list(range(4 if name == "grouped" else 6)) for name in left
    }
    held = {name: after.get_submodule(name).weight.clone() for name in ("twice", "tied", "mirror")}
    assert reconstruct(before, after, left, inputs) == 2
    for name, weight in held.items():
        assert torch.equal(after.get_submodule(name).weight, weight), name
    with torch.no_grad():
        assert (after(*inputs) - before(*inputs)).square().mean() < rough / 2


def test_a_layer_that_lost_nothing_keeps_its_weight_to_the_last_bit():
    before = twins()
    after = copy.deepcopy(before)
    left = outputs_left(before, lambda module: None, copy.deepcopy(before))
    assert reconstruct(before, after, left, (torch.randn(8, 3, 6, 6),)) == 0
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))


def test_a_head_that_makes_much_of_each_sample_is_what_counts():
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000))
    assert largest_output(network, (torch.zeros(1, 3, 4),)) == 3000


def test_what_overflows_is_left_alone():
    before = twins()
    after = copy.deepcopy(before)
    with torch.no_grad():
        before[0].weight.fill_(1e38)
        held = after[0].weight.clone()
    left = outputs_left(before, lambda module: None, copy.deepcopy(before))
    reconstruct(before, after, left, (torch.full((8, 3, 6, 6), 1e3),))
    assert torch.equal(after[0].weight, held)
