"""The ladder: it finds the layer that breaks a plan and the rung that mends it, and keeps to its budgets and time."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits, planted

from edgekit import device_profiles
from edgekit.compress import compress, rungs
from edgekit.compress.blame import blame, cut_off
from edgekit.compress.budget import Budget
from edgekit.compress.estimate import TRAINED, Pace, pace
from edgekit.compress.ladder import Ladder
from edgekit.compress.weighing import Scales
from edgekit.errors import CompressionError, UsageError
from edgekit.model import Data, Split
from edgekit.progress import silent

pytest.importorskip("torch")

FAST = Pace(sample=1e-4, graph=0.1, layers=7, calibration=48, train=1001, validation=160)


class Workshop:
    """Runs recipes and remembers which passes it ran."""

    def __init__(self, clock=None, costs=None):
        self.recipes, self.clock, self.costs = [], clock, costs or {}

    def __call__(self, model, recipe, progress):
        names = [name for name, _ in recipe.passes]
        self.recipes.append(names)
        if self.clock:
            self.clock.now += sum(self.costs.get(name, 0.0) for name in names)
        return compress(model, recipe, progress)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def ladder(model, work=None, *, target="raspberry-pi-5", only=None, **settings):
    budget = Budget(**{"max_drop": 0.5, **settings.pop("budget", {})})
    scales = Scales(model, "top1", None, device_profiles.load(target))
    situation = rungs.situation(model, budget, target)
    offered = [rung for rung in rungs.offered(situation) if only is None or rung.name in only]
    return Ladder(
        **{
            "situation": situation,
            "rungs": offered,
            "work": work or Workshop(),
            "weigh": scales.weigh,
            "diagnose": lambda candidate: (
                *cut_off(scales.saturations(candidate)),
                *blame(candidate, scales.fidelity, silent),
            ),
            "pace": FAST,
            "clock": Clock(),
            **settings,
        }
    )


def test_a_sound_network_ends_on_the_first_rung():
    work = Workshop()
    climb = ladder(planted.sound(), work).climb()
    assert work.recipes == [["quantize"]]
    assert climb.misses == {}
    assert (climb.best.rung, climb.broke, len(climb.tries)) == ("fold", (), 1)
    assert climb.model.plan.bits == 8


def test_a_wide_channel_is_found_and_evened_out():
    work = Workshop()
    climb = ladder(planted.with_a_wide_channel(), work).climb()
    first, *_, last = climb.tries
    assert first.reached.drop > 10
    worst = climb.broke[0]
    assert (worst.layer, worst.cause, worst.channel) == ("near.0.second.weight", "input channels", planted.CHANNEL)
    assert worst.spread == pytest.approx(300, rel=0.2)
    assert "channel 3 of its input relu_1" in worst.told
    assert (climb.misses, climb.best, last.rung) == ({}, last, "equalize")
    assert work.recipes[1] == ["equalize", "quantize"]  # at once, before the observers that stand before it
    assert last.reached.fidelity > first.reached.fidelity + 20


def test_an_outlier_is_found_and_another_observer_leaves_it_out():
    climb = ladder(planted.with_an_outlier()).climb()
    first, *_, last = climb.tries
    assert first.reached.drop > 2
    worst = climb.broke[0]
    assert (worst.layer, worst.source, worst.cause) == ("stem.weight", "image", "input outlier")
    assert worst.outlier == pytest.approx(150, rel=0.01)
    assert (climb.misses, last.rung) == ({}, "observers")
    assert climb.model.plan.observer != "minmax"
    assert climb.model.plan.activations["image"].high < 100


def test_a_layer_that_saturates_without_a_dot_product_is_found_and_gets_seven_bits():
    model = planted.with_a_saturating_layer()
    image = model.data.validation.inputs
    np.testing.assert_allclose(
        model.network.run(image)["scores"], planted.sound().network.run(image)["scores"], atol=1e-4
    )
    climb = ladder(model, target="x86-64-v3").climb()
    first, last = climb.tries
    assert first.reached.saturated > 0
    worst = climb.broke[0]
    assert (worst.layer, worst.cause) == ("inner.stem.weight", "saturation")
    assert "leave 16 bits on the target" in worst.told
    assert (climb.misses, last.rung, last.reached.saturated) == ({}, "seven-bits", 0.0)
    assert climb.model.plan.weights["inner.stem.weight"].bits == 7
    assert {rule.bits for rule in climb.model.plan.weights.values()} == {7, 8}  # and no other than those that need it


def test_with_a_dot_product_the_same_layer_is_nobodys_fault():
    climb = ladder(planted.with_a_saturating_layer(), target="x86-64-vnni").climb()
    assert ([t.rung for t in climb.tries], climb.misses, climb.broke) == (["fold"], {}, ())


def test_a_sound_layer_is_not_blamed_for_what_another_one_did():
    model = compress(planted.with_a_wide_channel(), rungs.Settings().put("quantize").recipe())
    found = blame(model, Scales(planted.with_a_wide_channel(), "top1").fidelity, silent)
    assert found[0].layer == "near.0.second.weight"
    assert found[0].won > 10
    assert all(other.won < 1 and other.cause in ("weights", "input") for other in found[1:])


def test_a_float_model_has_nobody_to_blame():
    assert blame(planted.sound(), lambda model: 0.0, silent) == ()


def test_a_size_that_nothing_reaches_ends_early_and_keeps_the_best():
    work = Workshop()
    model = planted.sound()
    bare = replace(model, data=replace(model.data, train=None))  # nothing to train on, so nothing can be cut off
    climb = ladder(bare, work, budget={"max_drop": 5.0, "size": 1000}).climb()
    assert work.recipes == [["quantize"]]  # four bits at once, and no rung that could only mend the loss
    assert climb.misses.keys() == {"size"}
    assert climb.model.plan.bits == 4
    assert climb.tries[1].note == "cannot help: size missed"


def test_what_is_too_large_for_four_bits_is_cut_and_trained():
    model = planted.sound()
    model = replace(model, data=replace(model.data, train=model.data.train.head(400)))
    work = Workshop()
    climb = ladder(model, work, budget={"max_drop": 100.0, "size": 20_000}, only=("fold", "prune")).climb()
    assert work.recipes[:2] == [["quantize"], ["prune", "quantize"]]
    assert climb.misses == {}
    assert all(t.reached.bytes > 20_000 for t in climb.tries[:-1])
    assert 10_000 < climb.best.reached.bytes <= 20_000
    assert climb.best.reached.value > 0.8


def test_points_that_a_cut_loses_are_mended_even_where_the_uncut_candidate_ranks_first():
    model = planted.sound()
    model = replace(model, data=replace(model.data, train=model.data.train.head(200)))
    work = Workshop()
    budget = {"max_drop": 2.0, "size": 8_000}  # half as many channels lose nothing: what stays makes up for them
    ladder(model, work, budget=budget, only=("fold", "prune", "bias-correction")).climb()
    assert work.recipes[-1] == ["prune", "quantize", "bias_correction"]


def test_room_that_four_bits_leave_goes_to_the_layers_that_need_it():
    model = planted.with_a_wide_channel(16.0)  # what four bits do not hold, however well the network was trained
    four = ladder(model, budget={"max_drop": 0.0, "size": 45_000}, only=("fold",))
    lost = four.climb().tries[0].reached.drop
    assert lost > 0  # one sample or two: another processor trains another network
    budget = {"max_drop": lost - 0.5, "size": 45_000}
    climb = ladder(model, budget=budget, only=("fold", "mixed-precision")).climb()
    first, last = climb.tries
    assert first.reached.drop == lost
    assert (climb.misses, last.rung) == ({}, "mixed-precision")
    assert {rule.bits for rule in climb.model.plan.weights.values()} == {4, 8}
    assert first.reached.bytes < last.reached.bytes <= 45_000


def test_rungs_that_mend_what_nobody_asked_for_are_not_offered():
    def names(**budget):
        return [rung.name for rung in ladder(planted.sound(), budget=budget).rungs]

    assert "prune" not in names()
    assert "prune" in names(size=9)
    assert "prune" in names(latency=0.1)


def test_four_bits_are_begun_with_where_eight_do_not_fit():
    for size, bits in ((70_000, 8), (50_000, 4)):
        found = rungs.situation(planted.sound(), Budget(max_drop=1, size=size), "x86-64")
        assert found.bits == bits
        model = compress(planted.sound(), rungs.Settings().put("quantize", bits=bits).recipe())
        assert found.planned + found.others == Scales(planted.sound(), "top1").weigh(model).bytes


def test_no_try_is_begun_that_would_not_end_in_time():
    clock = Clock()
    work = Workshop(clock, {"quantize": 10.0, "equalize": 50.0})
    slow = Pace(sample=0.0, graph=1.0, layers=7, calibration=48, train=0, validation=160)  # foretells 9 s for quantize
    climb = ladder(
        planted.with_a_wide_channel(), work, clock=clock, limit=12.0, pace=slow, only=("fold", "equalize")
    ).climb()
    assert work.recipes == [["quantize"]]
    # two passes are foretold 16 s, and the first took 10/9 of what was foretold of it
    assert climb.tries[1].note == "takes about 18 s, 2 s are left"
    assert (climb.best.rung, "drop" in climb.misses) == ("fold", True)
    assert climb.left[0].layer == "near.0.second.weight"


def test_the_first_try_is_begun_however_short_the_time():
    climb = ladder(planted.sound(), limit=0.001, pace=Pace(**{**FAST.__dict__, "graph": 1e6})).climb()
    assert climb.misses == {}


def test_a_rung_that_does_not_fit_the_network_is_noted_and_passed_over():
    def work(model, recipe, progress):
        if any(name == "equalize" for name, _ in recipe.passes):
            raise CompressionError("no two layers follow each other")
        return compress(model, recipe, progress)

    climb = ladder(planted.with_a_wide_channel(), work, only=("fold", "equalize")).climb()
    assert climb.tries[1].note == "does not apply: no two layers follow each other"
    assert climb.best.rung == "fold"


def test_the_first_rung_has_to_fit():
    def work(model, recipe, progress):
        raise CompressionError("NaN in a weight")

    with pytest.raises(CompressionError, match="NaN in a weight"):
        ladder(planted.sound(), work).climb()


def test_every_try_is_told_as_it_ends_and_progress_shows_the_loss():
    told, drawn = [], []
    climbing = ladder(
        planted.with_a_wide_channel(),
        only=("fold", "equalize"),
        told=told.append,
        progress=lambda what, done, total: drawn.append(what),
    )
    climb = climbing.climb()
    assert told == list(climb.tries)
    assert any(text.startswith("1/2 quantize") for text in drawn)
    assert any(text.startswith("2/2 equalize: +") and text.endswith("lost") for text in drawn)


def test_the_plan_names_every_rung_with_its_seconds():
    planned = {rung.name: seconds for rung, seconds in ladder(planted.sound()).plan()}
    assert list(planned)[:4] == ["fold", "observers", "weight-scales", "equalize"]
    assert planned["observers"] > planned["fold"] > 0


def test_estimates_count_what_options_ask_for():
    def seconds(**options):
        return FAST.of_recipe(rungs.Settings().put("quantize", **options).recipe())

    assert seconds(samples=16) < seconds(samples=48) == seconds(samples=512)  # there are 48
    brief, long = (rungs.Settings().put("distill", teacher="t.py:f", epochs=n).recipe() for n in (1, 10))
    assert FAST.of_recipe(long) - FAST.of_recipe(brief) == pytest.approx(9 * TRAINED * 1001 * 1e-4)


def test_the_pace_is_measured_on_one_batch():
    ticks = iter(range(100))
    found = pace(planted.sound(), lambda: float(next(ticks)))
    assert found.sample == pytest.approx(1 / 16)
    assert (found.layers, found.calibration, found.train, found.validation) == (7, 48, 1001, 160)


def test_without_a_validation_split_nothing_is_chosen():
    model = digits.example().build().eval()
    from edgekit import workload

    split = Split(dict(digits.model().data.calibration.inputs))
    with pytest.raises(UsageError, match="no validation split to choose by"):
        Scales(workload.from_module("bare", model, Data(split)), None)


def test_settings_keep_passes_in_their_order_whatever_order_they_come_in():
    found = rungs.Settings().put("bias_correction").put("quantize", bits=4).put("equalize").put("quantize", samples=9)
    assert [name for name, _ in found.passes] == ["equalize", "quantize", "bias_correction"]
    assert found.option("quantize", "bits") == 4
    step = dict(found.recipe().passes)["quantize"]
    assert (step.bits, step.samples) == (4, 9)


def test_fidelity_of_the_model_itself_is_perfect():
    scales = Scales(planted.sound(), "top1")
    assert scales.fidelity(planted.sound()) == 200.0
    assert math.isclose(scales.weigh(planted.sound()).drop, 0.0)
