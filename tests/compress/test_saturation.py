"""Sums of two products that leave 16 bits: counted as the instruction cuts them, and gone with 7 bits."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import digits
from fakes.planted import bright_inputs

from edgekit import device_profiles
from edgekit.compress import saturation
from edgekit.compress.passes.quantize import Quantize
from edgekit.errors import UnknownName
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


def test_the_layer_that_saturates_is_found_and_gets_seven_bits():
    model = Quantize(target="x86-64-v3").apply(bright_inputs(strong=True), silent)
    assert {name: rule.bits for name, rule in model.plan.weights.items()} == {"0.weight": 7, "2.weight": 8}
    measured = model.lineage[-1].measured
    assert measured["saturating_layers"] == 1
    assert measured["saturated 0.weight"] > 0.3
    assert measured["saturation_sqnr_db"] < 15
    assert model.precision == "int8"
    again = saturation.saturations(model, model.data.calibration, silent)
    assert [(one.share, one.is_cut) for one in again if one.weight == "0.weight"] == [(0.0, False)]


def test_nothing_is_narrowed_where_nothing_saturates_or_the_processor_adds_in_32_bits():
    calm = Quantize(target="x86-64-v3").apply(bright_inputs(strong=False), silent)
    assert calm.lineage[-1].measured["saturating_layers"] == 0
    for target in ("", "x86-64-vnni", "raspberry-pi-5", "jetson-orin-nano"):
        model = Quantize(target=target).apply(bright_inputs(strong=True), silent)
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
    model = Quantize(activations="dynamic", target="x86-64-v3").apply(bright_inputs(strong=True), silent)
    assert model.plan.weights["0.weight"].bits == 7
    weights_only = replace(model, plan=Quantize(activations="none").apply(bright_inputs(strong=True), silent).plan)
    assert saturation.saturations(weights_only, model.data.calibration, silent) == ()
