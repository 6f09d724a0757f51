"""Mixed precision: the best choice under a budget, proved against every other one, and honest where there is none."""

import itertools
import json
import math
from dataclasses import replace

import msgspec
import pytest
from fakes import digits
from fakes.planted import bright_inputs

from edgekit import workload
from edgekit.compress import compress, evaluate, recipe
from edgekit.compress.feedback import alone
from edgekit.compress.passes.mixed_precision import Budget, MixedPrecision, choose
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.sensitivity import How, Sensitivity, sensitivities
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError, UsageError
from edgekit.manifest import Step
from edgekit.progress import silent

pytest.importorskip("torch")
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def planned():
    return Quantize(bits=4, activations="none", weights="mse").apply(digits.model(), silent)


def mixed(model, **options):
    return MixedPrecision(**options).apply(model, silent)


def widths(model):
    return {name: rule.bits for name, rule in model.plan.weights.items()}


@pytest.fixture(scope="module")
def table(planned):
    return sensitivities(planned, planned.data.calibration.head(16), (8, 4, 2))


def times(table):
    return {(entry.name, entry.bits): float(entry.macs * entry.bits) for entry in table}


def every_choice(table):
    names = dict.fromkeys(entry.name for entry in table)
    return itertools.product(*[[entry for entry in table if entry.name == name] for name in names])


def total(choice, key):
    return sum(getattr(entry, key) for entry in choice)


def test_what_gptq_makes_of_a_layer_does_less_damage_and_less_of_all_where_mixed(planned):
    samples = planned.data.calibration.head(64)
    nearest, solved = (
        {entry.name: entry.damage for entry in sensitivities(planned, samples, (3,), how=how)}
        for how in (How(), How(rounds=alone))
    )
    assert sum(solved.values()) < 0.5 * sum(nearest.values())
    made = {kind: mixed(planned, widths=(8, 3), bits=4.5, rounding=kind) for kind in ("nearest", "gptq")}
    told = {kind: one.lineage[-1].measured["damage"] for kind, one in made.items()}
    assert told["gptq"] < told["nearest"]
    assert made["gptq"].lineage[-1].measured["mean_bits"] <= 4.5


@pytest.mark.parametrize("size", [17_000, 23_000, 37_000, 50_000])
def test_no_other_choice_of_that_size_does_less_damage(table, size):
    best = min(total(c, "damage") for c in every_choice(table) if total(c, "bytes") <= size)
    chosen = tuple(choose(table, Budget(size, None), times(table)).values())
    assert total(chosen, "bytes") <= size
    assert total(chosen, "damage") == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("damage", [1e-3, 0.05, 1.0])
def test_no_other_choice_of_that_damage_is_smaller(table, damage):
    best = min(total(c, "bytes") for c in every_choice(table) if total(c, "damage") <= damage)
    chosen = tuple(choose(table, Budget(None, damage), times(table)).values())
    assert total(chosen, "damage") <= damage * (1 + 1e-6)
    assert total(chosen, "bytes") == best


def test_a_share_of_the_time_makes_the_costly_layers_narrow(table):
    chosen = tuple(choose(table, Budget(60_000, None, 0.5), times(table)).values())
    slowest = sum(entry.macs * 8 for entry in table if entry.bits == 8)
    assert sum(entry.macs * entry.bits for entry in chosen) <= 0.5 * slowest * (1 + 1e-6)
    best = min(
        total(c, "damage")
        for c in every_choice(table)
        if total(c, "bytes") <= 60_000 and sum(e.macs * e.bits for e in c) <= 0.5 * slowest
    )
    assert total(chosen, "damage") == pytest.approx(best, rel=1e-4)


def test_damages_as_small_as_rounding_noise_are_still_told_apart():
    table = [
        Sensitivity(name=name, bits=bits, damage=damage * 1e-12, bytes=size, macs=1, weights=8)
        for name, bits, damage, size in [("a", 8, 1, 8), ("a", 4, 9, 4), ("b", 8, 1, 8), ("b", 4, 5, 4)]
    ]
    chosen = choose(table, Budget(12, None), times(table))
    assert {name: entry.bits for name, entry in chosen.items()} == {"a": 8, "b": 4}


def test_five_bits_keep_more_accuracy_than_three_and_two_bits_everywhere(planned):
    result = mixed(planned, bits=3.0, widths=(8, 4, 2))
    size = sum(evaluate.grid.stored_bytes(tuple(planned.network.module.state_dict()[n].shape), r)
               for n, r in result.plan.weights.items())  # fmt: skip
    count = sum(math.prod(planned.network.module.state_dict()[name].shape) for name in planned.plan.weights)
    assert 8 * size / count <= 3.0
    assert result.lineage[-1].measured["mean_bits"] == pytest.approx(8 * size / count)
    assert result.precision == "mixed-weights"
    validation = planned.data.validation
    flat = Quantize(bits=2, activations="none", weights="mse").apply(digits.model(), silent)
    assert evaluate.top1(planned_network(result), validation) > evaluate.top1(planned_network(flat), validation) + 0.3


def test_weights_that_keep_their_width_keep_their_scales_and_nothing_else_changes(planned):
    result = mixed(planned, bits=5.0)
    assert set(widths(result).values()) == {4, 8}
    for name, rule in result.plan.weights.items():
        assert rule.scales, "later passes need explicit scales"
        assert rule.bits == 8 or rule == planned.plan.weights[name]
    assert list(result.plan.weights) == list(planned.plan.weights)
    assert result.plan.activations == planned.plan.activations
    assert set(widths(planned).values()) == {4}, "the model that came in is untouched"


def test_some_weights_may_stay_float():
    model = digits.quantized()
    result = mixed(model, damage=1e-5, widths=(32, 8))
    assert 0 < len(result.plan.weights) < len(model.plan.weights)
    assert result.lineage[-1].measured["weights_32bit"] > 0
    with pytest.raises(CompressionError, match="leaves every weight of digits float"):
        mixed(model, damage=1e-9, widths=(32, 8))


def test_an_onnx_file_is_mixed_like_its_pytorch_twin(planned):
    file = workload.load(str(digits.onnx_file()), None, planned.data)
    file = Quantize(bits=4, activations="none", weights="mse").apply(file, silent)
    assert widths(mixed(file, bits=5.0)) == widths(mixed(planned, bits=5.0))


def test_measured_times_decide_where_they_are_given(planned, table, tmp_path):
    path = tmp_path / "times.json"
    slow = {"far.0.first.weight": 5.0}
    path.write_text(json.dumps({e.name: {"8": slow.get(e.name, 0.0), "4": 0.0} for e in table}))
    result = mixed(planned, bits=8.5, time=0.5, times=str(path))
    assert [name for name, bits in widths(result).items() if bits == 4] == ["far.0.first.weight"]
    path.write_text('{"stem.weight": {"8": 1.0}}')
    with pytest.raises(UsageError, match=r"lacks the time of"):
        mixed(planned, bits=5.0, times=str(path))
    path.write_text("no")
    with pytest.raises(UsageError, match=r"holds no times"):
        mixed(planned, bits=5.0, times=str(path))


def test_a_budget_out_of_reach_names_the_least(planned):
    with pytest.raises(CompressionError, match=r"the least are 32356 bytes \(4\.11 bits a weight\)") as caught:
        mixed(planned, bits=4.0)
    assert "narrower width" in caught.value.hint
    with pytest.raises(CompressionError, match=r"stays within damage 1e-09 .* damage \d\.\d+e-05") as caught:
        mixed(planned, damage=1e-9)
    assert "wider width" in caught.value.hint
    with pytest.raises(CompressionError, match=r"10% of the time: .* and 50% of the time"):
        mixed(planned, bits=8.5, time=0.1)


def test_its_recipe_says_the_same_again_and_its_step_is_what_a_manifest_holds():
    text = (digits.EXAMPLES / "recipes/mixed-4-8.toml").read_text()
    assert recipe.decode(recipe.encode(recipe.decode(text))) == recipe.decode(text)
    step = compress(digits.model(), recipe.decode(text)).lineage[-1]
    read_back = msgspec.json.decode(msgspec.json.encode(step), type=Step)
    assert (read_back.options["widths"], read_back.options["size"]) == ((8, 4), 0)
    assert step.measured["mean_bits"] <= step.options["bits"] == 5.0


def test_without_plan_data_or_one_budget_it_says_what_to_do(planned):
    with pytest.raises(CompressionError, match="no plan") as caught:
        mixed(digits.model(), bits=5.0)
    assert "put quantize before" in caught.value.hint
    with pytest.raises(CompressionError, match="no calibration data"):
        mixed(replace(planned, data=None), bits=5.0)
    for budgets in ({}, {"bits": 5.0, "size": 30_000}):
        with pytest.raises(CompressionError, match="takes one budget"):
            mixed(planned, **budgets)


def test_a_layer_that_got_seven_bits_lest_its_sums_saturate_never_gets_eight():
    model = Quantize(target="x86-64-v3").apply(bright_inputs(strong=True), silent)
    assert widths(model) == {"0.weight": 7, "2.weight": 8}
    roomy = mixed(model, widths=(8, 4), bits=12)
    assert roomy.plan == model.plan, "8 bits everywhere are what quantize has chosen"
    measured = roomy.lineage[-1].measured
    assert {name: n for name, n in measured.items() if name.startswith("weights_")} == {
        "weights_7bit": 8 * 4 * 9,
        "weights_8bit": 4 * 8,
    }
    assert widths(mixed(model, widths=(4,), bits=9)) == {"0.weight": 4, "2.weight": 4}
    plain = Quantize(bits=7).apply(bright_inputs(strong=True), silent)
    assert set(widths(mixed(plain, widths=(8, 4), bits=12)).values()) == {8}, "seven bits by choice may become eight"
