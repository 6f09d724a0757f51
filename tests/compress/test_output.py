"""What a run leaves: a folder that is the same again, and papers that say what is in it and hold what they say."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("torch")

from click.testing import CliRunner  # torch may be missing

from edgekit.cli import cli  # the same
from edgekit.compress import bom, card, output, report  # the same
from edgekit.compress.latency import Compared  # the same
from edgekit.compress.outcome import Outcome, Stages, outcome_of  # the same
from edgekit.model import TextReading
from edgekit.tensors import TensorSpec

WORKLOAD = Path(__file__).parents[1] / "fakes" / "tiny_workload.py"
RECIPE = """version = 1
[[pass]]
name = "prune"
ratio = 0.5
epochs = 2
[[pass]]
name = "quantize"
"""
NAMED = ("weights.safetensors", "network.pt2", "plan.json", "recipe.toml", "lineage.json")


def made(fraction: float = 0.5) -> Outcome:
    """Compress the tiny workload; its latency is told, not measured."""
    from edgekit import workload
    from edgekit.compress import compress
    from edgekit.compress.origin import origin_of, sources_of
    from edgekit.compress.recipe import decode

    recipe = decode(RECIPE)
    model = workload.load(f"{WORKLOAD}:build", None, workload.load_data(f"{WORKLOAD}:data"))
    stages = Stages(model, lambda _: Compared(1.0, fraction), "told")
    compressed = compress(model, recipe, follow=stages.seen)
    origin = origin_of(model, recipe, sources_of(f"{WORKLOAD}:build", None, f"{WORKLOAD}:data"))
    return outcome_of(model, compressed, (recipe, origin), stages)


@pytest.fixture(scope="module")
def outcome():
    return made()


@pytest.fixture(scope="module")
def folder(outcome, tmp_path_factory):
    place = tmp_path_factory.mktemp("output") / "out"
    output.write(outcome, place)
    return place


def test_the_way_back_to_a_hugging_face_folder_is_written_and_listed(outcome, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    network = replace(outcome.compressed.network, folder=tmp_path / "llama")
    whole = replace(outcome, compressed=replace(outcome.compressed, network=network))
    output.write(whole, tmp_path / "out")
    assert (tmp_path / "out" / "huggingface" / "config.json").is_file()
    assert "huggingface/config.json" in (tmp_path / "out" / "bom.cdx.json").read_text()


def call(place, *options):
    (place / "r.toml").write_text(RECIPE)
    line = ["compress", f"{WORKLOAD}:build", "--data", f"{WORKLOAD}:data", "--recipe", str(place / "r.toml")]
    return [*line, "--no-latency", *map(str, options)]


@pytest.mark.slow
def test_two_processes_give_the_same_digest_and_the_same_bytes(tmp_path):
    documents = []
    for name in ("a", "b"):
        line = call(tmp_path, "-o", tmp_path / name, "--no-cache", "--json")
        done = subprocess.run([sys.executable, "-m", "edgekit", *line], capture_output=True, text=True, check=True)
        documents.append(json.loads(done.stdout))
    assert documents[0]["digest"] == documents[1]["digest"]
    for name in NAMED:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_digest_changes_with_any_byte_of_the_model_and_with_none_of_the_papers(folder, tmp_path):
    whole = output.digest_of(folder)
    assert whole == json.loads((folder / "metrics.json").read_text())["digest"]
    shutil.copytree(folder, tmp_path / "c")
    for name in (path.name for path in folder.iterdir()):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "c" / name).write_bytes(content)
        assert (output.digest_of(tmp_path / "c") != whole) == (name in NAMED), name
        (tmp_path / "c" / name).write_bytes((folder / name).read_bytes())


def test_the_lineage_names_what_went_in_and_no_path_of_this_machine(outcome, folder):
    import hashlib

    told = json.loads((folder / "lineage.json").read_text())
    assert told["model"]["sha256"] == hashlib.sha256(WORKLOAD.read_bytes()).hexdigest()
    assert told["data_sha256"] == outcome.original.data.digest()
    assert told["samples"] == {"calibration": 16, "train": 96, "validation": 24, "test": 24}
    assert told["seeds"] == [0]
    assert {"edgekit", "python", "torch"} <= told["tools"].keys()
    for path in folder.iterdir():
        assert str(WORKLOAD.parent).encode() not in path.read_bytes(), path.name


def test_the_bill_of_materials_is_valid_cyclonedx_and_its_hashes_are_those_of_the_files(folder):
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (folder / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    model = document["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    metrics = {m["slice"]: m for m in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    told = json.loads((folder / "metrics.json").read_text())["scores"]["test"]["after"]
    assert float(metrics["test, after compression"]["value"]) == told["value"]
    assert float(metrics["test, after compression"]["confidenceInterval"]["lowerBound"]) == told["low"]
    from edgekit.compress.fingerprint import file_digest

    hashes = {c["name"]: c["hashes"][0]["content"] for c in document["components"] if c["bom-ref"].startswith("file-")}
    assert hashes == {p.name: file_digest(p) for p in folder.iterdir() if p.name != "bom.cdx.json"}


def test_a_bill_that_breaks_the_schema_would_be_noticed(outcome):
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    document = bom.bom(outcome, "0" * 64, {})
    document["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["x"] = 1
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.encode(document).decode()) is not None


def test_the_card_has_a_head_that_hugging_face_reads_and_leaves_open_what_only_the_owner_knows(outcome, folder):
    yaml = pytest.importorskip("yaml")
    text = (folder / "MODEL_CARD.md").read_text()
    _, head, body = text.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["library_name"] == "edgekit"
    results = {r["dataset"]["split"]: r["metrics"][0] for r in told["model-index"][0]["results"]}
    assert results["test"]["value"] == outcome.scores["test"][1].value
    assert body.count(card.OPEN) == 3
    assert "## What each step bought" in body
    assert "| prune |" in body
    assert "<blue>" in body


def test_the_card_names_the_task_by_what_goes_in_and_comes_out(outcome):
    text = TextReading(b"{}", 8)
    kinds = [({"task": "detection"}, "object-detection"), ({"task": "tensor"}, None)]
    kinds += [({"inputs": (TensorSpec("x", "float32", shape),)}, told) for shape, told in
              (((-1, 3, 8, 8), "image-classification"), ((-1, 8), "tabular-classification"))]  # fmt: skip
    kinds += [({"data": replace(outcome.compressed.data, text=text)}, "text-classification")]
    for changes, wanted in kinds:
        head = card.card(replace(outcome, compressed=replace(outcome.compressed, **changes)), "0").split("\n---\n")[0]
        assert (f"pipeline_tag: {wanted}" in head) if wanted else "pipeline_tag" not in head
        assert f"type: {wanted or 'other'}\n" in head


def test_a_name_cannot_break_out_of_the_card_or_the_report(outcome):
    yaml = pytest.importorskip("yaml")
    odd = 'x"\n---\n<script>alert(1)</script>'
    named = replace(outcome, compressed=replace(outcome.compressed, name=odd))
    head = card.card(named, "0").split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(head)["model-index"][0]["name"] == odd
    assert "<script>" not in report.page(named, "0")


def test_the_report_needs_no_network_and_every_plot_in_it_is_whole(folder):
    text = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!#|data:)', text.replace("xlink:href", "xlink-href"))
    assert "<script" not in text
    assert "@import" not in text
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for plot in plots:
        ET.fromstring(plot)  # noqa: S314  # what we wrote ourselves
    for caption in (
        "side by side",
        "Score against size",
        "Score against latency",
        "Sensitivity",
        "lowest to the highest",
    ):
        assert caption in text
    assert "range of each activation" in text
    assert len(plots) >= 6
    assert "WARNING" not in text


def test_a_model_that_became_slower_is_warned_of_everywhere(outcome, tmp_path):
    slow = replace(outcome, latency=Compared(1.0, 1.5))
    output.write(slow, tmp_path / "out")
    assert "WARNING" in (tmp_path / "out" / "report.html").read_text()
    assert "SLOWER" in (tmp_path / "out" / "MODEL_CARD.md").read_text()
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "1.5 ms after" in told["warnings"][0]
    assert replace(outcome, latency=Compared(1.0, 1.01)).warnings == ()


def test_the_confusion_that_is_drawn_is_the_difference_of_both_models(outcome):
    import numpy as np

    from edgekit.compress import diagnosis
    from edgekit.compress.simulation import planned_network

    found = diagnosis.confusion(outcome.original, outcome.compressed)
    change, names = found.change, found.names
    split = outcome.original.data.validation
    told = [planned_network(m).run(split.inputs)["scores"].argmax(1) for m in (outcome.original, outcome.compressed)]
    for row in range(3):
        for column in range(3):
            counts = [np.sum((split.labels == row) & (one == column)) for one in told]
            assert change[row, column] == counts[1] - counts[0]
    assert names == ("red", "green", "<blue>")
    assert change.sum(1).tolist() == [0, 0, 0]


def test_the_written_model_computes_what_was_measured(outcome, folder):
    from edgekit import workload
    from edgekit.compress.evaluate import judge

    again = workload.load(str(folder), None, outcome.original.data)
    assert judge(again, outcome.original, outcome.original.data.test).value == outcome.scores["test"][1].value


def test_json_tells_steps_figures_digest_and_paths_and_the_cache(tmp_path):
    for found, kept in ((0, 2), (2, 0)):
        line = call(tmp_path, "-o", tmp_path / "out", "--cache", tmp_path / "cache", "--json")
        done = CliRunner().invoke(cli, line)
        document = json.loads(done.stdout)
        assert document["cache"] == {"found": found, "kept": kept}
        assert [s["name"] for s in document["lineage"]] == ["load", "prune", "quantize"]
        assert [s["name"] for s in document["stages"]] == ["load", "prune", "quantize"]
        assert document["digest"] == output.digest_of(tmp_path / "out")
        assert all(Path(path).is_file() for path in document["files"].values())
        assert document["latency"] == "not measured"


def test_the_workflow_for_github_calls_options_that_are_there():
    yaml = pytest.importorskip("yaml")
    from edgekit.cli.compress import COMMAND

    text = (Path(__file__).parents[2] / "docs" / "guides" / "github-actions.yml").read_text()
    job = yaml.safe_load(text)["jobs"]["compress"]
    (step,) = [s["run"] for s in job["steps"] if s.get("name") == "Compress"]
    used = set(re.findall(r"--[a-z-]+", step + job["env"]["BUDGET"]))
    known = {option for parameter in COMMAND.params for option in parameter.opts}
    assert used <= known
    assert {"--max-drop", "--cache", "--json"} <= used
