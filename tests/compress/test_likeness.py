"""What agreement, cosine and kl compare with: the uncompressed model, but where a recipe distils, its teacher."""

import json
from dataclasses import replace

import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import compress, evaluate, output, report
from edgekit.compress.cache import Cache
from edgekit.compress.origin import origin_of, sources_of
from edgekit.compress.outcome import Stages, outcome_of
from edgekit.compress.passes.distill import Distill
from edgekit.compress.passes.fold import Fold
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.recipe import Recipe
from edgekit.model import Data, Split

torch = pytest.importorskip("torch")


def student(*, labels=False):
    """Return the untrained student; its pictures have labels or not."""
    parts = digits.model().data.splits()
    bare = {name: split if labels else Split(split.inputs) for name, split in parts.items()}
    data = Data(**bare, labels=tuple("0123456789"))
    return workload.from_module("student", digits.example().build_student(), data)


def distill(checkpoint, **options):
    fixed = {"alpha": 1.0, "epochs": 8, "lr": 1e-2}
    return Distill(teacher=digits.BUILD, teacher_checkpoint=str(checkpoint), **(fixed | options))


def run(model, passes, metric=None):
    stages = Stages(model)
    compressed = compress(model, passes, metric=metric, follow=stages.seen)
    made_of = passes, origin_of(model, passes, sources_of("student"))
    return outcome_of(model, compressed, made_of, stages, metric=metric)


@pytest.fixture(scope="module")
def taught():
    steps = (("distill", distill(digits.checkpoint())), ("quantize", Quantize()))
    return run(student(), Recipe(steps), "agreement")


def test_a_student_without_labels_is_judged_by_its_teacher_and_not_by_what_it_was(taught):
    teacher, split = digits.model().network, digits.model().data.validation
    before, after = taught.scores["validation"]
    assert before.value == evaluate.agreement(taught.original.network, teacher, split) < 0.4
    assert after.value > 0.85
    measured = {step.name: step.measured["validation_agreement"] for step in taught.compressed.lineage}
    assert measured["distill"] > 0.85
    assert measured["quantize"] == after.value
    assert taught.stages[0].score == before.value


def test_report_card_and_figures_say_what_the_metric_compares_with(taught, tmp_path):
    output.write(taught, tmp_path / "out")
    for name in ("report.html", "MODEL_CARD.md"):
        assert "agreement compares with the teacher digits.py:build." in (tmp_path / "out" / name).read_text()
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["reference"] == "the teacher digits.py:build"


def test_without_a_teacher_the_reference_is_the_uncompressed_model_and_with_labels_there_is_none():
    passes = Recipe((("quantize", Quantize()),))
    alike = run(digits.model(), passes, "cosine")
    assert alike.reference == "the uncompressed model"
    assert alike.scores["test"][0].value == pytest.approx(1)
    assert "cosine compares with the uncompressed model." in report.page(alike, "0")
    labelled = run(digits.model(), passes)
    assert labelled.reference == ""
    assert "compares with" not in report.page(labelled, "0")
    assert output.figures(labelled)["reference"] is None


def test_outputs_of_the_teacher_are_compared_by_their_order_whatever_they_are_called():
    model = student()
    data = replace(model.data, outputs=("chances",))
    other = workload.from_module("student", model.network.module, data)
    teacher = evaluate.Teacher(digits.BUILD, str(digits.checkpoint()), model.data)  # its output is called scores
    found = [evaluate.judge(one, one, model.data.validation, "cosine", teacher=teacher).value for one in (model, other)]
    assert found[0] == found[1] < 0.9


def loads(monkeypatch):
    """Count how often a teacher is loaded."""
    seen = []
    load = workload.load

    def counted(*arguments):
        seen.append(arguments[0])
        return load(*arguments)

    monkeypatch.setattr(workload, "load", counted)
    return seen


def test_a_teacher_that_is_not_compared_with_is_loaded_once_to_teach(monkeypatch):
    seen = loads(monkeypatch)
    steps = (("fold", Fold()), ("distill", distill(digits.checkpoint(), epochs=1)), ("quantize", Quantize()))
    assert "validation" in run(student(labels=True), Recipe(steps), "top1").scores
    assert len(seen) == 1


def test_another_teacher_gives_other_figures_to_passes_that_the_cache_knows(tmp_path):
    other = digits.example().write_checkpoint(tmp_path / "other.safetensors", epochs=1)
    found = []
    for checkpoint in (digits.checkpoint(), other):
        steps = (("fold", Fold()), ("distill", distill(checkpoint, epochs=1)))
        made = compress(student(), Recipe(steps), metric="cosine", cache=Cache(tmp_path / "cache"))
        found.append(made.lineage[0].measured["validation_cosine"])
    assert made.lineage[0].name == "fold"
    assert found[0] != found[1]
