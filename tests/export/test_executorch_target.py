"""ExecuTorch: the plan's own numbers in XNNPACK's kernels; what stays outside is told, what has none is refused."""

import dataclasses

import msgspec
import numpy as np
import pytest
from fakes import bundles
from fakes.exportable import tiny_model, with_plan

pytest.importorskip("executorch", reason="needs the executorch extra")

import torch
from torch import nn

from edgekit import device_profiles, plugins, runtime, workload
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.errors import ExportError, HealthError, UsageError
from edgekit.export import PACKAGE, export, xnnpack_forms, xnnpack_graph, xnnpack_values
from edgekit.export.pte_file import Lowered
from edgekit.export.targets import executorch
from edgekit.manifest import Port
from edgekit.model import Data, OnnxNetwork, Split
from edgekit.plan import QuantizationPlan, Range
from edgekit.progress import silent
from edgekit.runtime import Contract, open_variant
from edgekit.runtime.backends import EngineOptions
from edgekit.tensors import TensorSpec

EXPORTER = plugins.load(PACKAGE, "executorch", "format")
PROFILE = device_profiles.load("android-arm64")
IMAGES = np.random.default_rng(0).random((16, 3, 8, 8), np.float32)


def model_of(network, inputs=IMAGES):
    torch.manual_seed(0)
    return workload.from_module("net", network().eval(), Data(Split({"x": inputs})))


def write(model, folder):
    return EXPORTER.export(model, PROFILE, folder, silent)


def sqnr_beside_plan(model, folder):
    """Export, run and compare with the simulated plan, in dB."""
    (row,) = export(model, [PROFILE], folder / "b").rows
    assert row.error is None, row.error.message
    inputs = model.data.calibration.head(4).inputs
    with runtime.load(folder / "b") as session:
        (got,) = session.run(inputs).values()
    (want,) = planned_network(model).run(inputs).values()
    return 10 * np.log10(np.square(want).sum() / max(np.square(got - want).sum(), 1e-12)), row.variant


class Wide(nn.Module):
    """Two linear layers, wide enough for groups."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class Seams(nn.Module):
    """What XNNPACK fuses or wants in one scale: a padded convolution, a residual ReLU, a join, a pool, a clamp."""

    def __init__(self):
        super().__init__()
        self.pad, self.left, self.right = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 2)
        self.join, self.drop, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x):
        left, right = self.left(self.pad(x)), self.right(x)
        y = torch.cat([left, torch.relu(right)], 1)
        y = torch.relu(self.join(y) + y).clamp(0.1, 0.9)
        return self.head(self.drop(nn.functional.max_pool2d(y, 2).mean((-1, -2))))


@pytest.fixture(scope="module")
def seams():
    return model_of(Seams)


@pytest.fixture(scope="module")
def wide():
    return model_of(Wide, np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32))


PLANS = {
    "int8": ({}, 45, ()),
    "w4a8": ({"bits": 4}, 40, ("2 weights are stored in 4 bits",)),
    "int8-dynamic": ({"activations": "dynamic", "granularity": "tensor"}, 38, ()),
    "int4-dynamic": (
        {"activations": "dynamic", "bits": 4, "granularity": "group", "group": 32},
        38,
        (
            "2 weights are stored in 4 bits",
            "2 weights have their scales rounded to bfloat16, as XNNPACK keeps those of groups",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PLANS)
def test_the_file_computes_what_the_plan_says(wide, tmp_path, precision):
    options, floor, notes = PLANS[precision]
    near, variant = sqnr_beside_plan(Quantize(**options).apply(wide, silent), tmp_path)
    assert (variant.precision, variant.parity.status, variant.batch) == (precision, "checked", 1)
    assert near > floor
    assert set(notes) <= set(variant.notes)
    assert variant.notes[0] == "XNNPACK runs 3 of 3 operators"
    assert variant.operators["xnnpack.linear"] == 2


@pytest.mark.slow
def test_what_kernels_fuse_and_what_shares_a_scale_stays_in_integers(seams, tmp_path):
    near, variant = sqnr_beside_plan(Quantize().apply(seams, silent), tmp_path)
    assert near > 35
    assert variant.notes[0] == "XNNPACK runs 13 of 13 operators"
    # the input, the two sides of the join in its scale, and the output; nothing else is turned to floats and back
    rounding = {name: count for name, count in variant.operators.items() if "quantize" in name}
    assert rounding == {"xnnpack.quantize_per_tensor": 3, "xnnpack.dequantize_per_tensor": 3}


def test_convolutions_of_four_bits_are_stored_in_eight_and_the_file_says_so(tiny):
    _, written = executorch._program(Quantize(bits=4).apply(tiny, silent))
    assert (written.narrow, written.widened) == (1, 3)
    notes = executorch._notes(written)
    assert notes[:2] == (
        "4 of 4 convolutions and linear layers run as integer kernels",
        "1 weights are stored in 4 bits",
    )
    assert notes[2].startswith("3 weights of 4 bits are stored in 8: XNNPACK has 4-bit kernels for linear layers")


def test_writing_says_nothing(wide, tmp_path, capfd):
    write(Quantize().apply(wide, silent), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_operators_outside_of_xnnpack_are_counted(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    tokens = np.random.default_rng(0).integers(0, 20, (16, 5))
    (row,) = export(model_of(Words, tokens), [PROFILE], tmp_path / "b").rows
    assert row.error is None, row.error.message
    assert row.variant.inputs[0].dtype == "int64"
    assert row.variant.notes == ("XNNPACK runs 1 of 3 operators; ExecuTorch's own kernels run 1 embedding, 1 mean",)
    assert row.variant.operators == {"embedding": 1, "mean": 1, "xnnpack.linear": 1}


def test_the_bias_of_a_channel_without_weights_fits_into_32_bits():
    model = tiny_model()
    with torch.no_grad():
        model.network.module.down.weight[3] = 0
    program, _ = executorch._program(Quantize().apply(model, silent))
    scales = program.state_dict["conv2d_2_scales"].double()
    source = next(node.args[0] for node in program.graph.nodes if node.name == "conv2d_2")
    sums = program.state_dict["down.bias"].double() / (scales * source.args[1])
    assert sums.abs().max() < 2**31


def test_an_operator_without_a_form_is_named_with_its_module(tmp_path):
    class Zeta(nn.Module):
        def forward(self, x):
            return torch.special.zeta(x + 2, x + 1)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Zeta())

        def forward(self, x):
            return self.inner(x).mean((2, 3))

    with pytest.raises(ExportError, match=r"no ExecuTorch form for aten\.special_zeta at inner\.0 \(") as caught:
        write(model_of(Outer), tmp_path)
    assert caught.value.hint == "replace that operator, or use another target"


def test_a_planned_layer_that_would_run_in_float_is_refused(tmp_path):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)

        def forward(self, x):
            return self.up(x)

    images = np.random.default_rng(0).random((8, 4, 4, 4), np.float32)
    model = Quantize().apply(model_of(Grouped, images), silent)
    with pytest.raises(ExportError, match=r"no integer kernel for up \(convolution\)") as caught:
        write(model, tmp_path)
    assert "keep" in caught.value.hint


def test_a_convolution_over_volumes_is_refused_before_it_fails_on_a_device(tmp_path):
    volumes = np.random.default_rng(0).random((4, 1, 3, 3, 3), np.float32)
    with pytest.raises(ExportError, match="no kernel for 0, a 3-D convolution"):
        write(model_of(lambda: nn.Sequential(nn.Conv3d(1, 2, 3)), volumes), tmp_path)


def test_what_xnnpack_cannot_hold_is_refused_before_anything_is_lowered(tiny, wide, tmp_path):
    def refusal(model, match):
        with pytest.raises(ExportError, match=match) as caught:
            write(model, tmp_path)
        return caught.value.hint

    def changed(model, **fields):
        return dataclasses.replace(model, plan=msgspec.structs.replace(with_plan(model).plan, **fields))

    weights = Quantize(activations="none").apply(wide, silent)
    assert refusal(weights, "float activations, for which XNNPACK has no") == 'quantize with activations = "dynamic"'
    assert "fp32" in refusal(dataclasses.replace(tiny, plan=QuantizationPlan(16, "none", {}, {}, "float16")), "16-bit")
    assert "Python workload" in refusal(dataclasses.replace(tiny, network=OnnxNetwork(b"")), "no PyTorch network")
    depthwise = refusal(Quantize(activations="dynamic").apply(tiny, silent), r"depthwise \(conv2d\) has no dynamic")
    assert 'keep = ["depthwise.weight"]' in depthwise
    inputs = Quantize(cover="inputs").apply(wide, silent)
    assert 'cover = "all"' in refusal(inputs, r"two \(linear\) has no range for its output")
    groups = Quantize(granularity="group", group=32).apply(wide, silent)
    assert "channel" in refusal(groups, r"'one.weight' \(linear\) has a scale for each 32 inputs")
    zeros = {
        name: msgspec.structs.replace(rule, zeros=b"\0" * 4) for name, rule in with_plan(tiny).plan.weights.items()
    }
    assert "symmetric" in refusal(changed(tiny, weights=zeros), "'stem.weight' has zero points")
    lost = {"gone.weight": with_plan(tiny).plan.weights["stem.weight"]}
    assert "recipe" in refusal(changed(tiny, weights=lost), "quantizes 'gone.weight', which no operator uses")
    with pytest.raises(UsageError, match="no data"):
        write(dataclasses.replace(tiny, data=None), tmp_path)


def graph_of(network, inputs=IMAGES):
    module = workload.trace(model_of(network, inputs)).module(check_guards=False)
    return module, xnnpack_forms.rewrite(module.graph)


def kinds(module):
    return [kind for node in module.graph.nodes if (kind := xnnpack_forms.operator(node))]


def test_forms_change_and_results_do_not():
    class Forms(nn.Module):
        def forward(self, x):
            y = nn.functional.dropout(2 * x.clamp(-1, 0.5), 0.5, training=False).clamp(min=0)
            return y.mean((2, 3)), y.mean(1), y.clamp_min(0.2)

    module, gone = graph_of(Forms)
    module.recompile()
    assert kinds(module) == ["hardtanh", "mul", "relu", "mean", "flatten", "mean", "clamp_min"]
    assert set(gone) == {"clamp", "dropout", "clamp_1"}
    for got, want in zip(module(torch.as_tensor(IMAGES)), Forms()(torch.as_tensor(IMAGES)), strict=True):
        torch.testing.assert_close(got, want)


def test_integers_stand_where_kernels_meet_and_nowhere_else():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = torch.sigmoid(torch.exp(torch.relu(self.one(x)))) * 3
            return nn.functional.max_pool2d(self.two(y), 2)

    model = with_plan(model_of(Mixed))
    module, gone = graph_of(Mixed)
    found = xnnpack_values.ranges(module.graph, model.plan, gone)
    # conv2d is fused with its ReLU, exp and sigmoid lie between two that compute in float
    assert [node.name for node in found] == ["x", "relu", "mul", "conv2d_1", "max_pool2d"]
    ranges = {node.name: limits for node, limits in found.items()}
    assert ranges["max_pool2d"] == ranges["conv2d_1"] != model.plan.activations["max_pool2d"]


def test_the_grid_of_an_activation_is_the_plans_in_signed_bytes():
    own = xnnpack_graph._shifted(Range(-1.0, 4.1))
    assert (own.lowest, own.highest, own.zero) == (-128, 127, 50 - 128)
    assert own.scale == pytest.approx(5.1 / 255)


def test_the_note_counts_what_computes():
    from collections import Counter

    found = Counter({"xnnpack.linear": 2, "xnnpack.quantize_per_tensor": 5, "mean": 1})
    assert Lowered(b"", found).note() == "XNNPACK runs 2 of 3 operators; ExecuTorch's own kernels run 1 mean"


def test_inputs_that_no_program_has_are_a_health_error(wide, tmp_path):
    artifact = write(wide, tmp_path)
    variant = bundles.variant(
        "any",
        "executorch",
        artifact.main,
        inputs=(Port(name="x", key="args_0", dtype="float32"),),
        outputs=artifact.outputs,
    )
    contract = Contract(inputs=wide.inputs, outputs=wide.outputs)
    with pytest.raises(HealthError, match="no input 'args_0'"):
        open_variant(tmp_path, variant, contract)
    narrow = Contract(inputs=(TensorSpec("x", "float32", (-1, 32)),), outputs=wide.outputs)
    with pytest.raises(HealthError, match="ExecuTorch failed"):
        open_variant(tmp_path, msgspec.structs.replace(variant, inputs=artifact.inputs, batch=1), narrow)
    whole = (tmp_path / artifact.main).read_bytes()
    (tmp_path / artifact.main).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HealthError, match=r"refuses model\.pte"):
        open_variant(
            tmp_path, msgspec.structs.replace(variant, inputs=artifact.inputs), contract, EngineOptions(threads=2)
        )
