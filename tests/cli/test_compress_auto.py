"""`edgekit compress --max-drop` as a person meets it: a plan, a recipe that fits, or how far it got."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from fakes import digits

from edgekit import device_profiles, workload
from edgekit.cli import cli
from edgekit.cli._ladder import duration, spelled
from edgekit.compress import recipe as recipes

pytest.importorskip("torch")

TARGET = ("--target", "raspberry-pi-5")


def line(tmp_path, *arguments):
    sources = [digits.BUILD, "--data", digits.DATA, "--checkpoint", str(digits.checkpoint())]
    return ["compress", *sources, "--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "out"), *map(str, arguments)]


def run(tmp_path, *arguments):
    return CliRunner().invoke(cli, line(tmp_path, "--no-latency", *arguments))


def test_a_network_that_takes_int8_well_is_done_after_one_rung(tmp_path):
    done = run(tmp_path, "--max-drop", 0.5, "--metric", "top1", *TARGET)
    assert done.exit_code == 0, done.output
    assert "at most 0.5 points of top1" in done.output
    assert "all of it about" in done.output
    plan, tried = done.output.split("all of it about")
    assert "| mixed-precision |" in plan
    assert "| equalize" not in tried
    model = workload.load(str(tmp_path / "out"))
    assert model.precision == "int8"
    assert [step.name for step in model.lineage] == ["load", "ladder", "quantize"]
    assert model.lineage[1].options["keeps_budgets"] is True
    assert recipes.read(tmp_path / "out" / "recipe.toml").passes[0][0] == "quantize"
    told = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [(t["rung"], t["kept"]) for t in told["tries"]] == [("fold", True)]


def test_a_budget_that_cannot_be_met_keeps_the_best_and_leaves_with_its_own_code(tmp_path):
    done = run(tmp_path, "--max-drop", 2, "--size", "20kB", "--budget", "1ms", *TARGET, "--json")
    assert done.exit_code == 13
    document = json.loads(done.stdout)
    assert document["error"]["kind"] == "BudgetError"
    assert document["error"]["exit_code"] == 13
    assert "33,260 bytes, allowed 20,000" in document["error"]["message"]
    assert "is kept in" in done.stderr
    assert "give more than --budget 1ms" in done.stderr
    assert (document["ladder"]["met"], list(document["ladder"]["missed"])) == (False, ["size"])
    assert document["after"]["bytes"] == 33_260
    model = workload.load(str(tmp_path / "out"))
    assert model.precision == "w4a8"
    assert model.lineage[1].options["keeps_budgets"] is False
    assert "no recipe keeps every budget" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


def test_a_dry_run_tells_what_would_be_tried_and_how_long_and_does_nothing(tmp_path):
    done = run(tmp_path, "--max-drop", 0.5, "--size", "2MB", "--budget", "30m", *TARGET, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [step["rung"] for step in document["plan"]][:2] == ["fold", "prune"]
    assert document["seconds"] == pytest.approx(sum(step["seconds"] for step in document["plan"]), abs=1)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_recipe_estimates_each_pass(tmp_path):
    recipe = digits.EXAMPLES / "recipes" / "prune-digits.toml"
    done = run(tmp_path, "--recipe", recipe, "--dry-run", "--json")
    assert json.loads(done.stdout)["seconds"] > 0
    assert "(about " in run(tmp_path, "--recipe", recipe, "--dry-run").stdout


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--size", "2MB"], "--size is kept by searching", "add --max-drop"),
        (["--target", "x86-64"], "--target is kept by searching", "add --max-drop"),
        (["--max-drop", 1], "needs a target", "edgekit devices list"),
        (["--max-drop", 1, "--recipe", "r.toml"], "--recipe gives one", "drop one"),
        (["--max-drop", -1, *TARGET], "is no loss", "from 0 on"),
        (["--max-drop", "nan", *TARGET], "no finite number", ""),
        (["--max-drop", 1, "--target", "raspbery-pi-5"], "unknown target", "raspberry-pi-5"),
        (["--max-drop", 1, "--metric", "topp1", *TARGET], "unknown metric", "top1"),
        (["--max-drop", 1, "--size", "2", *TARGET], "has no unit", "1.5MiB"),
        (["--max-drop", 1, "--budget", "-3m", *TARGET], "no positive number", "30m"),
        (["--max-drop", 1, "--latency", "20ms", *TARGET], "no raspberry-pi-5", "--latency-of"),
        (["--max-drop", 1, "--latency", "20ms", "--target", "pixel-8"], "tflite files", "edgekit bench"),
        (["--max-drop", 1, "--latency-of", "t.json", *TARGET], "that is not asked for", "--latency"),
        (["--max-drop", 1, "--latency", "9ms", "--latency-of", "t.json", *TARGET], "cannot be read", "bench BUNDLE"),
    ],
)
def test_a_wrong_call_is_answered_with_a_way_out(tmp_path, monkeypatch, arguments, message, hint):
    monkeypatch.chdir(tmp_path)
    done = run(tmp_path, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert hint in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_where_this_machine_is_the_target_its_latency_is_measured(tmp_path):
    here = device_profiles.detect()
    if here is None or here.format != "onnx":
        pytest.skip("this machine is of no class that runs ONNX")
    done = run(tmp_path, "--max-drop", 5, "--target", here.name, "--latency", "1h", "--json")
    assert done.exit_code == 0, done.output
    ladder = json.loads(done.stdout)["ladder"]
    assert ladder["latency_is"] == "measured here"
    assert 0 < ladder["tries"][0]["latency"] < 1


@pytest.mark.slow
def test_elsewhere_latency_is_told_from_the_float_models_and_said_to_be_an_estimate(tmp_path):
    told = {"measurements": [{"precision": "int8", "p50_ms": 1.0}, {"precision": "fp32", "p50_ms": 50_000.0}]}
    (tmp_path / "there.json").write_text(json.dumps(told))
    arguments = ["--max-drop", 5, *TARGET, "--latency", "1h", "--latency-of", tmp_path / "there.json"]
    done = run(tmp_path, *arguments, "--dry-run")
    assert "latency is an ESTIMATE" in done.output
    done = run(tmp_path, *arguments, "--json")
    ladder = json.loads(done.stdout)["ladder"]
    assert ladder["latency_is"] == "an estimate"
    assert 1 < ladder["tries"][0]["latency"] < 500  # int8 of what takes 50 s there, not of what takes some us here


@pytest.mark.slow
def test_the_report_of_a_search_tells_its_tries_their_milliseconds_and_what_broke_them(tmp_path):
    (tmp_path / "there.json").write_text(json.dumps({"measurements": [{"precision": "fp32", "p50_ms": 50.0}]}))
    arguments = ["--max-drop", 0.002, "--metric", "cosine", "--size", "34kB", "--latency", "1h"]
    done = run(tmp_path, *arguments, "--latency-of", tmp_path / "there.json", *TARGET, "--json")
    document = json.loads(done.stdout)
    ladder = document["ladder"]
    weighed = [tried for tried in ladder["tries"] if "drop" in tried]
    assert len(weighed) > 1
    assert len(document["stages"]) == 1 + len(weighed)
    told = {tried["rung"] + tried["kept"] * " (kept)": 1e3 * tried["latency"] for tried in weighed}
    assert {stage["name"]: stage["ms"] for stage in document["stages"][1:]} == pytest.approx(told)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Score against latency" in page
    assert "<h2>What broke it</h2>" in page
    for suspect in ladder["broke"] + ladder["left"]:
        assert f"<li>{suspect['told']}</li>" in page
    assert ladder["broke"]
    for tried in ladder["tries"]:
        assert f"<td>{tried['recipe']}" in page
        assert tried["note"] in page


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_from_the_rungs_that_were_done(tmp_path):
    arguments = line(tmp_path, "--no-latency", "--max-drop", 0, "--size", "34kB", "--budget", "1ms", *TARGET)
    code = "from edgekit.cli import main; main()"
    child = subprocess.Popen([sys.executable, "-u", "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    for text in child.stdout:
        if text.startswith("fold: "):
            break
    child.kill()
    child.communicate()
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    document = json.loads(done.stdout)
    assert document["cache"]["found"] > 0
    assert document["cache"]["kept"] == 0
    assert document["ladder"]["tries"][0]["rung"] == "fold"


def test_times_and_recipes_are_spelled_for_people():
    assert [duration(s) for s in (0.42, 12.3, 240, 9000)] == ["0.4 s", "12 s", "4 min", "2.5 h"]
    text = 'version = 1\n[[pass]]\nname = "fold"\n[[pass]]\nname = "quantize"\nbits = 4\n'
    assert spelled(recipes.decode(text)) == "fold + quantize(bits=4)"
