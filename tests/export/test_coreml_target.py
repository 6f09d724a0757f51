"""Core ML: the package computes the model and holds integer weights."""

import dataclasses

import msgspec
import numpy as np
import pytest
from fakes.exportable import tiny_model, with_plan

pytest.importorskip("coremltools", reason="needs the export extra")

from edgekit import device_profiles, grid, plugins
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.errors import ExportError, UsageError
from edgekit.export import PACKAGE, mil, mil_operators
from edgekit.model import OnnxNetwork
from edgekit.plan import QuantizationPlan
from edgekit.progress import silent

EXPORTER = plugins.load(PACKAGE, "coreml", "format")


def write(model, folder, **options):
    profile = device_profiles.load("iphone-15")
    profile = msgspec.structs.replace(profile, options={**profile.options, **options})
    folder.mkdir(exist_ok=True)
    return EXPORTER.export(model, profile, folder, silent)


def computed(model, folder, **options):
    artifact = write(model, folder, **options)
    inputs = model.data.calibration.head(4).inputs
    return EXPORTER.evaluate(folder / artifact.main, inputs)["scores"], model.network.run(inputs)["scores"]


def test_weights_are_bytes_and_the_package_lists_its_files(tiny, tiny_int8, tmp_path):
    weights = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    write(tiny, tmp_path / "half")
    artifact = write(tiny_int8, tmp_path / "int8")
    assert artifact.main == "model.mlpackage/Manifest.json"
    assert len(artifact.files) == 3
    program = mil._read(tmp_path / "int8" / "model.mlpackage")
    assert len(program.find_ops(op_type="constexpr_affine_dequantize")) == 4
    assert (tmp_path / "int8" / weights).stat().st_size < (tmp_path / "half" / weights).stat().st_size


def test_a_layer_the_plan_leaves_out_stays_float(tmp_path):
    write(with_plan(tiny_model(), weights=["down.weight"]), tmp_path)
    program = mil._read(tmp_path / "model.mlpackage")
    assert len(program.find_ops(op_type="constexpr_affine_dequantize")) == 1


def test_a_weight_only_plan_is_what_core_ml_holds(tiny_int8, tmp_path):
    plan = QuantizationPlan(8, "none", tiny_int8.plan.weights, {}, "weight-only")
    got, want = computed(dataclasses.replace(tiny_int8, plan=plan), tmp_path)
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize(
    "options", [{}, {"bits": 7}, {"bits": 4, "weights": "mse"}, {"bits": 4, "granularity": "tensor"}], ids=str
)
def test_the_integers_in_the_package_are_those_of_the_plan(tiny, tmp_path, options):
    model = Quantize(activations="none", **options).apply(tiny, silent)
    artifact = write(model, tmp_path)
    assert artifact.precision == model.precision
    assert artifact.requires == {"ios": ">=18" if options.get("bits") == 4 else ">=17"}
    found = integers(mil._read(tmp_path / "model.mlpackage"))
    for name, rule in model.plan.weights.items():
        weight = model.network.module.get_parameter(name).detach().numpy()
        want, scales = grid.quantized(weight, rule), grid.scales_of(weight, rule).reshape(-1)
        data, stored = found[name.replace(".", "_")]
        np.testing.assert_array_equal(data, want, err_msg=name)
        np.testing.assert_allclose(stored.reshape(-1), scales, rtol=1e-3)


def integers(program):
    """Return integers and scales by the name of the parameter."""
    found = {}
    for op in program.operations:
        if op.op_type in ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale"):
            data = op.quantized_data if op.op_type == "constexpr_affine_dequantize" else op.data
            name = op.name.removeprefix("p_").split("_weight")[0] + "_weight"
            found[name] = (data.val.astype(np.int32), op.scale.val)
    return found


def test_groups_of_a_linear_layer_are_blocks(tmp_path):
    import torch

    model = tiny_model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)))
    model = Quantize(activations="none", bits=4, granularity="group", group=32).apply(model, silent)
    got, _ = computed(model, tmp_path)
    program = mil._read(tmp_path / "model.mlpackage")
    (op,) = program.find_ops(op_type="constexpr_blockwise_shift_scale")
    assert op.scale.val.shape == (10, 6)
    want = next(iter(planned_network(model).run(model.data.calibration.head(4).inputs).values()))
    np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max())


def test_a_plan_of_halves_is_what_core_ml_writes_anyway(tiny, tmp_path):
    model = dataclasses.replace(tiny, plan=QuantizationPlan(16, "none", {}, {}, "float16"))
    assert write(model, tmp_path / "a", precision="fp32").precision == "fp16"
    assert mil._read(tmp_path / "a" / "model.mlpackage").find_ops(op_type="constexpr_affine_dequantize") == []


def test_fp32_compute_is_exact(tiny, tmp_path):
    assert write(tiny, tmp_path / "a", precision="fp32").precision == "fp32"
    got, want = computed(tiny, tmp_path / "b", precision="fp32")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_core_ml_cannot_hold_is_refused(tiny, tiny_int8, tmp_path):
    with pytest.raises(ExportError, match="no PyTorch network") as caught:
        write(dataclasses.replace(tiny, network=OnnxNetwork(tmp_path / "m.onnx")), tmp_path)
    assert "Python workload" in caught.value.hint
    with pytest.raises(ExportError, match="iOS 3"):
        write(tiny, tmp_path, ios=3)
    groups = Quantize(activations="none", bits=4, granularity="group", group=32).apply(tiny, silent)
    with pytest.raises(ExportError, match=r"'stem.weight' of shape \[8, 3, 3, 3\] has a scale for each 32") as caught:
        write(groups, tmp_path)
    assert "channel" in caught.value.hint
    ghost = msgspec.structs.replace(tiny_int8.plan, weights={"ghost.weight": tiny_int8.plan.weights["stem.weight"]})
    with pytest.raises(ExportError, match=r"'ghost.weight'"):
        write(dataclasses.replace(tiny_int8, plan=ghost), tmp_path)
    with pytest.raises(UsageError, match="no data"):
        write(dataclasses.replace(tiny, data=None), tmp_path)


def test_an_operator_without_a_core_ml_form_is_named(tmp_path):
    import torch

    class Zeta(torch.nn.Module):
        def forward(self, image):
            return torch.special.zeta(image + 2, image + 1).mean((2, 3))

    with pytest.raises(ExportError, match="zeta"):
        write(tiny_model(Zeta()), tmp_path)


def test_a_refused_network_leaves_no_trace_in_the_next_package(tiny, tmp_path):
    import torch

    class Round(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 8)

        def forward(self, image):
            padded = torch.nn.functional.pad(self.head(image), (1, 1, 1, 1), mode="circular")
            return padded.mean((2, 3))

    program = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    write(tiny, tmp_path / "before")
    with pytest.raises(ExportError, match="Pad mode"):  # after its linear layer got a name
        write(tiny_model(Round()), tmp_path / "refused")
    write(tiny, tmp_path / "after")
    assert (tmp_path / "after" / program).read_bytes() == (tmp_path / "before" / program).read_bytes()


def networks():
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.project = nn.Linear(8, 24)

        def forward(self, image):
            q, k, v = self.project(self.norm(image.flatten(1, 2))).split(8, dim=-1)
            return (torch.softmax(q @ k.transpose(1, 2) / 3, -1) @ v).mean(1)

    class Mixed(nn.Module):
        def forward(self, image):
            padded = nn.functional.pad(image, (1, 0, 2, 1))
            pooled = torch.cat(
                [nn.functional.max_pool2d(padded, 3, 2, 1), nn.functional.avg_pool2d(padded, 3, 2, 1)], 1
            )
            scores = [
                pooled.sigmoid().mean((2, 3)),
                torch.tanh(padded).sum((2, 3)),
                (image - 2 * image).mean((2, 3)) / 3,
            ]
            return torch.cat(scores, 1)

    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, image):
            looked = self.table((image[:, 0, ::2, 1:6] * 4).to(torch.int32)).mean((1, 2))
            stacked = torch.stack([image[:, 0], image[:, 2]], 1)[:, :, 1:3].sum((2, 3))
            chosen = torch.index_select(image, 2, torch.tensor([6, 0, 3])).amax((2, 3))
            tiled = image.mean((2, 3)).repeat(1, 2)
            return torch.cat([looked, stacked, chosen, tiled, image.argmax(3).float().mean(2)], 1)

    class Elementary(nn.Module):
        def forward(self, image):
            x = image + 0.1
            found = [x.abs().rsqrt(), x.exp() - x.log(), x.sqrt() ** 1.5, x.square(), torch.erf(x), x.sin() + x.cos()]
            found += [
                nn.functional.normalize(x, dim=1),
                1 / (x + 3),
                torch.floor(3 * x),
                nn.functional.elu(x - 0.5),
                nn.functional.softplus(x),
            ]
            found += [nn.functional.leaky_relu(x - 0.5, 0.1), torch.maximum(x, 1 - x), torch.minimum(x, 1 - x)]
            return torch.cat([one.mean((2, 3)) for one in found], 1)

    class Compared(nn.Module):
        def forward(self, image):
            x, y = image, 1 - image
            low = torch.logical_or(torch.logical_not(x >= 0.7), x <= 0.2)
            near = torch.where(low, 2 * x, -y) + torch.where(torch.logical_and(x > y, x < 0.9), x, y)
            same = torch.where(torch.floor(4 * x) == torch.floor(4 * y), x, 3 * y)
            other = torch.where(torch.floor(4 * x) != torch.floor(4 * y), x, 3 * y)
            return torch.cat([near.amin(3).mean(2), same.mean((2, 3)), other.mean((2, 3))], 1)

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.lstm = nn.GRU(8, 6, batch_first=True), nn.LSTM(6, 5, batch_first=True)

        def forward(self, image):
            return self.lstm(self.gru(image[:, 0])[0])[0][:, -1]

    grown = (nn.InstanceNorm2d(3, affine=True), nn.Upsample(scale_factor=2), nn.ConvTranspose2d(3, 4, 3, 2, 1))
    squashed = (nn.Conv2d(3, 4, 3), nn.GELU(), nn.SiLU(), nn.Hardsigmoid(), nn.Hardswish())
    return {
        "activations": nn.Sequential(*squashed, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "pooling": nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2), nn.Flatten()),
        "uneven average": nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Flatten()),
        "batch norm": nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(-1)),
        "attention": Attention(),
        "mixed": Mixed(),
        "indexed": Indexed(),
        "elementary": Elementary(),
        "compared": Compared(),
        "recurrent": Read(),
        "grown": nn.Sequential(*grown, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    }


NAMES = ["activations", "pooling", "uneven average", "batch norm", "attention", "mixed"]
NAMES += ["indexed", "elementary", "compared", "recurrent", "grown"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_interpreter_computes_what_pytorch_computes(name, tmp_path):
    got, want = computed(tiny_model(networks()[name]), tmp_path, precision="fp32")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_an_operator_the_interpreter_lacks_is_named(tmp_path, tiny, monkeypatch):
    monkeypatch.delitem(mil.OPERATORS, "conv")
    with pytest.raises(NotImplementedError, match="'conv'"):
        computed(tiny, tmp_path)


@pytest.mark.parametrize(
    ("pad", "options", "want"),
    [
        ([0, 0, 1, 2], {}, (1, 2, 7, {})),
        ([1, 1, 2, 0], {"mode": "reflect"}, None),
        ([0, 0, 1, 0, 0, 1], {"mode": "constant", "constant_val": 5.0}, None),
    ],
)
def test_padding_follows_numpy(pad, options, want):
    import torch

    x = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    pairs = [(0, 0)] * (3 - len(pad) // 2) + [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)]
    kind = (
        {"mode": options["mode"]}
        if options.get("mode") == "reflect"
        else {"constant_values": options.get("constant_val", 0)}
    )
    got = mil_operators._pad({"x": torch.from_numpy(x), "pad": pad, **options}).numpy()
    np.testing.assert_array_equal(got, np.pad(x, pairs, **kind))
