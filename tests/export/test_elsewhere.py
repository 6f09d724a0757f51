"""The same file on a processor without 8-bit dot products, played by QEMU: the gate of export, and `edgekit verify`."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fakes.planted import bright_inputs

from edgekit import bundle, device_profiles
from edgekit.cli import cli
from edgekit.cli.verify import COMMAND
from edgekit.compress.passes.quantize import Quantize
from edgekit.device_profiles import machine
from edgekit.errors import HealthError, UnknownName
from edgekit.export import elsewhere, export
from edgekit.manifest import Elsewhere, Expected, Parity, Variant
from edgekit.progress import silent
from edgekit.runtime import emulation
from edgekit.runtime.acceptance import golden_arrays
from edgekit.runtime.backends import SUMS, SUMS_CHECKED, EngineOptions
from edgekit.runtime.opening import contract_of, open_variant

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
HASWELL = emulation.isa_named("haswell")


@pytest.fixture(scope="module")
def emulated():
    if emulation.lacking(HASWELL):
        pytest.skip(emulation.lacking(HASWELL))
    if not machine.describe().integer_dot_product:
        pytest.skip("this processor has no 8-bit dot product to compare with")


def sealed(folder, target, pass_target="", *, strong=True):
    model = Quantize(target=pass_target).apply(bright_inputs(strong=strong), silent)
    return export(model, [device_profiles.load(target)], folder)


@pytest.mark.slow
def test_a_file_that_saturates_on_its_processor_is_refused_and_one_of_seven_bits_is_sealed(emulated, tmp_path):
    careless = sealed(tmp_path / "careless", "x86-64-v3")
    assert careless.bundle is None
    assert "answers otherwise on haswell" in careless.first_error.message
    assert 'target = "x86-64-v3"' in careless.first_error.hint
    safe = sealed(tmp_path / "safe", "x86-64-v3", "x86-64-v3")
    found = bundle.read(tmp_path / "safe").manifest.variants[0].elsewhere
    assert safe.first_error is None
    assert (found.isa, found.status, found.samples, found.max_abs_error) == ("haswell", "checked", 8, 0.0)


@pytest.mark.slow
def test_verify_runs_a_bundle_on_another_instruction_set(emulated, tmp_path):
    sealed(tmp_path / "b", "x86-64")  # a class that may have what this machine has: export asks no emulator
    assert CliRunner().invoke(COMMAND, [str(tmp_path / "b")]).exit_code == 0
    done = CliRunner().invoke(COMMAND, [str(tmp_path / "b"), "--isa", "Haswell", "--json"])
    assert done.exit_code == 0
    here, there = json.loads(done.stdout)["verified"]
    assert here["isa"] == "this machine"
    assert here["holds"]
    assert here["max_abs_error"] == 0
    assert there["isa"] == "haswell"
    assert there["holds"]  # though its sums leave 16 bits: the engine widens them, see below
    assert there["sqnr_db"] > 25


@pytest.mark.slow
def test_sums_that_leave_16_bits_are_widened_unless_the_file_says_that_they_fit(emulated, tmp_path):
    sealed(tmp_path / "b", "x86-64")
    path = tmp_path / "b" / "x86-64" / "model.onnx"
    made = bundle.read(tmp_path / "b")
    proto = onnx.load(path)
    proto.metadata_props.add(key=SUMS, value=SUMS_CHECKED)
    path.write_bytes(proto.SerializeToString())
    inputs, native = golden_arrays(tmp_path / "b", made.manifest.golden, made.manifest.variants[0])
    found = emulation.answers(tmp_path / "b", made.manifest.variants[0], contract_of(made), inputs=inputs, isa=HASWELL)
    assert emulation.figures_of("haswell", found, native).sqnr_db < 25


@pytest.mark.parametrize(
    ("target", "package", "least"), [("x86-64", "onnxruntime", 60), ("intel-core-ultra", "openvino", 40)]
)
def test_a_processor_without_dot_products_gives_the_same_answers(tmp_path, target, package, least):
    """On such a machine this is the thing itself; on others it shows that widening changes nothing."""
    pytest.importorskip(package)
    done = sealed(tmp_path / "b", target)
    assert done.first_error is None
    assert done.rows[0].variant.parity.sqnr_db > 40
    made = bundle.read(tmp_path / "b")
    variant, contract = made.manifest.variants[0], contract_of(made)
    inputs, native = golden_arrays(tmp_path / "b", made.manifest.golden, variant)
    with open_variant(tmp_path / "b", variant, contract, EngineOptions(threads=1, has_dot_product=False)) as session:
        found = session.run(inputs)
    assert emulation.figures_of("widened", found, native).sqnr_db > least


@pytest.mark.parametrize(("target", "isa"), [("raspberry-pi-5", "cortex-a76"), ("android-arm64", "aarch64")])
def test_another_architecture_is_said_not_to_be_verified(tmp_path, monkeypatch, target, isa):
    """Where its system is not built, and where that has no engine for the file."""
    monkeypatch.setattr(emulation, "answers", lambda *_, **__: pytest.fail("nothing runs"))
    done = sealed(tmp_path / "b", target, strong=False)
    found = done.rows[0].variant.elsewhere
    assert (found.isa, found.status) == (isa, "unverified")
    assert "the device's own trial decides" in found.reason
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "b")]).output
    assert f"{target}: on {isa}: unverified: " in shown


def test_without_an_emulator_the_manifest_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(emulation, "lacking", lambda _: "no QEMU here")
    monkeypatch.setattr(machine.Machine, "integer_dot_product", "avx512_vnni")
    found = sealed(tmp_path / "b", "x86-64-v3", strong=False).rows[0].variant.elsewhere
    assert found.status == "unverified"
    assert found.reason.startswith("no QEMU here")


def test_a_processor_like_the_target_needs_no_emulation(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.Machine, "integer_dot_product", "")
    monkeypatch.setattr(emulation, "answers", lambda *_, **__: pytest.fail("nothing runs"))
    assert sealed(tmp_path / "b", "x86-64-v3", strong=False).rows[0].variant.elsewhere is None


def variant(**fields):
    given = {"name": "a", "format": "onnx", "precision": "int8", "main": "a/m.onnx", "files": ("a/m.onnx",)}
    return Variant(**given, parity=Parity(status="checked"), **fields)


def test_the_limits_are_those_that_devices_are_granted():
    limits = variant(expected=Expected(outputs={}, min_sqnr_db=25.0, min_top1_agreement=0.85))
    for sqnr, top1, holds in ((25.0, 0.85, True), (24.9, 1.0, False), (60.0, 0.5, False), (60.0, None, True)):
        told = Elsewhere(isa="x", status="checked", sqnr_db=sqnr, top1_agreement=top1)
        assert emulation.holds(told, limits) is holds
    native = {"scores": np.array([[1.0, 2.0], [4.0, 3.0]], np.float32)}
    told = emulation.figures_of("x", {"scores": native["scores"][:, ::-1]}, native)
    assert str(told).startswith("on x: ")
    assert str(told).endswith("same top-1 0.000")
    assert (told.samples, told.top1_agreement, told.max_abs_error) == (2, 0.0, 1.0)


def test_what_cannot_run_says_why(tmp_path, monkeypatch):
    with pytest.raises(UnknownName, match="'pentium'"):
        emulation.isa_named("pentium")
    monkeypatch.setattr(emulation, "EMULATORS", ("no-such-emulator",))
    if emulation.lacking(HASWELL).startswith("QEMU"):
        assert emulation.INSTALL in emulation.lacking(HASWELL)
    with pytest.raises(HealthError):
        emulation.answers(Path(tmp_path), variant(), None, inputs={}, isa=emulation.isa_named("haswell"))
    done = CliRunner().invoke(COMMAND, [str(tmp_path), "--isa", "pentium"])
    assert done.exit_code == 2


def test_a_file_that_its_engine_refuses_is_no_success(tmp_path):
    sealed(tmp_path / "b", "x86-64")
    path = tmp_path / "b" / "x86-64" / "model.onnx"
    made = bundle.read(tmp_path / "b")
    path.write_bytes(b"no model")
    with pytest.raises(HealthError, match="does not run on this machine"):
        emulation.answers(
            tmp_path / "b",
            made.manifest.variants[0],
            contract_of(made),
            inputs={"x": np.zeros((1, 4, 6, 6))},
        )


def test_ask_is_silent_for_floats(tmp_path):
    profile = device_profiles.load("x86-64-v3")
    floats = Variant(
        name="a", format="onnx", precision="fp32", main="a/m", files=("a/m",), parity=Parity(status="checked")
    )
    assert elsewhere.ask(profile, floats, {}, folder=tmp_path, reference=None) is None


@pytest.mark.parametrize(
    ("dot_product", "emulator", "says"), [("avx_vnni", False, False), ("avx_vnni", True, True), ("", False, True)]
)
def test_a_file_says_that_its_sums_fit_only_where_somebody_looked(tmp_path, monkeypatch, dot_product, emulator, says):
    monkeypatch.setattr(machine.Machine, "integer_dot_product", dot_product)
    monkeypatch.setattr(emulation, "lacking", lambda _: "" if emulator else "no QEMU here")
    monkeypatch.setattr(elsewhere, "ask", lambda *_, **__: None)
    done = sealed(tmp_path / "b", "x86-64-v3", "x86-64-v3")
    assert done.first_error is None
    proto = onnx.load(tmp_path / "b" / done.rows[0].variant.main)
    assert ((SUMS, SUMS_CHECKED) in {(one.key, one.value) for one in proto.metadata_props}) is says
