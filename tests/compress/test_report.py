"""What the report tells beyond figures: where rounding hurts, what the target cuts off, which mistakes are new."""

import copy
import gc
import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest
from fakes import digits

from edgekit import grid, workload
from edgekit.compress import compress, diagnosis, drawings, output, recipe, report
from edgekit.compress.budget import Budget, Reached
from edgekit.compress.ladder import Climb, Try
from edgekit.compress.latency import Compared
from edgekit.compress.origin import origin_of, sources_of
from edgekit.compress.outcome import Floats, Stages, outcome_of
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.recipe import Recipe
from edgekit.model import Data, Split
from edgekit.plan import Range
from edgekit.progress import silent

torch = pytest.importorskip("torch")


def outcome_by(model, passes, speed=None):
    """Compress a model by a recipe and join the figures."""
    stages = Stages(model, speed, "told" if speed else "not measured")
    compressed = compress(model, passes, follow=stages.seen)
    return outcome_of(model, compressed, (passes, origin_of(model, passes, sources_of("model"))), stages)


def shipped(name):
    return recipe.read(Path(name))


def facts(outcome):
    return diagnosis.layer_facts(outcome.compressed, outcome.floats)


@pytest.mark.parametrize("name", ["w4-channel-gptq", "w4-g128-awq", "w4-g64-hqq", "w4a8-gptq"])
def test_what_rounding_does_to_each_layer_is_drawn_where_a_pass_chose_the_integers_too(name):
    outcome = outcome_by(digits.model(), shipped(name))
    found = facts(outcome)
    assert len(found) == 7
    assert all(15 < layer.sqnr < 60 for layer in found)
    page = report.page(outcome, "0")
    assert "Sensitivity: the output of each layer" in page
    for layer in found:
        assert f"{layer.sqnr:.1f} dB, 4 bit" in page


def test_integers_that_make_up_for_each_other_hurt_less_than_the_nearest_ones():
    outcome = outcome_by(digits.model(), shipped("w4-channel-gptq"))
    nearest = diagnosis.layer_facts(outcome.floats, outcome.floats)
    assert [layer.name for layer in nearest] == [layer.name for layer in facts(outcome)]
    assert all(own.sqnr > other.sqnr for own, other in zip(facts(outcome), nearest, strict=True))


def one_layer(activations):
    """Return what a linear layer takes, and its outcome with weights of 4 bits."""
    torch.manual_seed(0)
    samples = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    model = workload.from_module("one", torch.nn.Sequential(torch.nn.Linear(6, 4)).eval(), Data(Split({"x": samples})))
    return samples, outcome_by(model, Recipe((("quantize", Quantize(bits=4, activations=activations)),)))


def changed(model, change):
    """Return a model with a copy of its module, changed."""
    module = copy.deepcopy(model.network.module)
    with torch.no_grad():
        change(module)
    return replace(model, network=replace(model.network, module=module))


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_the_bar_of_a_layer_is_its_output_over_what_weight_input_and_bias_change_of_it(activations, shift):
    samples, outcome = one_layer(activations)
    weight = outcome.original.network.module[0].weight.detach().numpy()
    taken = samples
    if activations != "none":
        own = grid.activation_grid(Range(float(samples.min()), float(samples.max())))
        taken = (np.clip(np.round(samples / own.scale) + own.zero, own.lowest, own.highest) - own.zero) * own.scale
    rule = outcome.compressed.plan.weights["0.weight"]
    exact, found = samples @ weight.T, taken @ grid.rounded(weight, rule).T + shift
    expected = 10 * math.log10((exact**2).sum() / ((found - exact) ** 2).sum())
    moved = changed(outcome.compressed, lambda module: module[0].bias.add_(shift))
    assert diagnosis.layer_facts(moved, outcome.floats)[0].sqnr == pytest.approx(expected, abs=0.02)


def test_the_layer_with_the_fewest_bits_has_the_shortest_bar():
    outcome = outcome_by(digits.model(), shipped("int8"))
    plan = outcome.compressed.plan
    rules = {**plan.weights, "down.weight": msgspec.structs.replace(plan.weights["down.weight"], bits=2, scales=b"")}
    coarse = replace(outcome.compressed, plan=msgspec.structs.replace(plan, weights=rules))
    worst = min(diagnosis.layer_facts(coarse, outcome.floats), key=lambda layer: layer.sqnr)
    assert (worst.name, worst.bits) == ("down.weight", 2)


def test_factors_that_went_from_one_layer_into_the_next_are_no_damage():
    passes = Recipe((("quantize", Quantize(activations="none")),))
    outcome = outcome_by(digits.model(), passes)
    factors = torch.linspace(0.5, 2.0, 24)[:, None, None]

    def balance(module):
        block = module.near[0]
        block.first.weight.mul_(factors[..., None])
        block.first.bias.mul_(factors[:, 0, 0])
        block.second.weight.div_(factors)

    plan = outcome.compressed.plan
    rules = {name: msgspec.structs.replace(rule, scales=b"") for name, rule in plan.weights.items()}
    moved = changed(replace(outcome.compressed, plan=msgspec.structs.replace(plan, weights=rules)), balance)
    before, after = facts(outcome), diagnosis.layer_facts(moved, outcome.floats)
    for one, two in zip(before, after, strict=True):
        assert two.sqnr > one.sqnr - 8  # weights that were made larger take integers from the others
    assert after[1].sqnr == pytest.approx(before[1].sqnr, abs=0.5)


def test_where_nobody_knows_what_the_weights_were_their_bits_are_told_without_bars():
    outcome = outcome_by(digits.model(), shipped("w4-channel-gptq"))
    page = report.page(replace(outcome, floats=None), "0")
    assert "Sensitivity" not in page
    assert "<td>down.weight</td><td>4</td>" in page


def test_bars_below_zero_and_of_sixty_layers_are_drawn():
    svg = drawings.bars({f"layer{i}": i - 5.0 for i in range(60)}, "dB")
    ET.fromstring(svg)  # noqa: S314  # what we wrote ourselves
    assert svg.count("layer") == 60


def bright(strong):
    """Return two convolutions of bright pictures; where the first is ``strong``, its products add up."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[2].weight.mul_(0.001)[:, 0] = 1.0  # one large weight a channel: the others are small integers
        net[0].weight.copy_(torch.rand_like(net[0].weight) * 0.2 + 0.9 if strong else net[0].weight * 0.001)
        net[0].weight[:, 0, 0, 0] = 1.0
    images = np.random.default_rng(0).uniform(0.8, 1.0, (16, 4, 6, 6)).astype(np.float32)
    return workload.from_module("bright", net.eval(), Data(Split({"image": images})))


def test_what_the_target_would_have_cut_off_is_said_in_report_card_and_figures(tmp_path):
    passes = Recipe((("quantize", Quantize(target="x86-64-v3")),))
    outcome = outcome_by(bright(strong=True), passes)
    (note,) = outcome.notes
    share = outcome.compressed.lineage[-1].measured["saturated 0.weight"]
    assert "x86-64-v3 adds products of integers in 16 bits" in note
    assert f"0.weight ({100 * share:.2g} % of its sums)" in note
    assert "these layers got 7 bits" in note
    assert "2.weight" not in note
    assert not outcome.warnings  # it is mended
    output.write(outcome, tmp_path / "out")
    for name in ("report.html", "MODEL_CARD.md"):
        assert "0.weight (" in (tmp_path / "out" / name).read_text()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"] == [note]


def test_nothing_is_said_of_cut_off_sums_where_there_are_none():
    passes = Recipe((("quantize", Quantize(target="x86-64-v3")),))
    assert outcome_by(bright(strong=False), passes).notes == ()
    assert outcome_by(bright(strong=True), Recipe((("quantize", Quantize()),))).notes == ()


def tried(rung, *, drop, seconds=None):
    """Return a try that was weighed, or one that was not begun."""
    reached = None if drop is None else Reached(drop=drop, value=1 - drop / 100, bytes=100, latency=seconds)
    return Try(rung=rung, recipe=recipe.default(), seconds=1.0, reached=reached, note="" if reached else "too slow")


def climb_of(model, *tries):
    return Climb(budget=Budget(max_drop=1.0), tries=tries, best=tries[-1], model=model, broke=(), left=(), seconds=1.0)


def test_the_tries_of_a_search_stand_beside_the_kept_one_in_milliseconds_of_this_machine():
    model = digits.quantized()
    climb = climb_of(
        model,
        tried("fold", drop=3.0, seconds=0.5),
        tried("gptq", drop=None),
        tried("equalize", drop=2.0, seconds=0.4),
        tried("qat", drop=0.0, seconds=0.2),
    )
    stages = Stages(digits.model(), lambda _: Compared(9.0, 2.0), "told")
    stages.climbed(climb, model)
    assert [(stage.name, stage.ms) for stage in stages.found[1:]] == [
        ("fold", pytest.approx(5.0)),  # the target is 100 times as slow as this machine
        ("equalize", pytest.approx(4.0)),
        ("qat (kept)", pytest.approx(2.0)),
    ]
    assert stages.note == "told"


def test_without_a_stopwatch_the_tries_have_the_milliseconds_of_the_search():
    model = digits.quantized()
    climb = climb_of(model, tried("fold", drop=3.0, seconds=0.5), tried("qat", drop=0.0, seconds=0.2))
    stages = Stages(digits.model(), None, "not measured")
    stages.climbed(climb, model)
    assert [stage.ms for stage in stages.found] == [None, pytest.approx(500.0), pytest.approx(200.0)]
    assert "the milliseconds of the tries are the target's" in stages.note


def test_what_a_plan_was_made_for_is_remembered_as_long_as_somebody_holds_the_candidate():
    floats = Floats()
    work = floats.remembering(lambda model, passes, progress, follow: compress(model, passes, progress, follow=follow))
    made = work(digits.model(), shipped("w4-channel-gptq"), silent)
    assert [step.name for step in floats.of(made).lineage] == ["load", "quantize"]
    other = work(digits.model(), recipe.default(), silent)
    assert floats.of(other) is other  # its weights are float yet
    assert len(floats._found) == 1
    del made
    gc.collect()
    assert floats._found == {}


def classes(count, told):
    """Return a network that tells sample i, of class i modulo ``count``, as ``told(i)``."""
    scores = np.eye(count, dtype=np.float32)[[told(i) for i in range(2 * count)]]
    module = torch.nn.Sequential(torch.nn.Linear(2 * count, count, bias=False)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.from_numpy(scores.T))
    split = Split({"x": np.eye(2 * count, dtype=np.float32)}, np.arange(2 * count) % count)
    names = tuple(f"<kind {i}>" for i in range(count))
    return workload.from_module("many", module, Data(split, validation=split, labels=names))


def test_of_many_classes_the_mistakes_that_changed_most_are_told_in_a_table():
    before = classes(50, lambda i: i % 50)
    after = classes(50, lambda i: 7 if i % 50 == 3 else 9 if 60 <= i < 90 else i % 50)
    passes = recipe.default()
    bare = outcome_of(before, after, (passes, origin_of(before, passes, sources_of("m"))), Stages(before))
    found = diagnosis.confusion(before, after)
    assert found.change is None
    assert found.moved[0] == ("<kind 3>", "<kind 7>", 0, 2)
    assert len(found.moved) == 31
    page = report.page(bare, "0")
    assert "50 classes are too many for a plot" in page
    assert "31 kinds of mistake became more or less frequent; these are the 20 that changed most" in page
    row = "<tr><td>&lt;kind 3&gt;</td><td>&lt;kind 7&gt;</td><td>0</td><td>2</td><td>+2</td></tr>"
    assert row in page
    assert page.count("<td>&lt;kind 9&gt;</td><td>0</td><td>1</td><td>+1</td></tr>") == 19


def test_labels_that_lie_on_each_other_in_a_plot_become_one():
    points = [
        ("load", 9.0, 1.0),
        ("fold", 2.0, 0.5),
        ("observers", 1.0, 0.9),
        ("observers", 1.0, 0.9),
        ("last", 1, 0.9),
    ]
    svg = drawings.trade(points, "KiB", "score")
    ET.fromstring(svg)  # noqa: S314  # what we wrote ourselves
    assert "observers x2, last" in svg
    assert svg.count("observers") == 1


def test_a_machine_is_told_with_the_names_of_its_parts():
    page = report.page(outcome_by(digits.model(), recipe.default()), "0")
    assert "system " in page
    assert "threads " in page
