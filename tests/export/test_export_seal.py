"""One bundle out of many targets: which survive, what is stored, and that the same input gives the same bytes."""

import dataclasses
import difflib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fakes.exportable import llama_folder, tiny_model, with_plan

from edgekit import bundle, device_profiles, plugins, runtime, workload
from edgekit.compress import compress, recipe
from edgekit.errors import ExportError, InputError, UsageError
from edgekit.export import export

ALL = ("x86-64", "raspberry-pi-5", "jetson-orin-nano", "pixel-8", "iphone-15")


def profiles(*names):
    return [device_profiles.load(name) for name in names]


@pytest.fixture(scope="module")
def sealed(tiny_int8, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed") / "bundle"
    return export(tiny_int8, profiles(*ALL), folder, version="7", name="digits")


def test_every_target_ends_in_one_bundle_whose_every_byte_is_checked(sealed):
    opened = bundle.read(sealed.bundle.folder)
    assert opened.digest == sealed.bundle.digest
    assert [v.name for v in opened.manifest.variants] == list(ALL)
    assert (opened.manifest.name, opened.manifest.version) == ("digits", "7")
    assert {v.precision for v in opened.manifest.variants} == {"int8"}


JOBS = {"int8": None, "fp32": "fp32", "gguf": "q4_0"}
PACKAGES = {"executorch": "executorch", "openvino": "openvino"}


def written(place):
    """Export the small model, and a small Llama as GGUF, to every format that is installed."""
    formats = [one for one in plugins.names("edgekit.export.targets") if one != "gguf"]
    formats = [one for one in formats if importlib.util.find_spec(PACKAGES.get(one, "torch"))]
    for job, precision in JOBS.items():
        language = job == "gguf"
        given = workload.load(str(llama_folder(place / "llama"))) if language else with_plan(tiny_model())
        classes = [device_profiles.of_format(one) for one in (["gguf"] if language else formats)]
        done = export(given, classes, place / job, precision=precision)
        assert done.first_error is None, done.first_error


def as_text(path):
    """A file as lines to compare: the names and values of a Core ML program, else the bytes."""
    if path.suffix != ".mlmodel":
        return path.read_bytes().decode(errors="backslashreplace").splitlines()
    from coremltools.proto import Model_pb2

    return str(Model_pb2.Model.FromString(path.read_bytes())).splitlines()


def differences(first, second):
    """What differs between the files of two bundles, at most 40 lines of each."""
    ours, theirs = ({e.path: e.sha256 for e in one.manifest.files} for one in (first, second))
    assert ours.keys() == theirs.keys()
    texts = {path: [as_text(one.path(path)) for one in (first, second)] for path in ours if ours[path] != theirs[path]}
    return {path: list(difflib.unified_diff(*both, lineterm=""))[:40] for path, both in texts.items()}


@pytest.mark.slow
def test_a_fresh_process_writes_the_same_bytes_in_every_format(tmp_path):
    """The other process has another hash seed, clock, time zone and other folders, and has done nothing before."""
    for name in ("here", "there", "apart"):
        (tmp_path / name).mkdir()
    tests = Path(__file__).resolve().parents[1]
    script = "from test_export_seal import Path, written; written(Path('../there'))"
    paths = os.pathsep.join([str(tests / "export"), str(tests), os.environ.get("PYTHONPATH", "")])
    changed = {"PYTHONHASHSEED": "7", "TMPDIR": str(tmp_path / "apart"), "TZ": "Asia/Kathmandu", "PYTHONPATH": paths}
    unwatched = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    other = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path / "apart", env={**unwatched, **changed})
    written(tmp_path / "here")
    assert other.wait(timeout=240) == 0
    for job in JOBS:
        first, second = (bundle.read(tmp_path / place / job) for place in ("here", "there"))
        assert differences(first, second) == {}, job
        assert first.digest == second.digest, job
        for entry in second.manifest.files:
            assert str(tmp_path).encode() not in second.path(entry.path).read_bytes(), entry.path


def test_equal_files_are_stored_once(sealed):
    manifest = sealed.bundle.manifest
    assert manifest.variant("x86-64").main == manifest.variant("raspberry-pi-5").main
    assert manifest.variant("x86-64").main != manifest.variant("jetson-orin-nano").main
    assert {f.path for f in manifest.files_of("raspberry-pi-5")} >= {manifest.variant("raspberry-pi-5").main}


def test_golden_outputs_are_those_of_the_float_model(sealed, tiny):
    manifest = sealed.bundle.manifest
    images = np.load(sealed.bundle.path(manifest.golden.inputs["image"]))
    scores = np.load(sealed.bundle.path(manifest.golden.outputs["scores"]))
    assert images.shape == (8, 3, 8, 8)
    assert np.array_equal(images, tiny.data.calibration.inputs["image"][:8])
    np.testing.assert_allclose(scores, tiny.network.run({"image": images})["scores"], atol=1e-5)


def test_the_manifest_says_how_to_read_a_picture_and_name_a_class(sealed, tiny):
    manifest = sealed.bundle.manifest
    assert manifest.preprocess == tiny.data.preprocess
    assert manifest.postprocess.labels == tiny.data.labels
    assert manifest.postprocess.output == "scores"


@pytest.mark.parametrize("name", ["x86-64", "jetson-orin-nano", "pixel-8"])
def test_the_runtime_answers_the_golden_inputs_from_the_sealed_bundle(sealed, name):
    manifest = sealed.bundle.manifest
    images = np.load(sealed.bundle.path(manifest.golden.inputs["image"]))
    want = np.load(sealed.bundle.path(manifest.golden.outputs["scores"]))
    with runtime.load(sealed.bundle.folder, variant=name) as session:
        got = session.run({"image": images})["scores"]
    assert (got.argmax(-1) == want.argmax(-1)).mean() >= 0.85
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_one_failing_target_leaves_the_others(tiny, tmp_path):
    result = export(tiny, profiles("llama-cpp", "x86-64"), tmp_path / "bundle")
    failed, done = result.rows
    assert isinstance(failed.error, ExportError)
    assert "no language model" in failed.error.message
    assert result.first_error is failed.error
    assert done.error is None
    assert [v.name for v in bundle.read(tmp_path / "bundle").manifest.variants] == ["x86-64"]


def test_nothing_is_written_when_every_target_fails(tiny, tmp_path):
    result = export(tiny, profiles("llama-cpp"), tmp_path / "bundle")
    assert result.bundle is None
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_bundle(tiny, tmp_path):
    old = export(tiny, profiles("x86-64"), tmp_path / "bundle").bundle
    export(tiny, profiles("llama-cpp"), tmp_path / "bundle", version="2")
    assert bundle.read(tmp_path / "bundle").digest == old.digest


def test_fp32_ignores_the_plan(tiny_int8, tmp_path):
    result = export(tiny_int8, profiles("x86-64"), tmp_path / "bundle", precision="fp32")
    variant = result.bundle.manifest.variant("x86-64")
    assert (variant.precision, variant.expected.min_sqnr_db) == ("fp32", 40.0)
    assert variant.parity.sqnr_db > 100


def test_a_precision_without_a_plan_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="cannot be exported as int8"):
        export(tiny, profiles("x86-64"), tmp_path / "bundle", precision="int8")


@pytest.mark.parametrize("names", [(), ("x86-64", "x86-64")])
def test_no_target_and_one_twice_are_refused(tiny, tmp_path, names):
    with pytest.raises(UsageError, match="give each target once"):
        export(tiny, profiles(*names), tmp_path / "bundle")


def test_a_model_without_data_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="no data to compare files on"):
        export(dataclasses.replace(tiny, data=None), profiles("x86-64"), tmp_path / "bundle")


def test_a_model_that_gives_nan_is_refused(tmp_path):
    model = tiny_model()
    model.network.module.head.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        export(model, profiles("x86-64"), tmp_path / "bundle")


def test_an_unknown_format_fails_its_target_with_the_known_ones(tiny, tmp_path):
    odd = msgspec.structs.replace(device_profiles.load("x86-64"), formats=("onxx",))
    row = export(tiny, [odd], tmp_path / "bundle").rows[0]
    assert "onnx" in row.error.hint


@pytest.mark.parametrize("name", ["../up", "a/b", "", "golden", "-x", "x" * 101])
def test_a_name_that_is_no_file_name_is_refused_before_any_work(tiny, tmp_path, name):
    odd = msgspec.structs.replace(device_profiles.load("x86-64"), name=name)
    with pytest.raises(UsageError, match="cannot name a bundle or target"):
        export(tiny, [odd], tmp_path / "bundle")
    if name:
        with pytest.raises(UsageError, match="cannot name a bundle or target"):
            export(tiny, profiles("x86-64"), tmp_path / "bundle", name=name)
    assert list(tmp_path.iterdir()) == []


def test_tensors_with_names_that_are_no_file_names_get_golden_files_all_the_same(tmp_path):
    from fakes import bundles

    from edgekit.model import Data, Model, OnnxNetwork, Split
    from edgekit.tensors import TensorSpec

    names = ("input/../0:1", "a b/c")
    (tmp_path / "odd.onnx").write_bytes(bundles.gemm_onnx(np.eye(3), names=names))
    model = Model(
        name="odd",
        task="tensor",
        network=OnnxNetwork(tmp_path / "odd.onnx"),
        inputs=(TensorSpec(names[0], "float32", (-1, 3)),),
        outputs=(TensorSpec(names[1], "float32", (-1, 3)),),
        data=Data(Split({names[0]: np.eye(3, dtype=np.float32)})),
    )
    sealed = export(model, profiles("x86-64"), tmp_path / "bundle").bundle
    opened = bundle.read(sealed.folder)
    golden = opened.manifest.golden
    assert np.array_equal(np.load(opened.path(golden.inputs[names[0]])), np.eye(3))
    assert np.array_equal(np.load(opened.path(golden.outputs[names[1]])), np.eye(3))


def test_what_a_checked_file_answered_travels_with_its_variant_only(sealed):
    manifest = sealed.bundle.manifest
    variant = manifest.variant("pixel-8")
    path = variant.expected.outputs["scores"]
    assert path in {f.path for f in manifest.files_of("pixel-8")}
    assert path not in {f.path for f in manifest.files_of("x86-64")}
    images = np.load(sealed.bundle.path(manifest.golden.inputs["image"]))
    with runtime.load(sealed.bundle.folder, variant="pixel-8") as session:
        got = session.run({"image": images})["scores"]
    np.testing.assert_allclose(got, np.load(sealed.bundle.path(path)), atol=1e-5)
    assert (variant.expected.min_sqnr_db, variant.expected.min_top1_agreement) == (25.0, 0.85)
    assert manifest.variant("iphone-15").expected is None


@pytest.mark.parametrize("with_a_plan", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_an_onnx_file_with_a_fixed_batch_serves_any_number_of_samples(tiny, tmp_path, size, with_a_plan):
    import torch

    source = tmp_path / "fixed.onnx"
    example = torch.zeros(size, 3, 8, 8)
    names = {"input_names": ["image"], "output_names": ["scores"]}
    torch.onnx.export(tiny.network.module, (example,), source, dynamo=True, verbose=False, **names)
    model = workload.load(str(source), None, tiny.data)
    model = compress(model, recipe.default()) if with_a_plan else model
    made = export(model, profiles("x86-64"), tmp_path / "bundle").bundle
    assert made.manifest.variants[0].batch == size
    assert made.manifest.inputs[0].shape == (-1, 3, 8, 8)
    images = tiny.data.calibration.inputs["image"][:7]
    with runtime.load(made.folder) as session:
        got = session.run({"image": images})["scores"]
    np.testing.assert_allclose(got, tiny.network.run({"image": images})["scores"], atol=1.0 if with_a_plan else 1e-4)


def test_a_folder_of_something_else_is_refused_before_any_work(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is no bundle, so it is not replaced"):
        export(tiny, profiles("x86-64"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
