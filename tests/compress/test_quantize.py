"""Int8 plans: complete, true to the data, worth their accuracy, and refused where they would be wrong."""

import copy
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fakes import digits

from edgekit import grid, workload
from edgekit.compress import compress, evaluate
from edgekit.compress.passes.gptq import Gptq
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.recipe import Recipe, default
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError, InputError, UsageError
from edgekit.manifest import Step
from edgekit.model import Data, LlamaFolder, Model, Split
from edgekit.plan import Range, WeightRule
from edgekit.progress import silent

torch = pytest.importorskip("torch")


def quantize(model, **options):
    return Quantize(**options).apply(model, silent)


def with_calibration(images):
    return replace(digits.model(), data=Data(Split({"image": images})))


def test_the_plan_has_every_weight_by_parameter_name_and_every_activation_by_node_name():
    model = digits.quantized()
    matrices = {name for name, p in model.network.module.named_parameters() if p.dim() > 1}
    assert set(model.plan.weights) == matrices
    for name, rule in model.plan.weights.items():
        assert msgspec.structs.replace(rule, scales=b"") == WeightRule(bits=8, granularity="channel", axis=0)
        weight = model.network.module.get_parameter(name).detach().numpy()
        largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)))
        np.testing.assert_allclose(np.frombuffer(rule.scales, "<f4"), largest / 127, rtol=1e-6)
    nodes = {node.name for node in workload.trace(model).graph.nodes if node.op == "call_function"}
    assert set(model.plan.activations) == nodes | {"image", "scores"}
    assert model.precision == "int8"


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_zero_points_serve_channels_that_lie_to_one_side(observer):
    samples = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    module = torch.nn.Linear(8, 4)
    with torch.no_grad():
        module.weight.copy_(torch.rand(4, 8) + 0.1)
    model = workload.from_module("aside", module, Data(Split({"x": samples})))
    apart = {}
    for symmetric in (True, False):
        options = {"bits": 4, "activations": "none", "weights": observer, "symmetric": symmetric}
        made = quantize(model, **options)
        (rule,) = made.plan.weights.values()
        assert bool(rule.zeros) is not symmetric
        weight = module.weight.detach().numpy()
        apart[symmetric] = float(np.square(grid.rounded(weight, rule) - weight).sum())
    assert apart[False] < 0.5 * apart[True]
    again = Gptq(scales="fit", sweeps=2, rows=64).apply(made, silent)
    (solved,) = again.plan.weights.values()
    assert solved.zeros == rule.zeros, "fitted scales keep the zero points"
    values = again.network.module.weight.detach().numpy()
    np.testing.assert_allclose(grid.rounded(values, solved), values, atol=1e-6)
    with pytest.raises(CompressionError, match="zero points and activations 'static'"):
        quantize(model, symmetric=False)


class Normed(torch.nn.Module):
    """What a transformer does to 8 bits: one channel of a sum is far beyond the others before the norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), torch.nn.Linear(16, 4)
        self.norm = torch.nn.LayerNorm(16)
        with torch.no_grad():
            self.down.bias[3] = 1000.0
            self.norm.weight.fill_(200.0)
            self.norm.weight[3] = 0.2

    def forward(self, x):
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def test_a_plan_may_cover_only_what_meets_a_weight():
    samples = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    model = workload.from_module("normed", Normed().eval(), Data(Split({"x": samples})))
    wanted = next(iter(model.network.run({"x": samples}).values()))
    apart = {}
    for cover in ("all", "inputs"):
        made = quantize(model, cover=cover)
        found = next(iter(planned_network(made).run({"x": samples}).values()))
        apart[cover] = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    assert set(made.plan.activations) == {"x", "relu", "layer_norm"}
    assert apart["inputs"] < 0.2 * apart["all"]
    assert set(quantize(model, cover="inputs", keep=("head.weight",)).plan.activations) == {"x", "relu"}
    with pytest.raises(CompressionError, match='cover "inputs" with activations'):
        quantize(model, cover="inputs", activations="dynamic")


def span(tensor):
    return float(tensor.min()), float(tensor.max())


def test_ranges_are_the_extremes_that_hooks_see():
    torch = pytest.importorskip("torch")
    model = digits.quantized()
    seen, hooks = {}, []
    for name, part in model.network.module.named_modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            hooks.append(part.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: span(out)})))
    model.network.run(model.data.calibration.inputs)
    for hook in hooks:
        hook.remove()
    ranges = model.plan.activations
    for node, name in {"conv2d": "stem", "conv2d_3": "down", "linear": "classifier"}.items():
        assert (ranges[node].low, ranges[node].high) == pytest.approx(seen[name], abs=1e-4)
    assert ranges["scores"] == ranges["linear"]
    assert ranges["image"] == Range(0.0, 1.0)


def test_int8_keeps_the_accuracy_of_digits():
    model = digits.quantized()
    test = model.data.test
    before = evaluate.top1(digits.model().network, test)
    assert before > 0.95
    assert evaluate.top1(planned_network(model), test) > before - 0.01


def test_the_float_network_inside_computes_the_same_after_folding():
    images = digits.model().data.test.inputs
    before, after = (m.network.run(images)["scores"] for m in (digits.model(), digits.quantized()))
    np.testing.assert_allclose(before, after, atol=1e-4)


def test_the_model_that_came_in_is_untouched():
    torch = pytest.importorskip("torch")
    model = digits.model()
    before = {name: tensor.clone() for name, tensor in model.network.module.state_dict().items()}
    compress(model, default())
    after = model.network.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.plan is None


def test_measuring_an_int8_model_does_not_change_its_weights():
    model = digits.quantized()
    before = model.network.run(model.data.test.inputs)["scores"]
    rounded = planned_network(model).run(model.data.test.inputs)["scores"]
    assert np.abs(before - rounded).max() > 1e-3, "the simulation rounds"
    np.testing.assert_array_equal(before, model.network.run(model.data.test.inputs)["scores"])


def test_an_outlier_stretches_min_max_and_not_the_percentile():
    images = np.tile(digits.model().data.calibration.inputs["image"], (4, 1, 1, 1))
    images[0, 0, 0, 0] = 1000.0
    model = with_calibration(images)
    assert quantize(model).plan.activations["image"] == Range(0.0, 1000.0)
    assert quantize(model, observer="percentile").plan.activations["image"].high < 2.0


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_robust_observers_stay_inside_the_extremes_and_keep_accuracy(observer):
    extremes, model = digits.quantized().plan.activations, digits.model()
    result = quantize(model, observer=observer)
    for name, limits in result.plan.activations.items():
        assert extremes[name].low - 1e-6 <= limits.low <= limits.high <= extremes[name].high + 1e-6
    before = evaluate.top1(model.network, model.data.test)
    assert evaluate.top1(planned_network(result), model.data.test) > before - 0.01


def test_a_constant_activation_has_a_range_of_one_point_and_still_computes():
    model = with_calibration(np.zeros((8, 1, 8, 8), np.float32))
    for observer in ("minmax", "percentile", "mse"):
        result = quantize(model, observer=observer)
        assert result.plan.activations["image"] == Range(0.0, 0.0)
        assert np.isfinite(planned_network(result).run(model.data.calibration.inputs)["scores"]).all()


def test_one_scale_a_tensor_is_coarser_than_one_a_channel():
    model = digits.model()
    whole = quantize(model, granularity="tensor")
    assert {rule.granularity for rule in whole.plan.weights.values()} == {"tensor"}
    images = model.data.test.inputs
    truth = model.network.run(images)["scores"]
    errors = [np.abs(planned_network(m).run(images)["scores"] - truth).mean() for m in (whole, digits.quantized())]
    assert errors[0] > errors[1]


def test_samples_limits_how_much_is_watched():
    few = quantize(digits.model(), samples=4)
    assert few.lineage[-1].measured["calibration_samples"] == 4
    wide, narrow = digits.quantized().plan.activations["linear"], few.plan.activations["linear"]
    assert narrow.high - narrow.low < wide.high - wide.low


def test_the_lineage_tells_options_and_figures():
    step = digits.quantized().lineage[-1]
    assert step.name == "quantize"
    assert msgspec.convert(step.options, Quantize) == Quantize()
    again = msgspec.json.decode(msgspec.json.encode(step), type=Step)
    assert msgspec.convert(again.options, Quantize) == Quantize()
    assert step.measured["validation_top1"] > 0.95
    before = evaluate.figures(digits.model(), digits.model())
    assert step.measured["bytes"] < 0.3 * before["bytes"]


def test_an_onnx_file_gets_the_ranges_that_its_pytorch_twin_gets():
    model = workload.load(str(digits.onnx_file()), None, digits.example().data())
    result = compress(model, default())
    twin = digits.quantized()
    assert result.plan.weights == twin.plan.weights
    shared = result.plan.activations.keys() & twin.plan.activations.keys()
    assert {"image", "conv2d", "relu_5", "mean", "scores"} <= shared
    for name in shared:
        mine, theirs = result.plan.activations[name], twin.plan.activations[name]
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-4)
    measured = result.lineage[-1].measured
    assert measured["validation_top1"] == pytest.approx(twin.lineage[-1].measured["validation_top1"], abs=0.01)
    assert measured["bytes"] == twin.lineage[-1].measured["bytes"]


def test_nan_in_a_weight_is_named():
    torch = pytest.importorskip("torch")
    module = copy.deepcopy(digits.model().network.module)
    with torch.no_grad():
        module.down.weight[3, 2] = float("nan")
    broken = replace(digits.model(), network=replace(digits.model().network, module=module))
    with pytest.raises(CompressionError, match=r"weight 'down\.weight' holds NaN"):
        quantize(broken)


def test_nan_or_infinity_in_the_data_is_named_by_where_it_shows_first():
    images = digits.model().data.calibration.inputs["image"].copy()
    images[5] = np.inf
    with pytest.raises(CompressionError, match="activation 'image' holds NaN or infinity"):
        quantize(with_calibration(images))


def test_numbers_that_overflow_are_named_by_where_they_show_first():
    images = digits.model().data.calibration.inputs["image"] * np.float32(1e37)
    with pytest.raises(CompressionError, match=r"activation 'image' reaches 1\.?\d*e\+3"):
        quantize(with_calibration(images))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_calibration_samples_are_refused(count):
    images = digits.model().data.calibration.inputs["image"][:count]
    with pytest.raises(CompressionError, match=rf"has {count} sample"):
        quantize(with_calibration(images))


def test_no_data_is_refused():
    with pytest.raises(CompressionError, match="no calibration data"):
        quantize(replace(digits.model(), data=None))


def test_quantizing_twice_is_refused():
    with pytest.raises(CompressionError, match=r"quantized already \(int8\)"):
        quantize(digits.quantized())
    twice = Recipe((("quantize", Quantize()), ("quantize", Quantize())))
    with pytest.raises(CompressionError, match="quantized already"):
        compress(digits.model(), twice)


def test_a_language_model_is_sent_to_the_gguf_export(tmp_path):
    model = Model(name="llama", task="text-generation", network=LlamaFolder(tmp_path))
    with pytest.raises(CompressionError, match="GGUF chooses its types") as caught:
        compress(model, default())
    assert "--precision" in caught.value.hint


def test_a_network_without_weights_is_refused():
    torch = pytest.importorskip("torch")
    images = np.ones((4, 3), np.float32)
    model = workload.from_module("empty", torch.nn.ReLU(), Data(Split({"x": images})))
    with pytest.raises(CompressionError, match="no weight that can be quantized"):
        quantize(model)


def test_a_head_that_no_output_reads_is_not_in_the_plan():
    torch = pytest.importorskip("torch")

    class Unread(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            states = self.body(x)
            torch.tanh(self.head(states))
            return states

    data = Data(Split({"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}))
    assert quantize(workload.from_module("unread", Unread(), data)).plan.weights.keys() == {"body.weight"}


def test_an_onnx_file_that_is_quantized_or_holds_nan_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    from edgekit.compress import onnx_graph

    proto = onnx_graph.rounded(onnx.load(digits.onnx_file()), digits.quantized().plan)
    onnx.save(proto, tmp_path / "int8.onnx")
    data = digits.example().data()
    with pytest.raises(CompressionError, match="is quantized already: it holds QuantizeLinear"):
        quantize(workload.load(str(tmp_path / "int8.onnx"), None, data))
    proto = onnx.load(digits.onnx_file())
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight.flat[0] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, proto.graph.initializer[0].name))
    onnx.save(proto, tmp_path / "nan.onnx")
    with pytest.raises(CompressionError, match=r"weight 'stem\.weight' holds NaN"):
        quantize(workload.load(str(tmp_path / "nan.onnx"), None, data))


def test_a_plan_survives_json():
    plan = digits.quantized().plan
    assert msgspec.json.decode(msgspec.json.encode(plan), type=type(plan)) == plan


def test_scores_without_classes_cannot_be_judged():
    torch = pytest.importorskip("torch")
    images = np.ones((4, 1, 3, 3), np.float32)
    split = Split({"x": images}, np.zeros(4, np.int64))
    model = workload.from_module("flat", torch.nn.Conv2d(1, 2, 3), Data(split, validation=split))
    with pytest.raises(CompressionError, match="cannot be judged"):
        compress(model, default())
    with pytest.raises(UsageError, match="needs labels"):
        evaluate.top1(model.network, Split({"x": images}))


def fixed_batch(path, size):
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(digits.onnx_file())
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(proto, path)
    return workload.load(str(path), None, digits.example().data())


@pytest.mark.parametrize("size", [1, 3])
def test_an_onnx_file_with_a_fixed_batch_is_fed_in_that_size(tmp_path, size):
    result = compress(fixed_batch(tmp_path / "m.onnx", size), default())
    assert result.lineage[-1].measured["validation_top1"] > 0.95
    near = digits.quantized().plan.activations["relu"].high
    assert result.plan.activations["relu"].high == pytest.approx(near, rel=0.05)


def test_a_split_smaller_than_the_fixed_batch_is_refused(tmp_path):
    with pytest.raises(UsageError, match="takes 200 samples at once, a split has 128"):
        quantize(fixed_batch(tmp_path / "m.onnx", 200))


def test_data_by_other_names_is_refused_where_no_loader_looked(tmp_path):
    model = workload.load(str(digits.onnx_file()))
    data = Data(Split({"picture": np.zeros((4, 1, 8, 8), np.float32)}))
    with pytest.raises(InputError, match=r"the data has the inputs \['picture'\], the network takes \['image'\]"):
        quantize(replace(model, data=data))
