"""Parity: faithful files pass with their figures, wrong ones are named with figures and limits."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edgekit import device_profiles, plugins, workload
from edgekit.cli import cli
from edgekit.errors import ExportError, ParityError
from edgekit.export import PACKAGE, export, labelled, parity
from edgekit.export.golden import reference_of
from edgekit.export.parity import LIMITS, Reference, measure
from edgekit.manifest import Parity, Variant
from edgekit.model import Data, Split
from edgekit.runtime import Contract

FORMATS = [name for name in plugins.names(PACKAGE) if name != "gguf"]


def profile_of(fmt, **options):
    for name in device_profiles.names():
        profile = device_profiles.load(name)
        if profile.format == fmt:
            return msgspec.structs.replace(profile, options={**profile.options, **options})
    pytest.fail(f"no hardware class prefers {fmt}; parity is not proved for it")


def reference(outputs, scores=None):
    some = next(iter(outputs.values()))
    return Reference(Split({"x": np.zeros((len(some), 1), np.float32)}), outputs, Contract(), scores)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_tensor_format_keeps_what_the_model_computes(fmt, precision, tiny, tiny_int8, tmp_path):
    model = tiny_int8 if precision == "int8" else tiny
    row = export(model, [profile_of(fmt)], tmp_path / "bundle").rows[0]
    assert row.error is None, row.error.message
    figures = row.variant.parity
    assert figures.status in ("checked", "evaluated")
    assert figures.samples == 24
    assert figures.sqnr_db >= {"fp32": 100, "fp16": 45, "int8": 25}[row.variant.precision]
    assert figures.min_sqnr_db == LIMITS[row.variant.precision].sqnr_db
    assert figures.top1_agreement >= figures.min_top1_agreement


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1.0))
def test_sqnr_is_the_noise_that_was_added(seed, level):
    rng = np.random.default_rng(seed)
    want = rng.standard_normal((500, 10))
    noise = rng.standard_normal((500, 10)) * level
    figures = measure(reference({"y": want}), {"y": want + noise})
    assert figures.sqnr_db == pytest.approx(-20 * math.log10(level), abs=0.6)
    assert figures.max_abs_error == pytest.approx(np.abs(noise).max(), rel=1e-3)
    assert figures.top1 is None


def test_equal_outputs_measure_200_db_and_nan_minus_200():
    want = np.ones((2, 3))
    assert measure(reference({"y": want}), {"y": want}).sqnr_db == 200
    assert measure(reference({"y": want}), {"y": want * np.nan}).sqnr_db == -200
    assert measure(reference({"y": want * 0}), {"y": want}).sqnr_db == -200


def test_the_worst_output_counts():
    want = {"good": np.ones((2, 3)), "bad": np.ones((2, 3))}
    got = {"good": np.ones((2, 3)), "bad": np.full((2, 3), 2.0)}
    assert measure(reference(want), got).sqnr_db == 0


def test_top1_counts_the_rows_whose_best_class_stayed():
    want = np.eye(4)
    got = want[[0, 1, 2, 0]]
    assert measure(reference({"y": want}, "y"), {"y": got}).top1 == 0.75


def test_integers_are_compared_one_by_one():
    labels = np.array([3, 1, 4, 1])
    figures = measure(reference({"label": labels}), {"label": np.array([3, 1, 4, 2])})
    assert (figures.sqnr_db, figures.top1, figures.max_abs_error) == (200.0, 0.75, 0.0)


def test_a_file_with_other_weights_is_named_with_figures_and_limits(tiny, tmp_path):
    import onnx
    from onnx import numpy_helper

    exporter = plugins.load(PACKAGE, "onnx", "format")
    exporter.export(tiny, device_profiles.load("x86-64"), tmp_path, lambda *_: None)
    graph = onnx.load(tmp_path / "model.onnx")
    weight = next(t for t in graph.graph.initializer if t.name == "down.weight")
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), "down.weight"))
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"model.onnx .* SQNR -?\d+.* \(at least 60.0\).*top-1"):
        parity.check(exporter, variant("onnx"), tmp_path, reference_of(tiny, "tiny", "1"))


def test_a_file_runs_in_several_sizes_of_batch(tiny, tmp_path):
    exporter = plugins.load(PACKAGE, "onnx", "format")
    exporter.export(tiny, device_profiles.load("x86-64"), tmp_path, lambda *_: None)
    proof = parity.check(exporter, variant("onnx"), tmp_path, reference_of(tiny, "tiny", "1"))
    assert proof.parity.batches == (1, 3, 16)


def test_a_file_that_mixes_the_samples_of_a_batch_is_refused(tmp_path):
    """In batches of 16 it computes what the network does; in smaller ones it cannot."""
    import torch
    from fakes.exportable import tiny_model

    class Mixing(torch.nn.Module):
        def forward(self, image):
            flat = image.flatten(1)[:, :10]
            return flat - flat.mean(0, keepdim=True)

    model = tiny_model(Mixing(), count=16)
    exporter = plugins.load(PACKAGE, "onnx", "format")
    exporter.export(model, device_profiles.load("x86-64"), tmp_path, lambda *_: None)
    with pytest.raises(ParityError, match="answers otherwise in batches of 1"):
        parity.check(exporter, variant("onnx"), tmp_path, reference_of(model, "mixing", "1"))


def test_a_file_the_engine_refuses_is_a_parity_error(tiny, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ParityError, match="refuses"):
        parity.check(plugins.load(PACKAGE, "onnx", "format"), variant("onnx"), tmp_path, reference_of(tiny, "t", "1"))


def test_a_format_nobody_can_compute_here_is_unverified_with_the_reason(tiny, tmp_path):
    found = parity.check(object(), variant("qnn"), tmp_path, reference_of(tiny, "t", "1")).parity
    assert found == Parity(status="unverified", reason="no engine for qnn runs on this machine")


def test_an_operator_the_evaluator_lacks_is_unverified_and_named(tiny, tmp_path):
    class Lacking:
        def evaluate(self, main, inputs):
            raise NotImplementedError("the interpreter lacks the Core ML operator 'lstm'")

    found = parity.check(Lacking(), variant("coreml"), tmp_path, reference_of(tiny, "t", "1")).parity
    assert found.status == "unverified"
    assert "'lstm'" in found.reason


def test_an_engine_that_is_not_installed_leaves_the_reason(tiny, tmp_path, monkeypatch):
    import sys

    exporter = plugins.load(PACKAGE, "onnx", "format")
    exporter.export(tiny, device_profiles.load("x86-64"), tmp_path, lambda *_: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = parity.check(
        exporter, variant("onnx"), tmp_path, Reference(
            tiny.data.calibration, {}, Contract(inputs=tiny.inputs, outputs=tiny.outputs))
    ).parity  # fmt: skip
    assert found.status == "unverified"
    assert "onnxruntime" in found.reason


def variant(fmt):
    unverified = Parity(status="unverified")
    return Variant(
        name="x86-64", format=fmt, precision="fp32", main="model.onnx", files=("model.onnx",), parity=unverified
    )


def test_a_precision_without_limits_is_refused_not_waved_through(tiny, tmp_path):
    exporter = plugins.load(PACKAGE, "onnx", "format")
    exporter.export(tiny, device_profiles.load("x86-64"), tmp_path, lambda *_: None)
    odd = msgspec.structs.replace(variant("onnx"), precision="ternary")
    with pytest.raises(ExportError, match="nobody knows what a ternary file must hold"):
        parity.check(exporter, odd, tmp_path, reference_of(tiny, "t", "1"))


def with_validation(model, images):
    """Return the model with validation pictures whose labels are what the float network says."""
    labels = model.network.run({"image": images})["scores"].argmax(1)
    data = dataclasses.replace(model.data, validation=Split({"image": images}, labels))
    return dataclasses.replace(model, data=data)


def test_the_metric_on_labelled_data_is_measured_and_told(tiny_int8, tmp_path):
    images = np.random.default_rng(1).random((400, 3, 8, 8), np.float32)
    best = np.sort(tiny_int8.network.run({"image": images})["scores"], 1)[:, -2:]
    model = with_validation(tiny_int8, images[best[:, 1] - best[:, 0] > 0.1])  # no class hangs by a thread
    engine, evaluated = export(model, [profile_of("onnx"), profile_of("coreml")], tmp_path / "b").rows
    found = engine.variant.parity.labelled
    assert (found.metric, found.samples, found.model, found.max_loss) == ("top1", 128, 1.0, 0.05)
    assert 0.95 <= found.file <= 1.0
    assert evaluated.variant.parity.labelled is None
    assert "metric on labelled data is not measured" in evaluated.variant.parity.reason
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "b")]).stdout
    told = f"top1 {found.file:.3f} on 128 labelled samples, the model's 1.000 (at most 0.05 less)"
    assert f"{engine.target}: {told}" in shown


def test_a_file_that_loses_on_labelled_data_is_refused(tiny_int8, tmp_path):
    """Pictures brighter than those the plan was calibrated on: SQNR on calibration samples cannot see that."""
    bright = 30 * np.random.default_rng(1).random((64, 3, 8, 8), np.float32)
    (row,) = export(with_validation(tiny_int8, bright), [profile_of("onnx")], tmp_path / "b").rows
    assert isinstance(row.error, ParityError)
    assert "loses too much on labelled data: top1 " in row.error.message
    assert "the model's 1.000 (at most 0.05 less)" in row.error.message
    assert not (tmp_path / "b").exists()


def pixels(noise, kind):
    """Return a network that gives scores of three classes a pixel, or two numbers a picture, with labels to it."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    body = [nn.Conv2d(1, 3, 3, padding=1)]
    network = nn.Sequential(*body, *([nn.Flatten(), nn.Linear(192, 2)] if kind == "targets" else [])).eval()
    images = np.random.default_rng(0).normal(size=(160, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        found = network(torch.as_tensor(images)).numpy()
    if kind == "targets":
        labels = (found + noise * np.random.default_rng(1).normal(size=found.shape)).astype(np.float32)
    else:
        labels = found.argmax(1)
        labels[:, 0] = -100  # the first row of pixels does not count, and is no class
        labels[:, 1] = (labels[:, 1] + 1) % 3  # the second is wrong
    data = Data(Split({"image": images[:16]}), validation=Split({"image": images[16:]}, labels[16:]))
    return workload.from_module("pixels", network, data)


def test_classes_of_positions_are_counted_where_they_count(tmp_path):
    found = export(pixels(0, "classes"), [profile_of("onnx")], tmp_path / "b").rows[0].variant.parity.labelled
    assert (found.metric, found.samples, found.model) == ("top1", 128, round(6 / 7, 4))
    assert found.file == pytest.approx(6 / 7, abs=1e-3)


def test_targets_are_judged_by_the_variance_that_is_explained(tmp_path):
    model = pixels(0.1, "targets")
    found = export(model, [profile_of("onnx")], tmp_path / "b").rows[0].variant.parity.labelled
    assert (found.metric, found.max_loss) == ("r2", 0.0156)
    split = model.data.validation
    chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:128])
    sklearn = pytest.importorskip("sklearn.metrics")
    outputs = model.network.run({"image": split.inputs["image"][chosen]})["scores"]
    spread = {"multioutput": "variance_weighted"}
    assert found.model == pytest.approx(sklearn.r2_score(split.labels[chosen], outputs, **spread), abs=1e-3)
    assert found.file == pytest.approx(found.model, abs=1e-3)
    poor = dataclasses.replace(model.data, validation=Split(split.inputs, -3 * split.labels))
    assert labelled.labels_of(dataclasses.replace(model, data=poor), None) is None


@pytest.mark.parametrize(
    ("precision", "samples", "loss"),
    [("fp32", 128, 0.0156), ("fp32", 1000, 0.01), ("fp16", 128, 0.02), ("int8-dynamic", 128, 0.05), ("w4a8", 128, 0.3),
     ("wmixeda8", 128, 0.3), ("w2a8", 128, 1.0), ("int8", 10, 0.2), ("int8", 1, 1.0)],
)  # fmt: skip
def test_what_a_file_may_lose_goes_by_its_precision(precision, samples, loss):
    assert labelled.most_loss(precision, samples) == loss
