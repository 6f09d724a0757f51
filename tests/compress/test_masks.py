"""Attention masks: what they fill in stays float, in the plan, in its simulation and in the file."""

from dataclasses import replace

import numpy as np
import pytest

from edgekit import device_profiles, grid, plugins, workload
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.export import PACKAGE
from edgekit.model import Data, Split
from edgekit.progress import silent

WIDTH, TOKENS = 16, 6
FILLERS = {
    "the smallest float": float(np.finfo(np.float32).min),
    "minus infinity": -np.inf,
    "the smallest half": -65504.0,
    "ten thousand": -1e4,
}


def attention(filler):
    """Return one layer of attention whose padding, the end of each row, is masked by adding ``filler``."""
    torch = pytest.importorskip("torch")
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.sources = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, kept):
            query, key, value = (source(x) for source in self.sources)
            mask = torch.where(kept[:, None, :], 0.0, filler)
            scores = query @ key.transpose(1, 2) + mask
            return self.out(torch.softmax(scores, -1) @ value)

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, TOKENS, WIDTH)).astype(np.float32)
    kept = np.arange(TOKENS)[None, :] < rng.integers(2, TOKENS + 1, size=64)[:, None]
    split = Split({"x": x, "kept": kept})
    return workload.from_module("attention", Attention().eval(), Data(split))


def onnx_twin(model, folder):
    """Return the float file of a model as a model of its own, and its path."""
    exporter = plugins.load(PACKAGE, "onnx", "format")
    folder.mkdir(exist_ok=True)
    made = exporter.export(model, device_profiles.load("x86-64"), folder, silent)
    return folder / made.main


def sqnr(found, truth):
    return 10 * np.log10(np.mean(truth**2) / np.mean((found - truth) ** 2))


def computed(path, inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.x64quantprecision", "1")  # x86 without dot products cuts sums off else
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})[0]


@pytest.mark.parametrize("filler", FILLERS)
def test_a_masked_network_in_int8_computes_what_it_did_in_simulation_and_in_its_file(filler, tmp_path):
    model = attention(FILLERS[filler])
    inputs = model.data.calibration.inputs
    truth = next(iter(model.network.run(inputs).values()))
    result = Quantize().apply(model, silent)
    assert sqnr(next(iter(planned_network(result).run(inputs).values())), truth) > 20
    assert sqnr(computed(onnx_twin(result, tmp_path / "int8"), inputs), truth) > 20
    twin = workload.load(str(onnx_twin(model, tmp_path / "float")), None, model.data)
    from_file = Quantize().apply(twin, silent)
    assert sqnr(next(iter(planned_network(from_file).run(inputs).values())), truth) > 20
    assert sqnr(computed(onnx_twin(from_file, tmp_path / "again"), inputs), truth) > 20


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "entropy", "mse"])
def test_the_plan_has_no_range_of_what_a_mask_fills_and_tells_how_much_that_is(observer):
    result = Quantize(observer=observer).apply(attention(FILLERS["minus infinity"]), silent)
    ranges = result.plan.activations
    assert {"add", "where"}.isdisjoint(ranges)
    assert {"x", "matmul", "softmax", "matmul_1", "linear_3"} <= ranges.keys()
    assert result.lineage[-1].measured["masked_activations"] == 2
    assert min(limits.low for limits in ranges.values()) > -1000


def test_the_file_rounds_all_but_what_a_mask_fills(tmp_path):
    onnx = pytest.importorskip("onnx")
    result = Quantize().apply(attention(FILLERS["the smallest float"]), silent)
    proto = onnx.load(onnx_twin(result, tmp_path))
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    rounded = [makers.get(n.input[0], "input") for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert "Softmax" in rounded
    assert rounded.count("MatMul") + rounded.count("Gemm") + rounded.count("Add") >= 3
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    assert makers[softmax.input[0]] == "Add"


def test_a_network_without_a_mask_has_nothing_masked():
    model = attention(0.0)
    assert "masked_activations" not in Quantize().apply(model, silent).lineage[-1].measured


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_no_mask_holds_is_still_refused(value):
    model = attention(-1e4)
    inputs = dict(model.data.calibration.inputs)
    inputs["x"] = inputs["x"].copy()
    inputs["x"][3, 0, 0] = value
    with pytest.raises(CompressionError, match="'x' holds NaN or infinity"):
        Quantize().apply(replace(model, data=Data(Split(inputs))), silent)


def test_wide_values_without_a_gap_are_no_mask():
    rng = np.random.default_rng(0)
    assert not grid.is_masked((rng.normal(size=5000) * 10_000).astype(np.float32))
    assert not grid.is_masked(np.float32([-300, 2, 5000]))
    assert not grid.is_masked(np.zeros((0, 3), np.float32))
    assert grid.is_masked(np.float32([-9990, 3, 12]))
    assert grid.is_masked(np.float32([-1e30, -2000, 12]))
