"""`edgekit compress --max-drop`: seed, teacher and milliseconds reach what is searched, and stay in what is kept."""

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from fakes import digits, planted

from edgekit import device_profiles, workload
from edgekit.cli import _speed, cli
from edgekit.compress import compress, rungs
from edgekit.compress import recipe as recipes
from edgekit.compress.budget import Budget, Reached
from edgekit.compress.latency import Compared
from edgekit.errors import CompressionError

pytest.importorskip("torch")

FEW = f"""
import sys
sys.path.insert(0, {str(digits.EXAMPLES)!r})
from dataclasses import replace
import digits
def data():
    whole = digits.data()
    return replace(whole, train=whole.train.head(320), calibration=whole.calibration.head(48))
def data_to_choose_by():
    return replace(data(), train=None)
"""
"""The digits with fewer samples to learn from."""

TARGET = ("--target", "raspberry-pi-5")
QUANTIZE = 'version = 1\n[[pass]]\nname = "quantize"\n'


def run(tmp_path, *arguments, source=digits.BUILD, checkpoint=None, data="data"):
    (tmp_path / "few.py").write_text(FEW)
    given = [source, "--data", f"{tmp_path / 'few.py'}:{data}", "--no-latency", "-o", str(tmp_path / "out")]
    given += ["--checkpoint", str(checkpoint or digits.checkpoint()), "--cache", str(tmp_path / "cache")]
    return CliRunner().invoke(cli, ["compress", *given, *map(str, arguments)])


def kept(tmp_path):
    return dict(recipes.read(tmp_path / "out" / "recipe.toml").passes)


@pytest.mark.slow
def test_the_seed_is_that_of_every_recipe_that_is_tried_and_of_the_one_that_is_kept(tmp_path):
    done = run(tmp_path, "--max-drop", 100, "--size", "20kB", "--seed", 7, *TARGET, "--json")
    assert done.exit_code == 0, done.output
    tries = [tried["recipe"] for tried in json.loads(done.stdout)["ladder"]["tries"]]
    pruned = [recipe for recipe in tries if recipe.startswith("prune")]
    assert pruned
    assert all("seed=7" in recipe for recipe in pruned)
    assert kept(tmp_path)["prune"].seed == 7
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["seeds"] == [7]


def here():
    found = device_profiles.detect()
    if found is None or found.format != "onnx":
        pytest.skip("this machine is of no class that runs ONNX")
    return found.name


@pytest.fixture
def slow_integers(monkeypatch):
    """Let int8 be slow in all layers but two, and each sample take 8 ms as float and 12 ms as int8."""
    measured = []

    def layers(self, candidates):
        measured.append(sorted(candidates))
        first = next(iter(candidates.values()))
        quick = ("near.0.first.weight", "near.0.second.weight")
        return {name: {32: 1.0, 8: 0.5 if name in quick else 2.0} for name in first.plan.weights}

    def compare(self, candidate):
        own = set() if candidate.plan is None else set(candidate.plan.weights)
        quick = own & {"near.0.first.weight", "near.0.second.weight"}
        return Compared(7.0, 7.0 + len(own - quick) - 0.5 * len(quick))

    monkeypatch.setattr(_speed.Speed, "layers", layers)
    monkeypatch.setattr(_speed.Speed, "compare", compare)
    return measured


@pytest.mark.slow
def test_layers_that_integers_make_slower_stay_float_within_the_milliseconds(tmp_path, slow_integers):
    budgets = ("--max-drop", 50, "--latency", "7ms", "--target", here())
    done = run(tmp_path, *budgets, "--json", data="data_to_choose_by")
    assert done.exit_code == 0, done.output
    first, *_, last = json.loads(done.stdout)["ladder"]["tries"]
    assert first["latency"] == pytest.approx(11e-3)
    assert last["rung"] == "mixed-precision"
    assert last["latency"] <= 7e-3
    model = workload.load(str(tmp_path / "out"))
    assert model.plan is None or set(model.plan.weights) <= {"near.0.first.weight", "near.0.second.weight"}
    assert slow_integers == [[8]]
    step = kept(tmp_path)["mixed_precision"]
    assert step.widths == (32, 8)
    assert step.time == pytest.approx(7 / 12, abs=1e-4)


@pytest.mark.slow
def test_the_kept_recipe_reads_its_milliseconds_from_the_folder_that_it_lies_in(tmp_path, slow_integers):
    budgets = ("--max-drop", 50, "--latency", "7ms", "--target", here())
    assert run(tmp_path, *budgets, data="data_to_choose_by").exit_code == 0
    times = tmp_path / "out" / "times.json"
    assert kept(tmp_path)["mixed_precision"].times == str(times)
    assert json.loads(times.read_text())["stem.weight"] == {"32": 1.0, "8": 2.0}
    step = next(s for s in workload.load(str(tmp_path / "out")).lineage if s.name == "mixed_precision")
    assert step.options["times"] == str(times)
    shutil.rmtree(tmp_path / "cache")
    again = run(tmp_path, "--recipe", tmp_path / "out" / "recipe.toml", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for name in ("plan.json", "recipe.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_a_search_that_goes_on_measures_no_layer_again(tmp_path, slow_integers):
    budgets = ("--max-drop", 50, "--latency", "7ms", "--target", here())
    for _ in range(2):
        assert run(tmp_path, *budgets, data="data_to_choose_by").exit_code == 0
    assert len(slow_integers) == 1


@pytest.mark.parametrize(("bits", "widths"), [(8, (32, 8)), (4, (32, 8, 4))])
def test_bytes_and_milliseconds_bound_the_widths_together_where_points_are_lost(bits, widths):
    asked = []

    def timing(candidates):
        asked.append({width: settings.recipe() for width, settings in candidates.items()})
        return rungs.Times("times.json", slowest=0.010)

    size = 70_000 if bits == 8 else 50_000
    budget = Budget(max_drop=1.0, size=size, latency=0.008)
    situation = replace(rungs.situation(planted.sound(), budget, "raspberry-pi-5"), timing=timing)
    rung = next(rung for rung in rungs.offered(situation) if rung.name == "mixed-precision")
    best = rungs.Settings().put("quantize", bits=bits, observer="mse").put("equalize").put("adaround")
    for latency, shares in ((0.007, [0.8, 0.8]), (0.009, [0.8, 0.72, 0.64])):
        reached = Reached(drop=3.0, value=0.5, bytes=size - 5000, latency=latency)
        steps = [dict(s.recipe().passes) for s in rung.grow(best, replace(situation, reached=reached))]
        tried = [step["mixed_precision"] for step in steps]
        assert [step.time for step in tried] == shares[: len(tried)]
        assert tried
        assert all(situation.planned < step.size <= size - situation.others for step in tried)
        assert {(step.widths, step.times) for step in tried} == {(widths, "times.json")}
    for width, recipe in asked[0].items():  # what only chooses other integers takes no other time
        assert [name for name, _ in recipe.passes] == ["equalize", "quantize"]
        assert dict(recipe.passes)["quantize"].bits == width
    assert list(asked[0]) == list(widths[1:])


def test_no_layer_is_timed_for_a_plan_or_where_widths_cannot_help():
    def timing(candidates):
        raise AssertionError("timed")

    budget = Budget(max_drop=1.0, size=70_000, latency=0.008)
    situation = replace(rungs.situation(planted.sound(), budget, "raspberry-pi-5"), timing=timing)
    rung = next(rung for rung in rungs.offered(situation) if rung.name == "mixed-precision")
    best = rungs.Settings().put("quantize")
    too_large = Reached(drop=0.0, value=0.5, bytes=80_000, latency=0.001)
    for reached in (None, too_large):
        assert list(rung.grow(best, replace(situation, reached=reached)))


def test_layers_whose_times_cannot_be_told_leave_the_widths_to_the_bytes(tmp_path, slow_integers, monkeypatch):
    def layers(self, candidates):
        raise CompressionError("no layer can be told apart")

    monkeypatch.setattr(_speed.Speed, "layers", layers)
    done = run(tmp_path, "--max-drop", 50, "--latency", "7ms", "--target", here(), data="data_to_choose_by")
    assert done.exit_code == 13
    assert "bytes alone choose their widths: no layer can be told apart" in done.stderr


@pytest.mark.slow
def test_the_milliseconds_of_a_file_are_those_of_its_layers_together(monkeypatch):
    monkeypatch.setattr(_speed.Speed, "_compared", lambda self, run: Compared(8.0, 6.0))
    model = planted.sound()
    planned = compress(model, recipes.decode(QUANTIZE))
    found = _speed.Speed(model).layers({8: planned})
    assert list(found) == list(planned.plan.weights)
    assert all(times.keys() == {32, 8} and min(times.values()) > 0 for times in found.values())
    assert sum(times[8] for times in found.values()) == pytest.approx(6.0)
    assert sum(times[32] for times in found.values()) < 2 * 6.0  # of two files, every other layer


@pytest.mark.slow
def test_a_weight_of_zeros_and_one_that_is_stored_turned_have_milliseconds_too():
    import torch

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = torch.nn.Conv2d(1, 16, 3, padding=1)
            self.apart = torch.nn.Conv2d(16, 16, 3, groups=16)
            self.turned = torch.nn.Linear(36, 8, bias=False)
            self.zeros = torch.nn.Linear(8, 10)
            torch.nn.init.zeros_(self.zeros.weight)

        def forward(self, image):
            rows = torch.nn.functional.hardswish(self.apart(self.deep(image))).flatten(2)
            return self.zeros(self.turned(rows).relu().mean(1))

    model = workload.from_module("odd", Odd().eval(), digits.model().data)
    planned = compress(model, recipes.decode(QUANTIZE))
    found = _speed.Speed(model).layers({8: planned})
    assert found.keys() == {"deep.weight", "apart.weight", "turned.weight", "zeros.weight"}
    assert all(min(times.values()) > 0 for times in found.values())


def test_layers_of_an_onnx_file_have_milliseconds_too():
    model = workload.load(str(digits.onnx_file()), None, digits.model().data)
    planned = compress(model, recipes.decode(QUANTIZE))
    assert list(_speed.Speed(model).layers({8: planned})) == list(planned.plan.weights)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Train the small network far too little and return its checkpoint."""
    from safetensors.torch import save_file

    network = digits.example().train(digits.example().build_student(), digits.example().data().train, epochs=2)
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_file(network.state_dict(), path)
    return path


def test_a_teacher_wins_back_what_four_bits_cost_a_small_student(tmp_path, student, monkeypatch):
    monkeypatch.setattr(rungs, "RUNGS", [rung for rung in rungs.RUNGS if rung.name in ("fold", "distill")])
    teacher = ("--teacher", digits.BUILD, "--teacher-checkpoint", digits.checkpoint())
    arguments = ("--max-drop", 0, "--size", "4kB", *teacher, *TARGET, "--seed", 3, "--json")
    done = run(tmp_path, *arguments, source=digits.STUDENT, checkpoint=student)
    assert done.exit_code == 0, done.output
    first, *_, last = json.loads(done.stdout)["ladder"]["tries"]
    assert (first["rung"], last["rung"]) == ("fold", "distill")
    assert first["drop"] > 0 >= last["drop"]
    step = kept(tmp_path)["distill"]
    assert (step.teacher, step.teacher_checkpoint, step.seed) == (digits.BUILD, str(digits.checkpoint()), 3)
    assert list(kept(tmp_path)) == ["distill", "quantize"]


def test_what_was_pruned_is_taught_and_then_trained_rounded():
    best = rungs.Settings().put("quantize").put("prune", ratio=0.3)
    situation = rungs.situation(digits.model(), Budget(max_drop=1.0, size=20_000), "raspberry-pi-5")
    situation = replace(situation, teacher=("t.py:build", "t.pt"))
    rung = next(rung for rung in rungs.offered(situation) if rung.name == "distill")
    tried = [[name for name, _ in settings.passes] for settings in rung.grow(best, situation)]
    assert tried[:2] == [["prune", "distill", "quantize"]] * 2
    assert tried[2:] == [["prune", "distill", "quantize", "qat"]]
    assert rungs.offered(situation)[-1] is rung
    assert "distill" not in [rung.name for rung in rungs.offered(replace(situation, teacher=None))]


def test_without_labels_the_teacher_is_all_there_is_to_learn_from():
    model = digits.model()
    bare = replace(model, data=replace(model.data, train=replace(model.data.train, labels=None)))
    situation = rungs.Situation(model=bare, budget=Budget(max_drop=1.0), target="x86-64", teacher=("t.py:build", ""))
    for rung in rungs.offered(situation):
        if rung.name in ("distill", "qat"):
            for settings in rung.grow(rungs.Settings().put("quantize"), situation):
                assert settings.option(rung.name, "alpha") == 1.0


@pytest.mark.parametrize(
    ("arguments", "data", "message", "hint"),
    [
        (["--teacher", "t.py:build"], "data", "what a search finds", "--max-drop"),
        (["--max-drop", 1, *TARGET, "--teacher-checkpoint", "t.pt"], "data", "not given", "add --teacher"),
        (["--max-drop", 1, *TARGET, "--teacher", "t.py:build"], "data", "there is no file t.py", ""),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_tried(tmp_path, arguments, data, message, hint):
    done = run(tmp_path, *arguments, data=data)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert hint in done.stderr
    assert "fold:" not in done.stdout


def test_a_teacher_without_a_train_split_or_with_other_outputs_is_refused_too(tmp_path):
    teacher = ("--teacher", digits.BUILD)
    done = run(tmp_path, "--max-drop", 1, *TARGET, *teacher, data="data_to_choose_by")
    assert (done.exit_code, "no train split" in done.stderr) == (CompressionError.exit_code, True)
    (tmp_path / "t.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12))\n"
    )
    done = run(tmp_path, "--max-drop", 1, *TARGET, "--teacher", f"{tmp_path / 't.py'}:build")
    assert done.exit_code == 2
    assert "gives [[12]] a sample" in done.stderr


def test_a_recipe_that_is_no_toml_is_told_of_one_that_every_installation_has(tmp_path):
    (tmp_path / "r.toml").write_text("version = = 1")
    done = run(tmp_path, "--recipe", tmp_path / "r.toml")
    assert (done.exit_code, "--recipe int8" in done.stderr) == (2, True)
