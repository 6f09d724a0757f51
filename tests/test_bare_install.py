"""`pip install edgekit` alone: two small dependencies, a command line that works and names what is missing."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fakes.bundles import null_bundle

ROOT = Path(__file__).parents[1]
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "COV_", "VIRTUAL_ENV"))}


def call(*arguments, **settings):
    settings = {"capture_output": True, "text": True, "env": CLEAN, "timeout": 240, **settings}
    return subprocess.run([str(a) for a in arguments], check=False, **settings)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("edgekit-*.whl"))


@pytest.fixture(scope="session")
def bare(wheel, tmp_path_factory):
    """The Python of an environment that holds the wheel and what pip brings with it."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    assert call(sys.executable, "-m", "venv", folder).returncode == 0
    python = folder / "bin/python"
    done = call(python, "-m", "pip", "install", "-q", "--no-input", "--retries", "1", wheel)
    if done.returncode and any(
        sign in done.stderr for sign in ("Could not find a version", "connection", "Connection")
    ):
        pytest.skip(f"pip cannot reach click and msgspec: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return python


def edgekit(bare, *arguments):
    return call(bare.parent / "edgekit", *arguments, cwd=bare.parent)


def test_the_wheel_holds_code_profiles_and_examples_and_is_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "edgekit/device_profiles/raspberry-pi-5.toml" in names
    assert "edgekit/_examples/digits.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/")) or name.endswith(".pyc")]
    assert wheel.stat().st_size < 1_200_000


def test_two_packages_come_along_and_no_more(bare):
    code = "from importlib import metadata; print(*sorted(d.name for d in metadata.distributions()))"
    installed = set(call(bare, "-c", code).stdout.split()) - {"pip", "setuptools", "wheel"}
    assert installed == {"click", "edgekit", "msgspec"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["doctor"], ["doctor", "--json"], ["devices", "list"]], ids=" ".join
)
def test_the_bare_command_line_works(bare, arguments):
    done = edgekit(bare, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_doctor_names_what_is_missing_and_how_to_get_it(bare):
    done = edgekit(bare, "doctor")
    assert "pip install 'edgekit[onnx]'" in done.stdout
    assert "onnxruntime" in done.stdout


def test_it_can_be_imported(bare):
    done = call(bare, "-c", "import edgekit; print(edgekit.__version__)", cwd=bare.parent)
    assert (done.returncode, done.stderr) == (0, "")


def every_help(bare, *path):
    text = edgekit(bare, *path, "--help")
    assert text.returncode == 0, text.stderr
    listed = text.stdout.partition("\nCommands:\n")[2].partition("\n\n")[0]
    for line in listed.splitlines():
        if line.startswith("  ") and not line.startswith("   "):
            every_help(bare, *path, line.split()[0])


def test_every_command_has_help_without_any_extra(bare):
    every_help(bare)


@pytest.mark.parametrize("command", ["run", "serve", "bench"])
def test_a_command_whose_engine_is_missing_says_what_to_install(bare, command, tmp_path):
    null_bundle(tmp_path / "bundle")
    more = {"run": [tmp_path / "bundle/manifest.json"]}.get(command, [])
    done = edgekit(bare, command, tmp_path / "bundle", *more)
    assert done.returncode == 3, done.stderr
    assert "hint: pip install 'edgekit[" in done.stderr
    assert "Traceback" not in done.stderr
