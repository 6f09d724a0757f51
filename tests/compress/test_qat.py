"""Quantization-aware training: what is rounded in training is what runs, and two bits learn what rounding forgot."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fakes import digits

from edgekit import grid, workload
from edgekit.compress import evaluate, recipe
from edgekit.compress.fake_quantization import FakeQuantized
from edgekit.compress.layers import layers, with_parameters
from edgekit.compress.passes.qat import Qat
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.rounding import canonical
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.plan import WeightRule
from edgekit.progress import silent

torch = pytest.importorskip("torch")


def planned(model=None, **options):
    return Quantize(**({"bits": 2, "weights": "mse"} | options)).apply(model or digits.model(), silent)


def trained(model, **options):
    return Qat(**({"epochs": 3, "lr": 2e-3} | options)).apply(model, silent)


def accuracy(model):
    return evaluate.top1(planned_network(model), model.data.validation)


@pytest.fixture(scope="module")
def rough():
    return planned()


@pytest.fixture(scope="module")
def learned(rough):
    return trained(rough, ranges="learned")


def test_two_bits_learn_what_rounding_forgot(rough, learned):
    assert accuracy(rough) < 0.4
    assert accuracy(learned) > 0.9


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_weight_only_and_dynamic_plans_learn_too(activations):
    model = planned(granularity="tensor", activations=activations)
    assert accuracy(trained(model, epochs=1)) > accuracy(model) + 0.3


def test_the_weights_lie_on_the_grid_of_the_plan(learned, rough):
    for layer in layers(learned):
        rule = canonical(learned.plan.weights[layer.weight])
        np.testing.assert_array_equal(grid.rounded(layer.values, rule), layer.values)
        assert len(np.unique(layer.values[0])) <= 4
        assert rule.scales != rough.plan.weights[layer.weight].scales


def test_ranges_are_learned_outputs_keep_both_names_and_nothing_else_changes(learned, rough):
    before, after = rough.plan.activations, learned.plan.activations
    assert before.keys() == after.keys()
    assert after["scores"] == after["linear"] != before["linear"]
    assert after["conv2d"] == before["conv2d"], "nobody makes a value that a clamp follows: it has no range to learn"
    fixed = msgspec.structs.replace(learned.plan, weights=rough.plan.weights, activations=before)
    assert fixed == rough.plan


def test_fixed_scales_and_ranges_stay(rough):
    result = trained(rough, epochs=1, scales="fixed")
    assert result.plan == rough.plan
    assert accuracy(result) > accuracy(rough) + 0.2


def test_the_same_seed_gives_the_same_network_and_the_one_that_came_in_is_untouched(rough):
    before = [layer.values.copy() for layer in layers(rough)]
    first, again, other = (trained(rough, epochs=1, seed=seed) for seed in (3, 3, 4))
    assert first.plan == again.plan != other.plan
    for one, two in zip(layers(first), layers(again), strict=True):
        np.testing.assert_array_equal(one.values, two.values)
    for layer, values in zip(layers(rough), before, strict=True):
        np.testing.assert_array_equal(layer.values, values)


def rules_of(model, granularity, *, zeros):
    """Give each weight scales of its own; with zero points also where they are not symmetric."""
    random, rules = np.random.default_rng(0), {}
    for layer in layers(model):
        own = WeightRule(bits=4, granularity=granularity, axis=layer.axis, group=32 if granularity == "group" else 0)
        scales = grid.scales_of(layer.values, canonical(own)) * random.uniform(0.5, 1, 1).astype(np.float32)
        rules[layer.weight] = grid.with_scales(own, scales, np.full(scales.shape, 7) if zeros else None)
    return rules


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight-only"])
@pytest.mark.parametrize(("granularity", "zeros"), [("channel", False), ("tensor", False), ("group", True)])
def test_what_trains_computes_what_the_plan_says_before_and_after(rough, granularity, zeros, scheme):
    plan = msgspec.structs.replace(rough.plan, scheme=scheme, weights=rules_of(rough, granularity, zeros=zeros))
    if scheme != "static":
        plan = msgspec.structs.replace(plan, activations={})
    model = replace(rough, plan=plan)
    student = FakeQuantized(model, plan, learns_scales=True, learns_ranges=True)
    images = model.data.validation.head(16).inputs

    def differences(one):
        with torch.no_grad():
            mine = student.module(torch.as_tensor(images["image"])).numpy()
        return np.abs(mine - planned_network(one).run(images)["scores"])

    assert differences(model).max() < 1e-4
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    found = student.learned()
    after = msgspec.structs.replace(plan, weights=found.rules, activations=found.activations)
    assert differences(model).max() > 1e-2
    left = differences(replace(with_parameters(model, found.changes), plan=after))
    if scheme == "static":
        # A value in the middle between two steps may be rounded up by one and down by the other: of every twelve seeds
        # one has such a value, and what comes out differs by a step at most, in a few places.
        assert np.quantile(left, 0.95) < 1e-4
        low, high = after.activations["scores"].low, after.activations["scores"].high
        assert left.max() < 1.01 * (high - low) / 255
    else:
        assert left.max() < 1e-2


def test_the_gradient_of_a_scale_is_that_of_learned_step_size_quantization():
    """Esser et al. 2020, equation 3, for a layer whose output is the sum of its weights."""
    values = np.array([[0.26, -0.9, 0.04, 0.55]], np.float32)
    module = torch.nn.Linear(4, 1, bias=False)
    module.weight.data = torch.from_numpy(values)
    model = workload.from_module("one", module, Data(Split({"x": np.ones((2, 4), np.float32)})))
    rule = grid.with_scales(WeightRule(bits=3), np.array([[0.2]], np.float32))
    plan = msgspec.structs.replace(planned(model, activations="none").plan, weights={"weight": rule})
    student = FakeQuantized(replace(model, plan=plan), plan, learns_scales=True, learns_ranges=False)
    student.module(torch.ones(1, 4)).sum().backward()
    gradients = {name: p.grad for name, p in student.module.named_parameters() if p.grad is not None}
    steps = values / 0.2  # of -4 to 3
    inside = [1.0 - steps[0, 0], -4.0, 0.0 - steps[0, 2], 3.0 - steps[0, 3]]
    wanted = 0.2 * sum(inside) / np.sqrt(4 * 3)  # the logarithm's chain rule, and the paper's factor
    assert float(gradients["weights.0.logarithms"]) == pytest.approx(wanted, rel=1e-4)
    assert gradients["weights.0.values"].flatten().tolist() == [1.0, 0.0, 1.0, 1.0]


def test_its_recipe_says_the_same_again():
    text = (digits.EXAMPLES / "recipes/qat-digits.toml").read_text()
    assert recipe.decode(recipe.encode(recipe.decode(text))) == recipe.decode(text)
    assert recipe.decode(text).passes[1][1] == Qat(epochs=15)


def test_a_saved_graph_learns_too(rough):
    graph = workload.trace(rough).module(check_guards=False)
    saved = replace(rough, network=replace(rough.network, module=graph))
    result = trained(saved, epochs=1)
    assert accuracy(result) > accuracy(rough) + 0.2, "and the network that the graph was made of is untouched"


def test_the_float_network_alone_teaches_where_there_are_no_labels(rough):
    data = replace(rough.data, train=Split(rough.data.train.inputs))
    with pytest.raises(CompressionError, match="needs labels") as caught:
        trained(replace(rough, data=data))
    assert caught.value.hint == "set alpha = 1"
    assert accuracy(trained(replace(rough, data=data), epochs=1, alpha=1.0)) > accuracy(rough) + 0.2


def test_where_nothing_can_be_learned_it_says_what_to_give(rough):
    with pytest.raises(CompressionError, match="no plan with integer weights") as caught:
        trained(digits.model())
    assert "put quantize before" in caught.value.hint
    file = workload.load(str(digits.onnx_file()), None, rough.data)
    with pytest.raises(CompressionError, match="is a OnnxNetwork") as caught:
        trained(planned(file))
    assert "build" in caught.value.hint
    with pytest.raises(CompressionError, match="no train split"):
        trained(replace(rough, data=replace(rough.data, train=None)))


def test_an_encoder_learns_its_own_states_and_no_words():
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, 60, (64, 5))
    tokens[0, 0] = 59
    split = Split({"input_ids": tokens})
    module = torch.nn.Sequential(
        torch.nn.Embedding(60, 8), torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)
    )
    whole = workload.from_module("encoder", module.eval(), Data(split, split))
    rounded = planned(whole)
    with pytest.raises(CompressionError, match="needs labels") as caught:
        trained(rounded)
    assert caught.value.hint == "set alpha = 1"
    with pytest.raises(CompressionError, match="temperature 3 softens scores"):
        trained(rounded, alpha=1.0, temperature=3.0)
    result = trained(rounded, alpha=1.0, epochs=20, lr=1e-2)
    before, after = (evaluate.judge(one, whole, split, "mse").value for one in (rounded, result))
    assert after < 0.5 * before
    assert result.lineage[-1].measured["train_loss"] == pytest.approx(after, rel=0.5), "a squared error"
