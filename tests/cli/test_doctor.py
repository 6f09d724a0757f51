"""`edgekit doctor`: what it says of installed, missing and old packages, true to pyproject.toml."""

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgekit import device_profiles
from edgekit.cli import cli
from edgekit.cli._extras import ENABLES, Extra, Package, find_extras
from edgekit.cli.doctor import _tensorrt
from edgekit.device_profiles import machine
from edgekit.errors import HealthError
from edgekit.runtime import tensorrt_tools
from edgekit.runtime.cuda import Gpu

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_extra_of_the_project_is_told_with_what_it_enables():
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert set(ENABLES) == set(declared)
    assert {extra.name for extra in find_extras()} == set(declared)


@pytest.mark.slow
def test_doctor_ends_well_and_names_the_machine_in_both_forms():
    document = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert document["machine"]["cores"] >= 1
    text = CliRunner().invoke(cli, ["doctor"])
    assert text.exit_code == 0
    assert document["machine"]["cpu"] in text.stdout
    assert f"TensorRT: {document['tensorrt']}" in text.stdout


def test_doctor_says_what_tensorrt_lacks_and_what_builds_its_engines(monkeypatch):
    def nothing():
        raise HealthError("this machine has no NVIDIA driver")

    monkeypatch.setattr(tensorrt_tools, "find", nothing)
    assert _tensorrt() == "this machine has no NVIDIA driver"
    tools = tensorrt_tools.Tools(Gpu("Orin 8.7", "CUDA 12060"), "tensorrt 10.3", "tensorrt", list, open)
    monkeypatch.setattr(tensorrt_tools, "find", lambda: tools)
    assert _tensorrt() == "engines are built by tensorrt 10.3 for Orin 8.7, CUDA 12060"


@pytest.mark.slow
def test_doctor_says_of_every_target_whether_it_can_be_written_here():
    document = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert [row["target"] for row in document["targets"]] == device_profiles.names()
    assert {row["export"] for row in document["targets"]} == {"yes"}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def absent(name):
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return "99.0"

    monkeypatch.setattr(metadata, "version", absent)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0
    assert "onnx lacks onnxruntime" in done.stdout
    assert "pip install 'edgekit[onnx]'" in done.stdout
    states = {e.name: not e.lacking for e in find_extras()}
    assert states["tflite"]
    assert not states["onnx"]
    assert not states["all"], "an extra made of extras lacks what its parts lack"


@pytest.mark.parametrize(
    ("installed", "wanted", "is_good"),
    [
        ("1.31.1", ">=1.20", True), ("1.9", ">=1.20", False), ("", ">=1.20", False), ("2.13.0+cpu", ">=2.8", True),
        ("5", "", True), ("2.3.5", "<2.4,>=1.26", True),
    ],
)  # fmt: skip
def test_a_package_older_than_wanted_counts_as_lacking(installed, wanted, is_good):
    assert Package("x", wanted, installed).is_good is is_good


def test_an_old_package_is_named_with_its_version():
    assert Extra("onnx", "", (Package("onnxruntime", ">=1.20", "1.2"),)).lacking == ["onnxruntime 1.2 is too old"]


def test_doctor_runs_where_edgekit_was_never_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0
    assert "pip install -e ." in done.stderr


@pytest.mark.slow
def test_daemons_outside_the_path_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    here = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["programs"]["mosquitto"]
    assert bool(here) == any(Path(folder, "mosquitto").exists() for folder in ("/usr/sbin", "/usr/local/sbin"))


def test_a_raspberry_pi_is_read_from_its_proc_files(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nFeatures : fp asimd asimdhp asimddp\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:        4045504 kB\n")
    here = machine.describe(tmp_path)
    assert here.flags == ("asimddp", "asimd", "asimdhp")
    assert here.integer_dot_product == "asimddp"
    assert here.memory_mib == 3950


def test_an_unreadable_machine_is_described_as_far_as_it_goes(tmp_path):
    here = machine.describe(tmp_path)
    assert (here.flags, here.integer_dot_product, here.memory_mib) == ((), "", 0)
