"""Sums of two products that leave 16 bits: counted as the instruction cuts them, and gone with 7 bits."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import digits

from edgekit import device_profiles, plugins, workload
from edgekit.compress import saturation
from edgekit.compress.passes.quantize import Quantize
from edgekit.errors import UnknownName
from edgekit.export import PACKAGE
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")


def vpmaddubsw(unsigned, signed):
    """Multiply as the instruction does, in plain Python: what each pair gives, and what it would without cutting."""
    cut, exact = [], []
    for k in range(0, len(unsigned), 2):
        whole = sum(int(a) * int(b) for a, b in zip(unsigned[k : k + 2], signed[k : k + 2], strict=True))
        exact.append(whole)
        cut.append(min(max(whole, -32768), 32767))
    return cut, exact


@pytest.mark.parametrize("width", [1, 6, 7])
def test_pairs_are_cut_as_the_instruction_cuts_them(width):
    rng = np.random.default_rng(width)
    rows = rng.integers(200, 256, (9, width))
    weight = rng.integers(-127, 128, (5, width))
    weight[0] = 127
    count, lost, reach = saturation._pairs(torch.from_numpy(rows).int(), torch.from_numpy(weight).int())
    found = {(r, o): vpmaddubsw(rows[r], weight[o]) for r in range(9) for o in range(5)}
    assert count == sum(c != e for cut, exact in found.values() for c, e in zip(cut, exact, strict=True))
    for (row, output), (cut, exact) in found.items():
        assert lost[row, output] == sum(exact) - sum(cut)
    if width > 1:
        assert count > 0
        assert reach == pytest.approx(max(abs(e) for _, exact in found.values() for e in exact) / 32767)


def planted(strong):
    """Return two convolutions with bright inputs; ``strong`` weights are all of one sign, so that pairs add up."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        for part, is_strong in ((net[0], strong), (net[2], False)):
            part.weight.copy_(torch.rand_like(part.weight) * 0.2 + 0.9 if is_strong else torch.randn_like(part.weight))
            if not is_strong:  # one large weight a channel: the others are small integers
                part.weight.mul_(0.001)
                part.weight[:, 0, 0, 0] = 1.0
    images = np.random.default_rng(0).uniform(0.8, 1.0, (16, 4, 6, 6)).astype(np.float32)
    return workload.from_module("planted", net.eval(), Data(Split({"image": images})))


def test_the_layer_that_saturates_is_found_and_gets_seven_bits():
    model = Quantize(target="x86-64-v3").apply(planted(strong=True), silent)
    assert {name: rule.bits for name, rule in model.plan.weights.items()} == {"0.weight": 7, "2.weight": 8}
    measured = model.lineage[-1].measured
    assert measured["saturating_layers"] == 1
    assert measured["saturated 0.weight"] > 0.3
    assert measured["saturation_sqnr_db"] < 15
    assert model.precision == "int8"
    again = saturation.saturations(model, model.data.calibration, silent)
    assert [(one.share, one.is_cut) for one in again if one.weight == "0.weight"] == [(0.0, False)]


def test_nothing_is_narrowed_where_nothing_saturates_or_the_processor_adds_in_32_bits():
    calm = Quantize(target="x86-64-v3").apply(planted(strong=False), silent)
    assert calm.lineage[-1].measured["saturating_layers"] == 0
    for target in ("", "x86-64-vnni", "raspberry-pi-5", "jetson-orin-nano"):
        model = Quantize(target=target).apply(planted(strong=True), silent)
        assert {rule.bits for rule in model.plan.weights.values()} == {8}
        assert "saturating_layers" not in model.lineage[-1].measured


def test_signed_activations_need_no_narrow_weights(tmp_path):
    profile = device_profiles.load("x86-64-v3")
    assert saturation.may_saturate(profile)
    text = (device_profiles._files()["x86-64-v3"]).read_text().replace('"uint8"', '"int8"')
    (tmp_path / "signed.toml").write_text(text)
    assert not saturation.may_saturate(device_profiles.load(str(tmp_path / "signed.toml")))


def test_an_unknown_hardware_class_is_refused_before_anything_is_watched():
    with pytest.raises(UnknownName, match="x86-64-v9"):
        Quantize(target="x86-64-v9").apply(digits.model(), silent)


def test_seven_bits_keep_the_accuracy_of_digits():
    from edgekit.compress import evaluate
    from edgekit.compress.simulation import planned_network

    model = digits.model()
    narrow = Quantize(bits=7).apply(model, silent)
    before = evaluate.top1(model.network, model.data.test)
    assert evaluate.top1(planned_network(narrow), model.data.test) > before - 0.01


def test_dynamic_plans_are_looked_at_too():
    model = Quantize(activations="dynamic", target="x86-64-v3").apply(planted(strong=True), silent)
    assert model.plan.weights["0.weight"].bits == 7
    weights_only = replace(model, plan=Quantize(activations="none").apply(planted(strong=True), silent).plan)
    assert saturation.saturations(weights_only, model.data.calibration, silent) == ()


SCORE = """
import sys
sys.path[:0] = {path!r}
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
images = np.load({images!r})
for file in {files!r}:
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    np.save(file + sys.argv[1], session.run(None, {{session.get_inputs()[0].name: images}})[0])
"""


def answers(folder, files, images, *emulator):
    """Run files in a Python of its own, on this processor or on the one that an emulator plays."""
    np.save(folder / "images.npy", images)
    path = [entry for entry in sys.path if entry]
    script = folder / "score.py"
    script.write_text(SCORE.format(path=path, images=str(folder / "images.npy"), files=[str(f) for f in files]))
    python = Path(sys.executable).resolve()
    suffix = ".there.npy" if emulator else ".here.npy"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [*emulator, str(python), str(script), suffix]
    subprocess.run(line, check=True, capture_output=True, env=environment, timeout=240)
    return [np.load(f"{file}{suffix}") for file in files]


@pytest.mark.slow
def test_on_a_processor_without_vnni_the_safe_file_computes_the_same_and_the_other_does_not(tmp_path):
    emulator = shutil.which("qemu-x86_64-static")
    if emulator is None:
        pytest.skip("qemu-x86_64-static is not installed (Debian: qemu-user-static)")
    if not {"avx512_vnni", "avx_vnni"} & set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("this processor has no VNNI to compare with")
    model = planted(strong=True)
    files = []
    for target in ("", "x86-64-v3"):
        folder = tmp_path / (target or "careless")
        folder.mkdir()
        made = Quantize(target=target).apply(model, silent)
        written = plugins.load(PACKAGE, "onnx", "format").export(
            made, device_profiles.load("x86-64-v3"), folder, silent
        )
        files.append(folder / written.main)
    (images,) = model.data.calibration.inputs.values()
    careless, safe = answers(tmp_path, files, images)
    careless_there, safe_there = answers(tmp_path, files, images, emulator, "-cpu", "Haswell")
    assert np.array_equal(safe, safe_there)
    assert np.abs(careless - careless_there).max() > 0.1 * np.abs(careless).max()
