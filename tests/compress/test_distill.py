"""Distillation: a teacher makes a student useful; a teacher for something else is refused."""

import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import compress, evaluate
from edgekit.compress.losses import Decoupled, Labels, Seen, Softened
from edgekit.compress.passes.distill import Distill
from edgekit.compress.recipe import Recipe
from edgekit.compress.training import Lesson, Schedule, train
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
    assert evaluate.top1(taught.network, test) > evaluate.top1(plain.network, test) - 0.03


def test_the_teacher_alone_teaches_without_any_label():
    train = digits.model().data.train
    model = compress(student(train=Split(train.inputs)), Recipe((("distill", distill(epochs=8, alpha=1.0)),)))
    assert evaluate.top1(model.network, digits.model().data.test) > 0.9


def test_the_loss_is_hintons():
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
    losses = (Labels(1 - alpha), Softened(alpha, heat))
    loss = train(student().network, Lesson(data, losses, digits.model().network), schedule, silent)
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


def test_the_decoupled_loss_is_the_papers():
    """Kullback-Leibler of the binary probabilities (target or not), and of the others among themselves."""
    torch.manual_seed(0)
    told, wanted, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    heat, alpha, beta = 2.0, 0.7, 3.0
    expected = 0.0
    for mine, theirs, label in zip(torch.softmax(told / heat, 1), torch.softmax(wanted / heat, 1), labels, strict=True):
        p, q = theirs[label], mine[label]
        expected += alpha * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        others = [i for i in range(4) if i != label]
        p, q = theirs[others] / theirs[others].sum(), mine[others] / mine[others].sum()
        expected += beta * (p * (p / q).log()).sum()
    loss = Decoupled(1.0, heat, alpha, beta)(Seen(outputs=(told,), targets=labels, teacher=(wanted,)))
    assert float(loss) == pytest.approx(heat**2 * float(expected) / 5, rel=1e-5)


def test_the_decoupled_loss_of_a_teacher_that_is_certain_is_finite():
    certain = torch.tensor([[100.0, -100.0, 0.0]])
    seen = Seen(outputs=(certain.flip(1).requires_grad_(),), targets=torch.tensor([0]), teacher=(certain,))
    loss = Decoupled()(seen)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(seen.outputs[0].grad).all()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dkd", "alpha": 0.5},
        {"method": "hints", "hints": ("far.0 = far.0", "near.0 = near.0"), "hint_weight": 0.1},
        {"shift": 1, "keep": "best", "epochs": 12},
    ],
    ids=["dkd", "hints", "teacher in the loop"],
)
def test_every_method_teaches(options):
    model = compress(student(), Recipe((("distill", distill(**({"epochs": 5} | options))),)))
    assert evaluate.top1(model.network, digits.model().data.test) > 0.9


def test_hints_need_modules_that_are_there_and_fit():
    with pytest.raises(UsageError, match=r"unknown module of the hints 'far\.9'") as caught:
        distill(method="hints", hints=("far.9=far.0",)).apply(student(), silent)
    assert "far.0" in caught.value.hint
    with pytest.raises(CompressionError, match=r"hint far.0 = near.0 joins \[12, 4, 4\] with \[24, 8, 8\]"):
        distill(method="hints", hints=("far.0=near.0",)).apply(student(), silent)
    with pytest.raises(CompressionError, match="no pair of modules"):
        distill(method="hints", hints=("far.0",)).apply(student(), silent)
    with pytest.raises(CompressionError, match="method is 'kd'"):
        distill(hints=("far.0=far.0",)).apply(student(), silent)
    with pytest.raises(CompressionError, match="has no hints"):
        distill(method="hints").apply(student(), silent)


LLAMA = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

class Scores(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        torch.manual_seed(width)
        self.inner = LlamaForCausalLM(LlamaConfig(
            vocab_size=48, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, use_cache=False))

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits

def teacher():
    return Scores(32, 2).eval()

def student():
    return Scores(16, 1).eval()
"""


def test_a_language_model_learns_the_distribution_of_every_token(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "llama.py").write_text(LLAMA)
    tokens = torch.randint(0, 48, (48, 12), generator=torch.Generator().manual_seed(0)).numpy()
    data = Data(Split({"input_ids": tokens[:8]}), train=Split({"input_ids": tokens[:32]}))
    model = workload.load(f"{tmp_path / 'llama.py'}:student", None, data)
    teacher = workload.load(f"{tmp_path / 'llama.py'}:teacher", None, data)

    def divergence(network):
        ours, theirs = (
            torch.log_softmax(torch.as_tensor(*one.run({"input_ids": tokens[32:]}).values()), -1)
            for one in (network, teacher.network)
        )
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    learning = Distill(
        teacher=f"{tmp_path / 'llama.py'}:teacher", alpha=1.0, temperature=1.0, epochs=30, lr=1e-2, batch=16
    )
    taught = learning.apply(model, silent)
    assert divergence(taught.network) < 0.8 * divergence(model.network)
    with pytest.raises(CompressionError, match="no classes with labels"):
        Distill(teacher=f"{tmp_path / 'llama.py'}:teacher", method="dkd").apply(model, silent)
