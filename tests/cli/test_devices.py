"""`edgekit devices`."""

import json

import pytest
from click.testing import CliRunner

from edgekit import device_profiles
from edgekit.cli import cli


def run(*arguments):
    return CliRunner().invoke(cli, ["devices", *arguments])


def test_list_names_every_class():
    done = run("list", "--json")
    assert [d["name"] for d in json.loads(done.stdout)["devices"]] == device_profiles.names()
    assert all(name in run("list").stdout for name in device_profiles.names())


@pytest.mark.parametrize("name", device_profiles.names())
def test_show_tells_all_that_is_known(name):
    profile = device_profiles.load(name)
    shown = json.loads(run("show", name, "--json").stdout)
    assert shown["formats"] == list(profile.formats)
    assert profile.source in run("show", name).stdout


def test_show_offers_the_nearest_name():
    done = run("show", "raspbery-pi-5")
    assert done.exit_code == 2
    assert "did you mean raspberry-pi-5" in done.stderr


def test_show_reads_a_profile_of_ones_own(tmp_path):
    own = tmp_path / "toaster.toml"
    own.write_text(_profile("Toaster"))
    assert "Toaster" in run("show", str(own)).stdout


def test_show_tells_how_engines_run(tmp_path):
    shown = run("show", "raspberry-pi-zero-2")
    assert "arena = False" in shown.stdout
    assert "providers = coreml," in run("show", "mac-m1").stdout
    assert json.loads(run("show", "raspberry-pi-zero-2", "--json").stdout)["runtime"]["arena"] is False


def _profile(title):
    return (
        f'title = "{title}"\nsummary = "bread"\narch = "armv7"\nmemory_mb = 64\nthreads = 1\n'
        'formats = ["onnx"]\nsource = "the manual"\n'
    )


def test_detect_names_this_machine(monkeypatch):
    monkeypatch.setattr(device_profiles.platform, "machine", lambda: "x86_64")
    assert run("detect").stdout == "x86-64\n"


def test_detect_says_where_nothing_matches(monkeypatch):
    monkeypatch.setattr(device_profiles.platform, "machine", lambda: "vax")
    done = run("detect")
    assert done.exit_code == 2
    assert "--target" in done.stderr
