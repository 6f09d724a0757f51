"""Core ML's engine: refused in plain words where there is no Mac, and what is ours of it on a stand-in for one."""

import json

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from fakes import bundles, core_ml
from fakes.engine_files import CONTRACT, WEIGHTS, write

import edgekit
from edgekit import bundle
from edgekit.cli import cli
from edgekit.device_profiles import RuntimeSettings
from edgekit.errors import HealthError, UsageError
from edgekit.manifest import Manifest
from edgekit.runtime import open_variant
from edgekit.runtime.backends import EngineOptions

pytestmark = pytest.mark.skipif(__import__("sys").platform == "darwin", reason="on a Mac there is an engine")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    return folder, write("coreml", folder)


def sealed(folder, package, *others):
    """Seal a bundle of the package, first in its manifest, and others."""
    source, variant = package
    paths = [path for path in (source / "model.mlpackage").rglob("*") if path.is_file()]
    contents = {f"iphone-15/{path.relative_to(source)}": path.read_bytes() for path in paths}
    one = msgspec.structs.replace(
        variant, name="iphone-15", main=f"iphone-15/{variant.main}", files=tuple(sorted(contents))
    )
    null = json.dumps({"outputs": [{"name": "scores", "dtype": "float32", "shape": [-1, 4]}]}).encode()
    contents |= {other.main: null for other in others}
    tensors = {"inputs": CONTRACT.inputs, "outputs": CONTRACT.outputs}
    manifest = Manifest(name="phone", version="1", task="tensor", variants=(one, *others), files=(), **tensors)
    bundle.seal(folder, manifest, contents)
    return str(folder)


def test_the_package_is_refused_here_with_the_way_out(package):
    with pytest.raises(HealthError, match="Core ML runs on macOS and iOS, this is Linux") as caught:
        open_variant(*package, CONTRACT)
    assert "serve another variant here" in caught.value.hint


def test_a_bundle_with_a_package_loads_what_else_it_holds_and_says_why(package, tmp_path, caplog):
    folder = sealed(tmp_path / "b", package, bundles.variant("dry", "null"))
    with edgekit.load(folder) as session:
        assert session.variant.name == "dry"
        told = dict(session.considered)
    assert told["iphone-15"] == "Core ML runs on macOS and iOS, this is Linux"
    assert not caplog.records, "nothing is wrong with such a bundle: no warning"


@pytest.mark.parametrize("command", ["serve", "run", "bench"])
def test_every_command_says_why_a_package_does_not_run(command, package, tmp_path):
    folder = sealed(tmp_path / "b", package, bundles.variant("dry", "null"))
    np.save(tmp_path / "x.npy", np.zeros((1, 3), np.float32))
    given = [str(tmp_path / "x.npy")] if command == "run" else []
    named = CliRunner().invoke(cli, [command, folder, *given, "--variant", "iphone-15"])
    assert named.exit_code == UsageError.exit_code
    assert "no engine runs coreml here (variant iphone-15): Core ML runs on macOS and iOS" in named.stderr
    assert "variants that can run: dry" in named.stderr
    alone = CliRunner().invoke(cli, [command, sealed(tmp_path / "alone", package), *given])
    assert alone.exit_code == UsageError.exit_code
    assert "it holds coreml; Core ML runs on macOS and iOS, this is Linux" in alone.stderr


@pytest.mark.slow
def test_doctor_says_which_classes_have_an_engine_here():
    targets = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["targets"]
    engines = {row["target"]: row["engine"] for row in targets}
    assert engines["iphone-15"] == "no: Core ML runs on macOS and iOS, this is Linux"
    assert engines["x86-64"] == "yes"


def test_on_a_mac_the_package_is_opened_on_the_units_of_the_class_and_computes(package, monkeypatch):
    framework = core_ml.stand_in(monkeypatch)
    image = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    options = EngineOptions(runtime=RuntimeSettings(compute_units="cpu-and-ne"))
    with open_variant(*package, CONTRACT, options) as session:
        assert session.engine == "Core ML of macOS 15.1 CPU_AND_NE"
        np.testing.assert_allclose(session.run({"image": image})["scores"], image @ WEIGHTS, atol=1e-4)
    assert framework.units == "CPU_AND_NE"


def test_on_a_mac_what_the_framework_refuses_is_a_health_error_with_its_words(package, monkeypatch):
    framework = core_ml.stand_in(monkeypatch)
    monkeypatch.setattr(framework, "refuses", "compiler error: unknown opset CoreML9")
    with pytest.raises(HealthError, match=r"Core ML refuses model\.mlpackage: compiler error: unknown opset CoreML9"):
        open_variant(*package, CONTRACT)
