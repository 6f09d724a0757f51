"""Pruning: fewer channels, the same doors, nearly the same accuracy."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import compress, evaluate
from edgekit.compress.dependencies import Family, channel_padding, choose, cut, families, size
from edgekit.compress.latency import Compared
from edgekit.compress.passes.prune import Prune, _feel, _timed
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


class Shortcut(nn.Module):
    """A residual block of kind A: the way around takes every second pixel, new channels are zero."""

    def __init__(self, narrow, wide):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide)
        self.second, self.second_norm = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.added = (wide - narrow) // 2

    def forward(self, x):
        inner = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return torch.relu(inner + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added)))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), Shortcut(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.stem(x))).mean((2, 3)))


class Joined(nn.Module):
    """Concatenation, depthwise and grouped convolutions, and a residual way."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.norm = nn.BatchNorm2d(24)
        self.pointwise = nn.Conv2d(24, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.cat((torch.relu(self.left(x)), torch.relu(self.right(x))), 1)
        x = self.pointwise(torch.relu(self.norm(self.depthwise(x))))
        return self.head((x + torch.relu(self.grouped(x))).mean((2, 3)))


class Gated(nn.Module):
    """A decoder of Llama's kind: shared key heads, rotary positions, a gated FFN; or BERT."""

    def __init__(self, kind):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        small = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        if kind == "llama":
            config = transformers.LlamaConfig(**small, num_attention_heads=8, num_key_value_heads=4, use_cache=False)
            self.inner = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.BertConfig(**small, num_attention_heads=4, max_position_embeddings=16)
            self.inner = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits


def with_dead_odd_channels(module, whole_rows, whole_columns):
    """Silence every second channel: what it gives is zero, and so is what reads it. Cutting those changes nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.weight.uniform_(0.5, 1)
                part.weight[1::2] = part.bias[1::2] = 0
            elif isinstance(part, nn.Conv2d | nn.Linear):
                if not name.endswith(whole_rows):
                    part.weight[1::2] = 0
                    if part.bias is not None:
                        part.bias[1::2] = 0
                if not name.endswith(whole_columns) and part.weight.shape[1] > 1:
                    part.weight[:, 1::2] = 0
    return module.eval()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("build", "whole_rows", "whole_columns", "widths"),
    [
        (
            Padded,
            ("head", "stem", "second"),
            ("stem", "head", "block.first"),
            {"block.first": 8, "block.second": 16, "stem": 8},
        ),
        (Joined, ("head",), ("left", "right"), {"left": 4, "right": 8, "depthwise": 12, "pointwise": 8, "grouped": 8}),
    ],
    ids=["zero-padded shortcut", "concat, depthwise, groups, residual"],
)
def test_cutting_dead_channels_changes_nothing(build, whole_rows, whole_columns, widths, scope):
    images = np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype(np.float32)
    model = workload.from_module(
        "net", with_dead_odd_channels(build(), whole_rows, whole_columns), Data(Split({"x": images}))
    )
    cut_model = Prune(ratio=0.5, epochs=0, round_to=1, scope=scope).apply(model, silent)
    found = {name: cut_model.network.module.get_submodule(name).out_channels for name in widths}
    assert found == widths
    np.testing.assert_allclose(
        *(next(iter(one.network.run({"x": images}).values())) for one in (model, cut_model)),
        atol=1e-5,
    )
    assert cut_model.lineage[-1].measured["layers_held_by_padding"] == (build is Padded)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_heads_and_gated_layers_leave_whole_and_dead_ones_change_nothing(kind):
    tokens = np.random.default_rng(0).integers(0, 32, (2, 7))
    torch.manual_seed(0)
    module = Gated(kind).eval()
    ffn = ("gate_proj", "up_proj") if kind == "llama" else ("intermediate.dense",)
    values = ("v_proj", "q_proj", "k_proj") if kind == "llama" else ("self.query", "self.key", "self.value")
    with torch.no_grad():
        for name, part in module.named_modules():
            if name.endswith(ffn):
                part.weight[1::2] = 0
                if part.bias is not None:
                    part.bias[1::2] = 0
            if name.endswith(("down_proj", "output.dense")) and part.weight.shape[1] == 48:
                part.weight[:, 1::2] = 0
            if name.endswith(values):  # the second half of the heads is silent
                part.weight[part.weight.shape[0] // 2 :] = 0
                if part.bias is not None:
                    part.bias[part.weight.shape[0] // 2 :] = 0
            if name.endswith(("o_proj", "attention.output.dense")):
                part.weight[:, part.weight.shape[1] // 2 :] = 0
    model = workload.from_module(kind, module, Data(Split({"input_ids": tokens})))
    keep = () if kind == "llama" else ("inner.bert.pooler",)
    smaller = Prune(ratio=0.5, epochs=0, round_to=1, keep_modules=keep).apply(model, silent)
    one, two = (next(iter(net.network.run({"input_ids": tokens}).values())) for net in (model, smaller))
    np.testing.assert_allclose(one, two, atol=1e-5)
    inner = smaller.network.module.inner
    if kind == "llama":
        layer = inner.model.layers[0]
        sizes = [layer.mlp.gate_proj.out_features, layer.mlp.down_proj.in_features]
        assert sizes == [24, 24]
        assert [layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features] == [16, 8]
        assert layer.self_attn.o_proj.in_features == 16
    else:
        layer = inner.bert.encoder.layer[1]
        assert (layer.intermediate.dense.out_features, layer.attention.self.query.out_features) == (24, 16)
        assert (layer.attention.self.num_attention_heads, layer.attention.self.all_head_size) == (2, 16)


def test_a_transformer_of_pytorch_gets_narrower_heads():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(5, 16)
            self.inner = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.leave = nn.Linear(16, 3)

        def forward(self, x):
            return self.leave(self.inner(self.enter(x)).mean(1))

    sequences = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    model = workload.from_module("encoder", Encoder().eval(), Data(Split({"x": sequences})))
    smaller = Prune(ratio=0.5, epochs=0, round_to=1).apply(model, silent).network
    inner = smaller.module.inner
    assert (inner.linear1.out_features, inner.self_attn.embed_dim, inner.self_attn.head_dim) == (16, 8, 2)
    assert next(iter(smaller.run({"x": sequences}).values())).shape == (4, 3)


@pytest.mark.parametrize("importance", ["l1", "bn_scale", "taylor"])
def test_every_importance_keeps_what_the_network_needs(importance):
    """After a cut without recovery, choosing by importance must beat choosing the other half."""
    model = digits.model()
    module = copy.deepcopy(model.network.module)
    if importance == "taylor":
        _feel(model, module)
    found = families(model, module, importance)
    kept = choose(found, 0.3, "layer", 1)

    def accuracy(order):
        turned = [replace(one, scores=order * one.scores) for one in found]
        smaller = copy.deepcopy(model.network.module)
        cut(model, smaller, turned, kept)
        return evaluate.top1(replace(model.network, module=smaller), model.data.validation)

    assert accuracy(1) > accuracy(-1) + 0.1


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_of_macs_that_was_asked_for_is_met(scope):
    measured = Prune(macs=0.6, epochs=0, round_to=1, scope=scope).apply(digits.model(), silent).lineage[-1].measured
    assert measured["macs"] / measured["macs_before"] == pytest.approx(0.6, abs=0.03)


def test_a_share_that_cannot_be_reached_tells_the_smallest():
    with pytest.raises(CompressionError, match=r"0\.01 cannot be reached.* still has 0\.\d+"):
        Prune(macs=0.005, epochs=0, round_to=12).apply(digits.model(), silent)
    with pytest.raises(CompressionError, match="both asked for"):
        Prune(macs=0.5, latency=0.5).apply(digits.model(), silent)


def test_latency_is_measured_and_stands_beside_the_macs():
    cut_model = Prune(latency=0.8, epochs=0, round_to=1, timed="torch").apply(wide(), silent)
    measured = cut_model.lineage[-1].measured
    assert measured["macs"] < measured["macs_before"]
    assert 0 < measured["ms"] < measured["ms_before"]


def test_several_processes_cannot_measure_one_latency(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CompressionError, match="would measure another"):
        Prune(latency=0.5, epochs=0).apply(small(), silent)


def test_latency_through_onnx_runtime():
    measured = Prune(ratio=0.5, epochs=0, timed="onnx").apply(wide(), silent).lineage[-1].measured
    assert 0 < measured["ms"] < 0.8 * measured["ms_before"]
    assert "slower" not in measured


def wide():
    """A network whose time is its arithmetic."""
    images = np.zeros((2, 3, 24, 24), np.float32)
    layers = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    return workload.from_module("wide", nn.Sequential(layers, nn.Conv2d(64, 8, 1)), Data(Split({"x": images})))


def test_a_network_that_is_not_faster_is_warned_of():
    said = []
    assert _timed(Compared(1.0, 1.1), lambda *told: said.append(told[0])) == {
        "ms_before": 1.0,
        "ms": 1.1,
        "slower": 1.0,
    }
    assert "WARNING not faster" in said[0]
    assert "slower" not in _timed(Compared(1.0, 0.9), silent)


class Rigid(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], 2, 8, -1).mean(1)


class Stuck(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.rigid, self.head = nn.Conv2d(3, 16, 3), Rigid(), nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.rigid(torch.relu(self.stem(x))).flatten(1))


def test_an_unprunable_network_names_the_module_in_the_way_and_keeping_its_channels_helps():
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    module = Stuck()
    module(torch.zeros(2, 3, 8, 8))
    model = workload.from_module("stuck", module.eval(), Data(Split({"x": images})))
    with pytest.raises(CompressionError, match=r"the module 'stem' stands in the way") as caught:
        Prune(ratio=0.3, epochs=0, round_to=1).apply(model, silent)
    assert "keep_modules" in caught.value.hint
    with pytest.raises(CompressionError, match="removes no channel of stuck, which has 0 layers"):
        Prune(ratio=0.3, epochs=0, keep_modules=("stem",)).apply(model, silent)
    with pytest.raises(CompressionError, match="keep_modules names 'stemm'"):
        Prune(ratio=0.3, epochs=0, keep_modules=("stemm",)).apply(model, silent)


def test_steps_cut_and_recover_in_turns_and_end_at_the_ratio():
    said = []
    options = Prune(ratio=0.5, epochs=2, steps=2, round_to=1, batch=50)
    cut_model = options.apply(small(), lambda what, *_: said.append(what.split(":")[0]))
    assert cut_model.network.module.stem.out_channels == 3
    assert [one for one, before in zip(said, ["", *said], strict=False) if one != before][-4:] == ["prune", "train"] * 2


def test_padded_channels_are_seen_and_padded_pixels_are_not():
    images = np.zeros((2, 3, 8, 8), np.float32)

    class Bordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.only(nn.functional.pad(x, (1, 1, 1, 1)))

    assert len(channel_padding(workload.from_module("a", Padded().eval(), Data(Split({"x": images}))))) == 1
    assert not channel_padding(workload.from_module("b", Bordered().eval(), Data(Split({"x": images}))))


def test_on_the_way_to_a_goal_dear_channels_leave_before_cheap_ones():
    scores = np.linspace(0.5, 1.5, 10)
    dear, cheap = (Family(name, scores, cost=cost) for name, cost in (("dear", 400.0), ("cheap", 100.0)))
    assert choose([dear, cheap], 0.4, "global", 1) == {"dear": 6, "cheap": 6}
    kept = choose([dear, cheap], 0.4, "global", 1, by_cost=True)
    assert kept["dear"] < 5
    assert kept["cheap"] > 7


def test_the_cost_of_a_channel_is_what_leaving_it_saves():
    model = digits.model()
    whole = size(model, copy.deepcopy(model.network.module))[0]
    for one in families(model, copy.deepcopy(model.network.module), "l2"):
        module = copy.deepcopy(model.network.module)
        others = families(model, module, "l2")
        cut(model, module, others, {other.name: other.size - (other.name == one.name) for other in others})
        assert whole - size(model, module)[0] == pytest.approx(one.cost, rel=0.15)


def plain(*parts, shape=(4,), labels=None):
    """A network without anything special, and 64 random samples for it."""
    torch.manual_seed(0)
    samples = Split({"x": np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)}, labels)
    return workload.from_module("plain", nn.Sequential(*parts).eval(), Data(samples, train=samples))


@pytest.mark.parametrize("labels", [None, np.arange(64) % 2])
def test_taylor_of_a_single_output_goes_by_what_channels_do_to_it(labels):
    """The cross entropy of one class is 0 whatever the weights are; of two channels, the one that is read stays."""
    model = plain(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1), labels=labels)
    with torch.no_grad():
        model.network.module[2].weight[0, ::2] *= 1e-3
    wanted = model.network.module[0].weight[1::2].detach()
    cut = Prune(ratio=0.5, epochs=0, importance="taylor", round_to=1).apply(model, silent)
    assert torch.equal(cut.network.module[0].weight, wanted)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_channels_that_cannot_be_told_apart_are_not_cut_at_random(scope):
    model = plain(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model.network.module[2].bias.fill_(-100.0)  # every ReLU behind it is off: no gradient comes back
    asked = {"ratio": 0.5, "epochs": 0, "round_to": 1, "scope": scope}
    with pytest.raises(CompressionError, match=r"by taylor: the weights times gradients of '2' are all zero") as caught:
        Prune(importance="taylor", **asked).apply(model, silent)
    assert "keep_modules = ['2']" in caught.value.hint
    assert 'importance = "l2"' in caught.value.hint
    assert Prune(**asked).apply(model, silent).network.module[0].out_features < 16


def test_scales_of_batch_norm_are_asked_for_where_there_are_none():
    convolutions = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = plain(*convolutions, shape=(1, 8, 8))
    with pytest.raises(CompressionError, match="no batch normalization behind channels that can leave") as caught:
        Prune(ratio=0.5, epochs=0, importance="bn_scale").apply(model, silent)
    assert caught.value.hint == 'set importance = "l2"'
    assert Prune(ratio=0.5, epochs=0).apply(model, silent).network.module[0].out_channels == 4
