"""The walk through a network computes what the planned network computes, node by node, in PyTorch and ONNX."""

import numpy as np
import pytest

from edgekit import workload
from edgekit.compress.layer import Change
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.compress.walking import walk
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
OPTIONS = {
    "static": {},
    "dynamic": {"activations": "dynamic"},
    "weights": {"activations": "none", "bits": 4, "granularity": "group", "group": 32},
    "w4a8": {"bits": 4, "weights": "mse"},
}


class Branches(torch.nn.Module):
    """A residual sum, a concatenation, a fused clamp, and a last layer that gives the output."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(2, 6, 3, padding=1)
        self.left = torch.nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.right = torch.nn.Conv2d(6, 4, 1)
        self.head = torch.nn.Linear(10, 5)

    def forward(self, image):
        x = torch.relu(self.stem(image))
        x = x + torch.nn.functional.relu6(self.left(x))
        x = torch.cat([x, self.right(x)], dim=1)
        return self.head(x.mean((2, 3)))


def build():
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(24, 2, 6, 6)).astype(np.float32)
    return workload.from_module("branches", Branches().eval(), Data(Split({"image": images})))


def exported(model, path):
    names = {"input_names": ["image"], "output_names": ["scores"]}
    torch.onnx.export(workload.trace(model), f=path, dynamo=True, external_data=False, verbose=False, **names)
    return workload.load(str(path), None, model.data)


def last_values(model):
    """Return what the last layer gives in both worlds, from its inputs as the walk shows them."""
    found = {}

    def keep(layer, floats, planned):
        own = model.plan.weights[layer.weight]
        assert own.bits
        found[layer.weight] = (layer, floats, planned)

    walk(model, model.data.calibration, keep, silent)
    return found


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("plan", OPTIONS)
def test_the_last_layer_gets_what_the_planned_network_gives_it(kind, plan, tmp_path):
    from edgekit.compress.rounding import planned_weight

    model = build()
    if kind == "onnx":
        model = exported(model, tmp_path / "m.onnx")
    model = Quantize(**OPTIONS[plan]).apply(model, silent)
    visited = last_values(model)
    assert len(visited) == 4, "every layer is shown"
    layer, floats, planned = list(visited.values())[-1]
    bias = torch.as_tensor(layer.offsets)
    got = layer.compute(torch.cat(planned), torch.as_tensor(planned_weight(layer, model.plan)), bias).numpy()
    (want,) = planned_network(model).run(model.data.calibration.inputs).values()
    step = 0.0 if model.plan.scheme != "static" else (want.max() - want.min()) / 255
    if plan == "dynamic":  # ranges of a batch are those of the batch: the walk cuts 24 samples into 16 and 8
        step = np.abs(want).max() / 40
    assert np.abs(got - want).max() <= 0.75 * step + 1e-5
    (true,) = model.network.run(model.data.calibration.inputs).values()
    exact = layer.compute(torch.cat(floats), torch.as_tensor(layer.values), bias).numpy()
    np.testing.assert_allclose(exact, true, atol=1e-4)
    assert np.abs(want - true).max() > 1e-4, "the plan rounds"


def test_a_change_reaches_the_layers_behind_it_and_only_their_planned_inputs():
    model = Quantize().apply(build(), silent)
    plain = last_values(model)

    seen = {}

    def blank(layer, floats, planned):
        seen[layer.weight] = (floats, planned)
        return Change(values=0 * layer.values) if layer.weight == "left.weight" else None

    changes = walk(model, model.data.calibration, blank, silent)
    assert set(changes) == {"left.weight"}
    for name in ("stem.weight", "left.weight"):
        assert torch.equal(torch.cat(seen[name][1]), torch.cat(plain[name][2]))
    for name in ("right.weight", "head.weight"):
        assert torch.equal(torch.cat(seen[name][0]), torch.cat(plain[name][1]))
        assert not torch.allclose(torch.cat(seen[name][1]), torch.cat(plain[name][2]), atol=1e-2)


class Writing(torch.nn.Module):
    """A network that shifts its input and sums in place, or in new tensors."""

    def __init__(self, is_writing):
        super().__init__()
        self.is_writing = is_writing
        self.first, self.second, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        if not self.is_writing:
            x = x - 0.5
            x = x + torch.relu(self.first(x))
            return self.head(x + self.second(x))
        x -= 0.5
        x += torch.relu_(self.first(x))
        x += self.second(x)
        return self.head(x)


@pytest.mark.parametrize("plan", [{}, {"activations": "dynamic"}, {"activations": "none", "bits": 4}])
def test_a_network_that_writes_in_place_is_walked_as_its_twin_that_does_not(plan):
    data = Data(Split({"x": np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)}))
    before, seen = data.calibration.inputs["x"].copy(), []
    for is_writing in (False, True):
        torch.manual_seed(0)
        model = Quantize(**plan).apply(workload.from_module("twin", Writing(is_writing).eval(), data), silent)
        found = {}

        def keep(layer, floats, planned, found=found):
            found[layer.weight] = torch.stack([torch.cat(floats), torch.cat(planned)])

        walk(model, data.calibration, keep, silent)
        seen.append(found)
        assert np.array_equal(data.calibration.inputs["x"], before)
    plain, writing = seen
    assert list(plain) == list(writing)
    for name, values in plain.items():
        torch.testing.assert_close(writing[name], values)
