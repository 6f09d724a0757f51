"""`edgekit compress` as a person meets it: a table, a folder, or a sentence that says what to change."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import digits

from edgekit import workload
from edgekit.cli import cli

pytest.importorskip("torch")


def run(*arguments, source=digits.BUILD, data=digits.DATA, weights=True, plain=True):
    line = ["compress", source, *map(str, arguments)]
    line += ["--no-latency", "--no-cache"] if plain else []
    line += ["--data", data] if data else []
    line += ["--checkpoint", str(digits.checkpoint())] if weights else []
    return CliRunner().invoke(cli, line)


def recipe(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(f"version = 1\n{text}")
    return path


def rows(output):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_without_a_recipe_the_model_becomes_int8_and_the_table_tells_the_cost(tmp_path):
    done = run("-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    table = rows(done.output)
    assert list(table) == ["", "parameters", "bytes", "macs", "validation_top1", "test_top1"]
    for name in ("validation_top1", "test_top1"):
        before, after = (float(cell.rstrip("%")) for cell in table[name])
        assert before > 95
        assert after > before - 1
    assert table["bytes"] == ["0.243 MiB", "0.062 MiB"]
    assert "next: edgekit export" in done.output
    model = workload.load(str(tmp_path / "out"))
    assert model.precision == "int8"
    assert [step.name for step in model.lineage] == ["load", "quantize"]


def test_json_is_one_document_and_nothing_else(tmp_path):
    done = run("-o", tmp_path / "out", "--json")
    document = json.loads(done.stdout)
    assert document["precision"] == "int8"
    assert document["after"]["bytes"] < 0.3 * document["before"]["bytes"]
    assert [step["name"] for step in document["lineage"]] == ["load", "quantize"]
    assert document["before"].keys() == document["after"].keys()


@pytest.mark.slow
def test_the_written_recipe_does_it_again(tmp_path):
    first = recipe(tmp_path, '[[pass]]\nname = "prune"\nratio = 0.5\nepochs = 1\n[[pass]]\nname = "quantize"\n')
    assert run("--recipe", first, "-o", tmp_path / "a", "--seed", 3, "--quiet").stdout == ""
    written = tmp_path / "a" / "recipe.toml"
    assert "seed = 3" in written.read_text()
    assert run("--recipe", written, "-o", tmp_path / "b").exit_code == 0
    images = digits.model().data.test.inputs
    one, two = (workload.load(str(tmp_path / name)) for name in "ab")
    np.testing.assert_array_equal(one.network.run(images)["scores"], two.network.run(images)["scores"])
    assert (one.plan, one.lineage) == (two.plan, two.lineage)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path):
    done = run("-o", tmp_path / "out", "--dry-run", "--recipe", digits.EXAMPLES / "recipes" / "prune-digits.toml")
    assert done.exit_code == 0, done.output
    for fact in ("input   image: float32[?, 1, 8, 8]", "output  scores", "train 1001", "ratio=0.5", "pass    quantize"):
        assert fact in done.output
    assert list(tmp_path.iterdir()) == []
    document = json.loads(run("-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert document["passes"][0]["name"] == "quantize"
    assert document["dry_run"] is True


def test_without_labels_agreement_with_the_float_network_is_told(tmp_path):
    data = digits.model().data
    arrays = {f"{name}.image": split.inputs["image"] for name, split in data.splits().items()}
    np.savez(tmp_path / "d.npz", **arrays, **{"test.labels": [0] * 400})
    done = run("-o", tmp_path / "out", data=str(tmp_path / "d.npz"))
    assert done.exit_code == 0, done.output
    table = rows(done.output)
    assert table["validation_agreement"][0] == "100.00%"
    assert float(table["validation_agreement"][1].rstrip("%")) > 97
    assert float(table["test_top1"][0].rstrip("%")) < 25


def test_an_onnx_file_is_quantized_too(tmp_path):
    done = run("-o", tmp_path / "out", source=str(digits.onnx_file()), weights=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert float(rows(done.output)["test_top1"][1].rstrip("%")) > 95


def test_what_was_written_can_be_compressed_further(tmp_path):
    fold = recipe(tmp_path, '[[pass]]\nname = "fold"\n')
    assert run("-o", tmp_path / "a", "--recipe", fold).exit_code == 0
    done = run("-o", tmp_path / "b", source=str(tmp_path / "a"), weights=False)
    assert done.exit_code == 0, done.output
    assert [s.name for s in workload.load(str(tmp_path / "b")).lineage] == ["load", "fold", "quantize"]
    again = run("-o", tmp_path / "c", source=str(tmp_path / "b"), weights=False)
    assert again.exit_code == 4
    assert "quantized already" in again.stderr


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"source": "gone.py:build"}, 2, "there is no file gone.py"),
        ({"source": "gone.onnx", "weights": False}, 2, "no ONNX file"),
        ({"source": digits.BUILD.replace(":build", ":biuld")}, 2, "it has: build"),
        ({"data": "gone.npz"}, 2, "no data at gone.npz"),
        ({"data": digits.DATA.replace(":data", ":dat")}, 2, "has no function 'dat'"),
        ({"data": None}, 2, "give --data"),
        ({"source": digits.STUDENT}, 2, "is it the checkpoint of another model?"),
    ],
)
def test_a_wrong_call_is_answered_with_a_hint_and_nothing_is_written(tmp_path, settings, code, message):
    done = run("-o", tmp_path / "out", **settings)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_recipes_are_answered_with_the_nearest_name(tmp_path):
    done = run("-o", tmp_path / "out", "--recipe", recipe(tmp_path, '[[pass]]\nname = "prnue"\n'))
    assert (done.exit_code, "did you mean prune?" in done.stderr) == (2, True)
    done = run("-o", tmp_path / "out", "--recipe", tmp_path / "gone.toml", "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_a_folder_with_something_else_is_refused_before_the_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("-o", tmp_path)
    assert done.exit_code == 2
    assert "not replaced" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_language_model_is_sent_to_export(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run("-o", tmp_path / "out", source=str(tmp_path), data=None, weights=False)
    assert done.exit_code == 4
    assert "edgekit export --target llama-cpp --precision" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2.5, 5.0])
def test_killed_in_the_middle_leaves_the_old_result_and_a_second_run_works(tmp_path, seconds):
    out = tmp_path / "out"
    workload.save(digits.model(), out)
    line = [sys.executable, "-c", "from edgekit.cli import main; main()", "compress", digits.BUILD]
    line += ["--data", digits.DATA, "--checkpoint", str(digits.checkpoint()), "-o", str(out), "--no-cache"]
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    child.kill()
    child.wait()
    assert workload.load(str(out)).precision in ("fp32", "int8")
    assert run("-o", out).exit_code == 0
    assert workload.load(str(out)).precision == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_milliseconds_are_those_of_the_integers_beside_the_floats(tmp_path):
    done = run("-o", tmp_path / "out", "--json", "--cache", tmp_path / "cache", plain=False)
    document = json.loads(done.stdout)
    assert document["before"]["latency_ms"] > 0
    assert document["after"]["latency_ms"] > 0
    assert [stage["ms"] is not None for stage in document["stages"]] == [True, True]
    assert "ONNX file for" in document["latency"]


def test_a_latency_that_cannot_be_measured_is_said_and_stops_nothing(tmp_path):
    (tmp_path / "n.py").write_text(
        "import torch\n\nclass build(torch.nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n\n"
        "    def forward(self, image):\n        return torch.special.bessel_j0(super().forward(image))\n"
    )
    source = f"{tmp_path / 'n.py'}:build"
    done = run("-o", tmp_path / "out", "--no-cache", "--json", source=source, weights=False, plain=False)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["latency"].startswith("not measured: ")
    assert "latency_ms" not in document["after"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_it_says_in_one_line_that_the_same_command_goes_on(tmp_path, number, code):
    long = recipe(tmp_path, '[[pass]]\nname = "fold"\n[[pass]]\nname = "prune"\nepochs = 1000\n')
    line = [sys.executable, "-m", "edgekit", "compress", digits.BUILD, "--data", digits.DATA, "--recipe", str(long)]
    line += ["-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--no-latency"]
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if list(tmp_path.glob("cache/*/entry.json")):
            break
        time.sleep(0.1)
    time.sleep(1)  # in the middle of the training
    child.send_signal(number)
    out, said = child.communicate(timeout=60)
    assert child.returncode == code
    assert said.strip().splitlines()[-1] == "interrupted: the same command goes on from the last finished pass"
    assert "Traceback" not in said + out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "r.toml"]


@pytest.mark.slow
def test_under_torchrun_all_processes_learn_and_the_first_writes_and_speaks(tmp_path):
    text = f'[[pass]]\nname = "distill"\nteacher = "{digits.BUILD}"\nepochs = 1\n'
    text += f'teacher_checkpoint = "{digits.checkpoint()}"\n'
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    line += ["edgekit", "compress", digits.BUILD, "--data", digits.DATA, "--json", "--no-latency"]
    line += ["--recipe", str(recipe(tmp_path, text)), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lineage"][-1]["name"] == "distill"  # one document: the other process is silent
    assert workload.load(str(tmp_path / "out")).lineage[-1].name == "distill"


def test_the_ladder_is_not_climbed_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("-o", tmp_path / "out", "--max-drop", "1", "--target", "x86-64")
    assert done.exit_code == 2
    assert "one process" in done.output
