"""Cross-layer equalization: the network computes the same, its channels use their ranges alike, clamps are minded."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import evaluate
from edgekit.compress.layers import layers
from edgekit.compress.neighbours import pairs
from edgekit.compress.passes.equalize import Equalize
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402  # after the skip


def equalized(model, **options):
    return Equalize(**({"scales": "tensor"} | options)).apply(model, silent)


def model_of(module, shape=(3, 8, 8), count=48):
    samples = np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)
    return workload.from_module("net", module.eval(), Data(Split({"x": samples})))


def separable(clamp):
    """Make a pointwise, a depthwise and a pointwise convolution whose channels differ by up to 10,000 times."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), clamp(), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, groups=8), clamp(),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(24, 5),
    )  # fmt: skip
    with torch.no_grad():
        for place, power in ((0, 1), (3, -2)):
            module[place].weight.mul_(torch.logspace(-power, power, 8).reshape(8, 1, 1, 1))
            module[place].bias.mul_(torch.logspace(-power, power, 8))
    return module


def span_of(model, weight, axis):
    """Return by how much the largest weights of the channels along an axis differ."""
    values = next(layer.values for layer in layers(model) if layer.weight == weight)
    largest = np.abs(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)).max(1)
    return largest.max() / largest.min()


def outputs(model):
    return next(iter(model.network.run(model.data.calibration.inputs).values()))


def test_a_separable_block_computes_the_same_with_channels_of_one_range():
    model = model_of(separable(nn.ReLU))
    result = equalized(model)
    np.testing.assert_allclose(outputs(result), outputs(model), rtol=1e-3, atol=1e-5)
    assert span_of(model, "3.weight", 0) > 1000
    assert span_of(result, "0.weight", 0) == pytest.approx(span_of(result, "3.weight", 0), rel=0.02)
    assert result.lineage[-1].measured["pairs"] == 3
    assert result.lineage[-1].measured["rounds"] > 2, "the middle layer stands in two pairs"


def test_at_the_end_both_weights_of_a_channel_are_equally_large():
    result = equalized(model_of(separable(nn.ReLU)))
    found = {layer.weight: layer.values for layer in layers(result)}
    first, middle, last = (np.abs(found[f"{n}.weight"]) for n in (0, 3, 5))
    np.testing.assert_allclose(first.max((1, 2, 3)), middle.max((1, 2, 3)), rtol=5e-3)
    np.testing.assert_allclose(middle.max((1, 2, 3)), last.max((0, 2, 3)), rtol=5e-3)


def test_one_scale_a_tensor_becomes_worth_its_bits():
    """The planted weakness: one layer with a huge range among its channels."""
    model = model_of(separable(nn.ReLU))
    errors = []
    for one in (model, equalized(model)):
        rough = Quantize(granularity="tensor", activations="none").apply(one, silent)
        made = next(iter(planned_network(rough).run(model.data.calibration.inputs).values()))
        errors.append(np.abs(made - outputs(model)).mean())
    assert errors[1] < 0.2 * errors[0]


def test_with_one_scale_a_channel_the_inputs_of_the_last_become_alike_and_the_depthwise_one_stays():
    model = model_of(separable(nn.ReLU))
    result = equalized(model, scales="channel")
    np.testing.assert_allclose(outputs(result), outputs(model), rtol=1e-3, atol=1e-5)
    assert span_of(model, "5.weight", 1) > 1.3
    assert span_of(result, "5.weight", 1) == pytest.approx(1, rel=1e-3)
    before, after = ({one.weight: one.values for one in layers(m)}["0.weight"] for m in (model, result))
    np.testing.assert_array_equal(before, after)


def test_four_bits_a_channel_lose_less_of_a_network_whose_inputs_differ():
    """The planted weakness: one layer whose input channels differ by 1,000 times."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    with torch.no_grad():
        factors = torch.logspace(-1.5, 1.5, 16)
        module[0].weight.mul_(1 / factors.reshape(16, 1, 1, 1))
        module[0].bias.mul_(1 / factors)
        module[2].weight.mul_(factors.reshape(1, 16, 1, 1))
    model = model_of(module)
    errors = {}
    for name, one in {"plain": model, "channel": equalized(model, scales="channel")}.items():
        rough = Quantize(bits=4, activations="none").apply(one, silent)
        made = next(iter(planned_network(rough).run(model.data.calibration.inputs).values()))
        errors[name] = np.abs(made - outputs(model)).mean()
    assert errors["channel"] < 0.3 * errors["plain"]


def test_relu6_is_minded_channels_that_reach_it_stay_and_the_others_move():
    model = model_of(separable(nn.ReLU6))
    free, stiff = equalized(model, clamps="unreached", margin=1.0), equalized(model)
    np.testing.assert_allclose(outputs(free), outputs(model), rtol=1e-3, atol=1e-5)
    measured = free.lineage[-1].measured
    assert (measured["pairs"], measured["skipped_pairs"]) == (3, 0)
    assert 0 < measured["moved_channels"] < measured["channels"]
    assert (stiff.lineage[-1].measured["pairs"], stiff.lineage[-1].measured["skipped_pairs"]) == (1, 2)


def test_a_channel_is_never_pushed_into_its_clamp():
    """The first layer's outputs are tiny beside the second's weights, so plain equalization enlarges them a lot."""
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    torch.manual_seed(1)
    with torch.no_grad():
        module[2].weight.mul_(1e4)
    model = model_of(module)
    result = equalized(model, clamps="unreached", margin=2.0)
    with torch.no_grad():
        highest = result.network.module[0](torch.as_tensor(model.data.calibration.inputs["x"])).amax((0, 2, 3))
    assert float(highest.max()) == pytest.approx(3.0, rel=1e-3)
    np.testing.assert_allclose(outputs(result), outputs(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "between",
    [nn.Sigmoid(), nn.Hardtanh(), nn.Sequential(nn.ReLU(), nn.ConstantPad2d(1, 0.5)), nn.GELU()],
    ids=["sigmoid", "hardtanh", "pad with another number", "gelu"],
)
def test_where_factors_do_not_pass_nothing_moves(between):
    model = model_of(nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 4, 1)))
    assert pairs(model) == ()
    with pytest.raises(CompressionError, match="no two layers between which a scale can move"):
        equalized(model)


class Twice(nn.Module):
    """Gives a value to two layers, and uses one layer twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        inner = torch.relu(self.first(x))
        return self.second(torch.relu(self.second(inner))) + inner


def test_values_and_weights_with_two_users_are_left_alone():
    assert pairs(model_of(Twice(), shape=(4,))) == ()


def test_digits_and_its_onnx_twin_are_equalized_alike():
    data = digits.example().data()
    file = workload.load(str(digits.onnx_file()), None, data)
    mine, theirs = equalized(file), equalized(digits.model())
    for one in (mine, theirs):
        before, after = (model.network.run(data.validation.inputs)["scores"] for model in (digits.model(), one))
        np.testing.assert_allclose(after, before, atol=1e-4)
    for one, other in zip(layers(mine), layers(theirs), strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-4, atol=1e-5)


def test_an_onnx_file_with_pads_clips_and_pools_has_the_pairs_of_its_twin(tmp_path):
    pytest.importorskip("onnx")
    model = model_of(separable(nn.ReLU6))
    program, path = workload.trace(model), tmp_path / "m.onnx"
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False, input_names=["x"])
    file = workload.load(str(path), None, model.data)
    assert [(p.first.weight, p.second.weight, p.ceiling) for p in pairs(file)] == [
        (p.first.weight, p.second.weight, p.ceiling) for p in pairs(model)
    ]
    np.testing.assert_allclose(
        outputs(equalized(file, clamps="unreached", margin=1.0)), outputs(model), rtol=1e-3, atol=1e-5
    )


def test_a_saved_graph_is_equalized_too():
    model = digits.model()
    graph = workload.trace(model).module(check_guards=False)
    saved = replace(model, network=replace(model.network, module=graph))
    result = equalized(saved)
    before, after = (m.network.run(model.data.validation.inputs)["scores"] for m in (model, result))
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert evaluate.parameters(result) < evaluate.parameters(model), "batch normalization is folded"


def test_after_quantize_it_is_refused():
    with pytest.raises(CompressionError, match="must come before quantize"):
        equalized(digits.quantized())
