"""Trying a bundle out: golden samples, limits, and a child process that takes a crash upon itself."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import bundles, engines

from edgekit import bundle
from edgekit.errors import BundleError, HealthError, UnknownName, UsageError
from edgekit.manifest import Golden, Manifest, Parity
from edgekit.runtime import acceptance
from edgekit.runtime.acceptance import Allowance, check, compare, main, sqnr_db, try_out
from edgekit.runtime.sandbox.warden import Ended
from edgekit.tensors import TensorSpec


def test_sound_bundle_passes_and_tells_its_figures(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    measured = check(tmp_path / "b")
    assert measured["sqnr_db"] > 100
    assert measured["top1_agreement"] == 1.0
    assert measured["load_ms"] > 0
    assert 0 < measured["p95_ms"] < 1000
    assert measured["rss_mib"] > 10


def test_bundle_that_computes_something_else_is_refused_with_figures(tmp_path):
    bundles.mlp_bundle(tmp_path / "b", wrong_golden=True)
    with pytest.raises(HealthError, match=r"sqnr_db is -?\d.*at least 40 is wanted .*top1_agreement"):
        check(tmp_path / "b")


def test_agreement_has_a_limit_of_its_own(tmp_path):
    bundles.mlp_bundle(tmp_path / "b", wrong_golden=True, parity=Parity(status="checked", min_top1_agreement=0.9))
    with pytest.raises(HealthError, match="top1_agreement is 0"):
        check(tmp_path / "b")


def test_bundle_without_limits_only_has_to_run(tmp_path):
    bundles.mlp_bundle(tmp_path / "b", wrong_golden=True, parity=Parity(status="unverified", reason="no engine"))
    assert check(tmp_path / "b")["top1_agreement"] < 0.5


def test_bundle_without_golden_samples_only_has_to_load(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    assert set(check(tmp_path / "b")) == {"load_ms", "rss_mib", "peak_rss_mib"}


def test_golden_prompts_are_compared_by_prefix(tmp_path):
    def sealed(name, *prompts):
        variant = bundles.variant("any", "null", "m.json", parity=Parity(status="checked", min_top1_agreement=0.6))
        manifest = Manifest(
            name="echo",
            version="1",
            task="text-generation",
            variants=(variant,),
            files=(),
            golden=Golden(prompts=prompts),
        )
        bundle.seal(tmp_path / name, manifest, {"m.json": b'{"text": true}'})
        return tmp_path / name

    assert check(sealed("good", ("one two", "one two three"), ("four", "four ")))["top1_agreement"] == 1.0
    with pytest.raises(HealthError, match=r"top1_agreement is 0\.5"):
        check(sealed("bad", ("one two", "one two"), ("four", "five")))


def test_golden_file_that_is_no_array_is_a_bundle_error(tmp_path):
    sealed = bundles.mlp_bundle(tmp_path / "a")
    files = {entry.path: sealed.path(entry.path).read_bytes() for entry in sealed.manifest.files}
    bundle.seal(tmp_path / "b", sealed.manifest, {**files, "golden/image.npy": b"no array"})
    with pytest.raises(BundleError, match=r"image\.npy is no \.npy file"):
        check(tmp_path / "b")


def test_compare_refuses_nan_and_other_shapes():
    want = {"s": np.ones((2, 3))}
    with pytest.raises(HealthError, match="NaN"):
        compare({"s": np.full((2, 3), np.nan)}, want)
    with pytest.raises(HealthError, match="shape"):
        compare({"s": np.ones((2, 4))}, want)


def test_sqnr_is_twenty_decibels_a_decade():
    reference = np.ones(1000)
    assert sqnr_db(reference, reference * 1.1) == pytest.approx(20)
    assert sqnr_db(reference, reference * 1.01) == pytest.approx(40)
    assert sqnr_db(reference, reference) == 200
    assert sqnr_db(np.zeros(3), np.ones(3)) == -200


def misbehaving(folder, kind):
    variant = bundles.variant("any", "misbehaving", "m.txt")
    manifest = Manifest(
        name="bad",
        version="1",
        task="tensor",
        inputs=(TensorSpec("image", "float32", (-1, 3)),),
        outputs=(TensorSpec("scores", "float32", (-1, 4)),),
        variants=(variant,),
        files=(),
    )
    bundle.seal(folder, manifest, {"m.txt": kind.encode()})
    return folder


@pytest.fixture
def misbehaving_engine(tmp_path, monkeypatch):
    engines.register(tmp_path / "site")
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(tests), *sys.path]))


def test_child_that_runs_a_sound_bundle_returns_the_figures(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    assert try_out(tmp_path / "b", "x86-64", allowed=Allowance(60))["top1_agreement"] == 1.0


def test_folder_one_stands_in_shadows_no_package_of_the_child(tmp_path, monkeypatch):
    bundles.mlp_bundle(tmp_path / "b")
    (tmp_path / "numpy.py").write_text("raise SystemExit('taken over')\n")
    monkeypatch.chdir(tmp_path)
    assert try_out(tmp_path / "b")["sqnr_db"] > 40


def test_engine_that_crashes_takes_only_the_child_with_it(tmp_path, misbehaving_engine):
    with pytest.raises(HealthError, match="crashed on b with SIGSEGV"):
        try_out(misbehaving(tmp_path / "b", "crash"), allowed=Allowance(60))


def test_an_engine_that_is_not_installed_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    bundles.mlp_bundle(tmp_path / "b")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text("import sys\nsys.modules['onnxruntime'] = None\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "bare"), *sys.path]))
    with pytest.raises(HealthError, match=r"onnxruntime.*pip install 'edgekit\[onnx\]'"):
        try_out(tmp_path / "b", bundle.read(tmp_path / "b").manifest.variants[0].name)


def test_engine_that_hangs_is_given_up(tmp_path, misbehaving_engine):
    with pytest.raises(HealthError, match="did not finish"):
        try_out(misbehaving(tmp_path / "b", "hang"), allowed=Allowance(2))


def test_engine_that_ends_the_process_is_a_health_error(tmp_path, misbehaving_engine):
    with pytest.raises(HealthError, match="exit code 7"):
        try_out(misbehaving(tmp_path / "b", "quit"), allowed=Allowance(60))


def test_verdict_that_nests_without_end_is_a_health_error():
    nested = b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    with pytest.raises(HealthError, match="the try-out ended with exit code 0"):
        acceptance._verdict(Ended(code=0, stdout=nested, stderr=b"", peak_mib=1.0), {})


def test_child_hands_its_error_back_with_its_kind(tmp_path):
    bundles.mlp_bundle(tmp_path / "wrong", wrong_golden=True)
    with pytest.raises(HealthError, match="at least 40 is wanted"):
        try_out(tmp_path / "wrong", allowed=Allowance(60))
    bundles.mlp_bundle(tmp_path / "changed")
    (tmp_path / "changed/x86-64/model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="not the file that was sealed"):
        try_out(tmp_path / "changed", allowed=Allowance(60))
    with pytest.raises(UsageError):
        try_out(tmp_path / "nowhere", allowed=Allowance(60))


def test_entry_point_prints_json_and_exits_by_kind(tmp_path, capsys):
    bundles.mlp_bundle(tmp_path / "b")
    assert main([str(tmp_path / "b"), "--variant", "x86-64"]) == 0
    assert '"top1_agreement":1.0' in capsys.readouterr().out
    assert main([str(tmp_path / "b"), "--variant", "other"]) == UnknownName.exit_code
    assert '"kind":"UnknownName"' in capsys.readouterr().out
