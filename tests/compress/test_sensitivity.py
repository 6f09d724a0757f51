"""The damage of a layer is what its rounding alone does to the outputs, whoever computes the network."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import evaluate
from edgekit.compress.layers import layers
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.sensitivity import FLOAT, How, candidate, divergence, noise, sensitivities
from edgekit.compress.simulation import planned_network
from edgekit.model import Data, Split, run_batched
from edgekit.progress import silent

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def planned():
    return Quantize(bits=4, activations="none", weights="mse").apply(digits.model(), silent)


@pytest.fixture(scope="module")
def table(planned):
    return sensitivities(planned, planned.data.calibration.head(24), (8, 4, 2))


def scores_with_only(model, name, bits, samples):
    """Round one weight by a plan of its own and compute the whole network."""
    layer = next(layer for layer in layers(model) if layer.weight == name)
    plan = msgspec.structs.replace(model.plan, weights={name: candidate(layer, model.plan, bits)})
    return run_batched(planned_network(replace(model, plan=plan)), samples)["scores"]


def divergence_of(wanted, found):
    wanted, found = (np.exp(s - s.max(1, keepdims=True)).astype(np.float64) for s in (wanted, found))
    wanted, found = (s / s.sum(1, keepdims=True) for s in (wanted, found))
    return float((wanted * np.log(wanted / found)).sum(1).mean())


@pytest.mark.parametrize(("name", "bits"), [("stem.weight", 2), ("near.0.second.weight", 4), ("classifier.weight", 2)])
def test_the_damage_is_the_divergence_of_a_network_with_that_weight_rounded(planned, table, name, bits):
    samples = planned.data.calibration.head(24)
    wanted = run_batched(planned.network, samples)["scores"]
    expected = divergence_of(wanted, scores_with_only(planned, name, bits, samples))
    found = next(entry for entry in table if (entry.name, entry.bits) == (name, bits))
    assert found.damage == pytest.approx(expected, rel=1e-3)


def test_the_table_has_every_weight_at_every_width_and_fewer_bits_do_more_damage(planned, table):
    assert [(e.name, e.bits) for e in table] == [(name, bits) for name in planned.plan.weights for bits in (8, 4, 2)]
    for start in range(0, len(table), 3):
        eight, four, two = table[start : start + 3]
        assert eight.damage < four.damage < two.damage
        assert eight.bytes > four.bytes > two.bytes


def test_multiplications_and_bytes_add_up_to_those_of_the_network(planned, table):
    fours = [entry for entry in table if entry.bits == 4]
    assert sum(entry.macs for entry in fours) == evaluate.macs(planned)
    biases = sum(4 * layer.offsets.size for layer in layers(planned))
    assert sum(entry.bytes for entry in fours) + biases == evaluate.stored_bytes(planned)


def test_an_onnx_file_is_as_sensitive_as_its_pytorch_twin(planned, table):
    file = workload.load(str(digits.onnx_file()), None, planned.data)
    found = sensitivities(file, planned.data.calibration.head(24), (4, FLOAT))
    for entry in found[::2]:
        twin = next(one for one in table if (one.name, one.bits) == (entry.name, 4))
        assert (entry.macs, entry.bytes) == (twin.macs, twin.bytes)
        assert entry.damage == pytest.approx(twin.damage, rel=0.02)
    assert {entry.damage for entry in found[1::2]} == {0.0}


def test_the_planted_weak_layer_is_found():
    """One scale a tensor: the layer whose channels differ by 200 times loses most."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    )
    with torch.no_grad():
        module[2].weight[0] *= 200
        module[4].weight[:, 0] /= 200
    samples = Split({"x": np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)})
    model = workload.from_module("weak", module.eval(), Data(samples))
    model = Quantize(granularity="tensor", activations="none").apply(model, silent)
    found = {entry.name: entry.damage for entry in sensitivities(model, samples, (6,))}
    assert max(found, key=found.get) == "2.weight"


def test_an_own_measure_judges_instead(planned):
    def judge(wanted, found):
        return float((wanted[0].argmax(1) != found[0].argmax(1)).float().mean())

    samples = planned.data.calibration.head(24)
    found = sensitivities(planned, samples, (2,), how=How(judge))
    assert {round(24 * entry.damage, 3) % 1 for entry in found} == {0.0}
    assert max(entry.damage for entry in found) > 0


def test_the_two_measures_are_zero_for_equal_outputs_and_what_they_are_defined_to_be():
    one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.0]])
    assert divergence(one, one) == noise(one, one) == 0.0
    assert noise(one, other) == pytest.approx(1 / 14)
    assert divergence(one, other) == pytest.approx(divergence_of(one.numpy(), other.numpy()), rel=1e-6)


class Trunk(torch.nn.Module):
    """Blocks that write their sums into what came in, a half of it through a view; or the same in new tensors."""

    def __init__(self, is_writing):
        super().__init__()
        self.is_writing = is_writing
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        if not self.is_writing:
            x = x - 0.5
            for block in self.blocks:
                x = x + torch.relu(block(x))
            y = self.head(x)
            return y + torch.cat([2 * x[:, :4], x[:, 4:]], 1)[:, 2:5]
        x -= 0.5
        for block in self.blocks:
            x += torch.relu_(block(x))
        left = x[:, :4]
        y = self.head(x)
        left *= 2
        return y + x[:, 2:5]


def test_a_network_that_writes_in_place_is_as_sensitive_as_its_twin_that_does_not():
    """Each try starts from the float values, not from what the tries before it have left."""
    samples = Split({"x": np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)})
    before, tables = samples.inputs["x"].copy(), []
    for is_writing in (False, True):
        torch.manual_seed(0)
        model = workload.from_module("trunk", Trunk(is_writing).eval(), Data(samples))
        tables.append(sensitivities(model, samples, (8, 4, 2)))
        assert np.array_equal(samples.inputs["x"], before)
    plain, writing = tables
    assert [(e.name, e.bits, e.macs) for e in plain] == [(e.name, e.bits, e.macs) for e in writing]
    assert [e.damage for e in writing] == pytest.approx([e.damage for e in plain], rel=1e-6)
