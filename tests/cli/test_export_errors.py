"""What `edgekit export` says of networks that a format cannot hold, and of machines that lack something.

Real networks through the real command, in this process: the converters are imported once.
"""

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgekit import bundle, device_profiles, plugins
from edgekit import export as exporting
from edgekit.cli import cli
from edgekit.export import PACKAGE

pytest.importorskip("torch", reason="exporters need torch")
pytest.importorskip("litert_torch", reason="needs the extra export")
pytest.importorskip("coremltools", reason="needs the extra export")
pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("executorch", reason="needs the extra executorch")
pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-rtx")

FORMATS = ("onnx", "tensorrt", "openvino", "executorch", "coreml", "tflite")
SOURCE = """
import numpy as np
import torch
from torch import nn
from edgekit.model import Data, Split


class Body(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 4), nn.Sequential(inner), nn.Linear(4, 3)

    def forward(self, rows):
        return self.head(self.inner(self.stem(rows)))


class Zeta(nn.Module):
    def forward(self, x):
        return torch.special.zeta(x * x + 2, torch.ones_like(x))


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).abs()


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return x * 2


class Imaginary(nn.Module):
    def forward(self, x):
        return torch.complex(x, x)


def of(inner):
    torch.manual_seed(0)
    return Body(inner)


def zeta(): return of(Zeta())
def spectrum(): return of(Spectrum())
def branch(): return of(Branch())
def plain(): return of(nn.ReLU())
def imaginary(): return Imaginary()
def large(): return nn.Linear(800, 1200)
def wide(): return Data(Split({"rows": np.random.default_rng(0).standard_normal((8, 800), np.float32)}))
def data(): return Data(Split({"rows": np.random.default_rng(0).standard_normal((8, 4), np.float32)}))
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(SOURCE)
    return path


def line_of(words):
    return next(number for number, line in enumerate(SOURCE.splitlines(), 1) if words in line)


def export(net, name, folder, *formats, words=()):
    """Return the exit code, the table, and the error of each format by its name."""
    asked = [word for one in formats for word in ("--format", one)]
    call = ["export", f"{net}:{name}", "--data", f"{net}:data", "-o", str(folder), *asked, *words]
    done = CliRunner().invoke(cli, [*call, "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    document = json.loads(done.stdout)
    return done.exit_code, {row["target"]: row["error"] for row in document.get("targets", [])}, document


@pytest.mark.slow
def test_an_operator_without_a_form_is_named_with_its_module_and_line_in_every_format(net, tmp_path):
    code, errors, _ = export(net, "zeta", tmp_path / "b", *FORMATS)
    assert code == 5
    place = f"aten.special_zeta at inner.0 (net.py:{line_of('torch.special.zeta')})"
    for name, form in zip(FORMATS, ("ONNX", "ONNX", "ONNX", "ExecuTorch", "Core ML", "LiteRT"), strict=True):
        assert errors[name]["kind"] == "UnsupportedOperator", name
        assert f"net has no {form} form for {place}: " in errors[name]["message"]
        assert errors[name]["hint"].endswith("it is held by: none of the formats here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_complex_numbers_are_named_and_the_formats_that_hold_them(net, tmp_path):
    code, errors, document = export(
        net, "spectrum", tmp_path / "b", "tensorrt", "onnx", "executorch", "coreml", "tflite"
    )
    assert code == 5
    assert errors.pop("onnx") is None
    assert document["digest"] == bundle.read(tmp_path / "b").digest
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    place = f"aten.fft_fft at inner.0 (net.py:{line_of('torch.fft.fft')})"
    for name, error in errors.items():
        assert place in error["message"], name
        assert error["hint"].endswith("it is held by: onnx, openvino"), name
    assert "DFT 'node_DFT" in errors["tensorrt"]["message"]
    for name in ("executorch", "coreml", "tflite"):
        assert "computes with complex numbers" in errors[name]["message"]


def test_control_flow_on_values_is_told_with_its_line_in_every_format(net, tmp_path):
    code, errors, _ = export(net, "branch", tmp_path / "b", *FORMATS)
    assert code == 5
    line = f"net.py:{line_of('if x.sum() > 0')}, if x.sum() > 0:"
    assert {error["message"] for error in errors.values()} == {
        f"net cannot be traced to a graph: its control flow depends on the values of a tensor ({line})"
    }
    assert all("torch.cond" in error["hint"] for error in errors.values())
    assert list(tmp_path.iterdir()) == []


def test_complex_outputs_are_refused_before_anything_is_lowered(net, tmp_path):
    code, _, document = export(net, "imaginary", tmp_path / "b", "onnx")
    assert code == 5
    assert "'scores' of net is complex64, and no format takes or gives complex numbers" in document["error"]["message"]
    assert "view_as_real" in document["error"]["hint"]


def profile(folder, name, **changes):
    text = device_profiles._files()["x86-64"].read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_an_opset_that_the_exporter_ignored_is_an_error(net, tmp_path):
    old = profile(tmp_path, "old-pc", opset=("opset = 21", "opset = 13"))
    code, errors, _ = export(net, "plain", tmp_path / "b", words=("--target", str(old)))
    assert code == 5
    assert errors["old-pc"]["message"] == "opset 13 was asked for, torch.onnx wrote 18"
    assert not (tmp_path / "b").exists()


def test_a_file_larger_than_the_memory_of_its_class_is_an_error_that_the_table_tells(net, tmp_path):
    small = profile(tmp_path, "tiny-pc", memory=("memory_mb = 8192", "memory_mb = 1"))
    call = ["export", f"{net}:large", "--data", f"{net}:wide", "--target", str(small), "-o", str(tmp_path / "b")]
    done = CliRunner().invoke(cli, call)
    assert done.exit_code == 5
    assert re.search(r"\| tiny-pc +\| onnx +\| - +\| - +\| failed: cannot hold it +\|", done.stdout)
    assert "tiny-pc/model.onnx has 4 MiB, and tiny-pc has 1 MiB of memory" in done.stderr
    assert not (tmp_path / "b").exists()


def test_a_missing_extra_and_a_fault_of_an_exporter_are_rows_and_the_others_finish(net, tmp_path, monkeypatch):
    made = plugins.load(PACKAGE, "openvino", "format")

    def break_off(*_given):
        raise IndexError("list index out of range")

    monkeypatch.setattr(type(made), "export", break_off)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    code, errors, document = export(net, "plain", tmp_path / "b", "coreml", "openvino", "onnx")
    assert code == 3
    assert errors["coreml"]["kind"] == "MissingExtra"
    assert errors["coreml"]["hint"] == "pip install 'edgekit[export]'"
    assert errors["openvino"]["message"] == "the exporter of openvino failed: IndexError: list index out of range"
    assert errors["onnx"] is None
    assert document["digest"] == bundle.read(tmp_path / "b").digest


@pytest.fixture
def small_disk(tmp_path):
    """Give a disk of its own of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_bundle_that_has_no_room_says_how_much_it_needs_and_leaves_nothing(net, small_disk):
    call = ["export", f"{net}:large", "--data", f"{net}:wide", "--format", "onnx", "-o", str(small_disk / "b")]
    done = CliRunner().invoke(cli, call)
    assert done.exit_code == 12
    assert f"the disk of {small_disk} has no room for the bundle: 4." in done.stderr
    assert "MiB are needed, 3.0 MiB are free" in done.stderr
    assert list(small_disk.iterdir()) == []


def export_with_temporary(place, net, folder, formats):
    import tempfile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place))
        patch.setenv("TMPDIR", str(place))
        asked = [word for one in formats for word in ("--format", one)]
        done = CliRunner().invoke(
            cli, ["export", f"{net}:large", "--data", f"{net}:wide", *asked, "-o", str(folder), "--json"]
        )
    assert done.exit_code == 12, done.output
    for row in json.loads(done.stdout)["targets"]:
        assert row["error"]["kind"] == "ResourceError", row
        assert f"the disk of {place}" in row["error"]["message"]
        assert "TMPDIR" in row["error"]["hint"]
        yield row["error"]["message"]
    assert not folder.exists()
    assert list(place.iterdir()) == []


def test_a_temporary_disk_without_room_for_the_weights_is_named_before_anything_is_written(net, small_disk, tmp_path):
    told = list(export_with_temporary(small_disk, net, tmp_path / "b", FORMATS))
    assert len(told) == len(FORMATS)
    assert all("has no room for the weights of net: 3.7 MiB are needed, 3.0 MiB are free" in one for one in told)


def test_a_disk_that_runs_full_while_a_file_is_written_is_named(net, small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_refuse_small_disk", lambda *_given: None)
    formats = ("onnx", "openvino")
    told = list(export_with_temporary(small_disk, net, tmp_path / "b", formats))
    assert [f"has no room for {name}: " in one for name, one in zip(formats, told, strict=True)] == [True] * 2
