"""Distillation: a teacher makes a student useful; a teacher for something else is refused."""

import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import compress, evaluate
from edgekit.compress.passes.distill import Distill
from edgekit.compress.recipe import Recipe
from edgekit.errors import CompressionError, UsageError
from edgekit.model import Data, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")


def student(**splits):
    data = digits.model().data
    parts = {"calibration": data.calibration, "train": data.train, "validation": data.validation, "test": data.test}
    return workload.from_module("student", digits.example().build_student(), Data(**(parts | splits)))


def distill(**options):
    return Distill(teacher=digits.BUILD, teacher_checkpoint=str(digits.checkpoint()), **({"lr": 1e-2} | options))


@pytest.fixture(scope="module")
def taught():
    return compress(student(), Recipe((("distill", distill(epochs=8)),)))


def test_a_student_of_4000_weights_learns_digits(taught):
    test = digits.model().data.test
    assert evaluate.parameters(taught) < 0.07 * evaluate.parameters(digits.model())
    assert evaluate.top1(student().network, test) < 0.3
    assert evaluate.top1(taught.network, test) > 0.94


def test_the_teacher_is_worth_as_much_as_the_labels_within_noise(taught):
    """On digits the labels alone already teach a student well: no gain is claimed, only that nothing is lost."""
    test = digits.model().data.test
    plain = compress(student(), Recipe((("distill", distill(epochs=8, alpha=0.0)),)))
    assert evaluate.top1(taught.network, test) > evaluate.top1(plain.network, test) - 0.02


def test_the_teacher_alone_teaches_without_any_label():
    train = digits.model().data.train
    model = compress(student(train=Split(train.inputs)), Recipe((("distill", distill(epochs=8, alpha=1.0)),)))
    assert evaluate.top1(model.network, digits.model().data.test) > 0.9


def test_the_loss_is_hintons():
    from edgekit.compress.training import Lesson, Schedule, train

    data = digits.model().data.train.head(40)
    scores = digits.model().network.run(data.inputs)["scores"]
    network = student().network
    network.module.train()
    told = network.module(torch.as_tensor(data.inputs["image"]))
    heat, alpha = 3.0, 0.4
    teacher = torch.softmax(torch.as_tensor(scores) / heat, 1)
    divergence = (teacher * (teacher.log() - torch.log_softmax(told / heat, 1))).sum(1).mean()
    truth = -torch.log_softmax(told, 1)[torch.arange(40), torch.as_tensor(data.labels)].mean()
    expected = float((alpha * heat**2 * divergence + (1 - alpha) * truth).detach())
    schedule = Schedule(epochs=1, lr=1e-3, batch=40, seed=0)
    loss = train(student().network, Lesson(data, scores, alpha, heat), schedule, silent)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_options_and_loss_stand_in_the_lineage(taught):
    step = taught.lineage[-1]
    assert (step.name, step.options["temperature"], step.options["alpha"]) == ("distill", 2.0, 0.5)
    assert step.measured["train_loss"] > 0
    assert step.measured["validation_top1"] > 0.9


def test_a_teacher_for_other_classes_is_refused(tmp_path):
    (tmp_path / "other.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 11))\n"
    )
    with pytest.raises(CompressionError, match=r"teacher gives \[11\] scores, student \[10\]"):
        Distill(teacher=f"{tmp_path / 'other.py'}:build").apply(student(), silent)


def test_a_teacher_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="no file"):
        Distill(teacher="nowhere.py:build").apply(student(), silent)


def test_missing_splits_and_labels_are_refused():
    train = digits.model().data.train
    with pytest.raises(CompressionError, match="no train split"):
        distill().apply(student(train=None), silent)
    with pytest.raises(CompressionError, match=r"alpha 0\.5 needs labels"):
        distill().apply(student(train=Split(train.inputs)), silent)
