"""Distillation: a teacher makes a student useful; a teacher for something else is refused."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress import compress, evaluate
from edgekit.compress.losses import Decoupled, Labels, Matched, Seen, Softened, truth_of
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
    parts = Split({"input_ids": tokens[:8]}), Split({"input_ids": tokens[:32]})
    data = Data(parts[0], train=parts[1], outputs=("logits",))
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


ENCODER = """
import torch
from torch import nn

def build(layers=1):
    torch.manual_seed(layers)
    return nn.Sequential(nn.Embedding(60, 8), *[nn.Linear(8, 8) for _ in range(layers)]).eval()

def teacher():
    return build(2)
"""


def encoder(tmp_path, **more):
    (tmp_path / "encoder.py").write_text(ENCODER)
    tokens = np.random.default_rng(0).integers(0, 60, (64, 5))
    tokens[0, 0] = 59
    split = Split({"input_ids": tokens}, **more)
    return workload.load(f"{tmp_path / 'encoder.py'}:build", None, Data(split, split))


def test_an_encoder_learns_its_teachers_states_and_no_words(tmp_path):
    model = encoder(tmp_path)
    teacher = f"{tmp_path / 'encoder.py'}:teacher"
    with pytest.raises(CompressionError, match=r"alpha 0\.5 needs labels") as caught:
        Distill(teacher=teacher).apply(model, silent)
    assert caught.value.hint == "set alpha = 1"
    tokens = model.data.train.inputs
    wanted = next(iter(workload.load(teacher, None, model.data).network.run(tokens).values()))

    def error(one):
        return float(((one.network.run(tokens)["scores"] - wanted) ** 2).mean())

    taught = Distill(teacher=teacher, alpha=1.0, epochs=20, lr=2e-2).apply(model, silent)
    assert error(taught) < 0.3 * error(model)
    assert taught.lineage[-1].measured["train_loss"] == pytest.approx(error(taught), rel=0.5), "a squared error"


def test_a_temperature_that_softens_nothing_is_refused(tmp_path):
    teacher = f"{tmp_path / 'encoder.py'}:teacher"
    with pytest.raises(CompressionError, match="temperature 4 softens scores, encoder is not known to give any"):
        Distill(teacher=teacher, alpha=1.0, temperature=4.0).apply(encoder(tmp_path), silent)
    bare = replace(student(), task="tensor")
    with pytest.raises(CompressionError, match="softens scores") as caught:
        distill(temperature=4.0).apply(bare, silent)
    assert "labels or its classes' names" in caught.value.hint


def test_the_truth_of_positions_is_their_cross_entropy():
    torch.manual_seed(0)
    tokens, tags = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    tags[0, :2] = -100
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    counted = (tags >= 0) & (mask == 1)
    wanted = torch.nn.functional.cross_entropy(tokens[counted], tags[counted])
    assert Labels()(Seen(outputs=(tokens,), targets=tags, mask=mask)) == pytest.approx(float(wanted), rel=1e-5)
    pictures, masks = torch.randn(3, 5, 2, 4), torch.randint(0, 5, (3, 2, 4))
    wanted = torch.nn.functional.cross_entropy(pictures, masks)
    assert Labels()(Seen(outputs=(pictures,), targets=masks.to(torch.uint8))) == pytest.approx(float(wanted), rel=1e-5)
    nothing = Labels()(Seen(outputs=(tokens,), targets=torch.full((3, 4), -100)))
    assert float(nothing) == 0, "and no NaN"


def test_a_teachers_padding_does_not_count():
    states, mask = torch.zeros(1, 3, 2), torch.tensor([[1, 1, 0]])
    theirs = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [50.0, 50.0]]])
    assert float(Matched()(Seen(outputs=(states,), teacher=(theirs,), mask=mask))) == 1


def test_a_segmentation_learns_from_masks(tmp_path):
    (tmp_path / "dots.py").write_text(
        "import torch\ndef build():\n    torch.manual_seed(0)\n    return torch.nn.Conv2d(1, 3, 1).eval()\n"
    )
    pictures = np.random.default_rng(0).integers(0, 3, (96, 1, 4, 4)).astype(np.float32)
    masks = (pictures[:, 0] > 0).astype(np.int64)
    masks[:, 0, 0] = -100
    parts = [Split({"x": pictures[start : start + 32]}, masks[start : start + 32]) for start in (0, 32, 64)]
    data = Data(parts[0], parts[1], parts[2])
    model = workload.load(f"{tmp_path / 'dots.py'}:build", None, data)
    learning = Distill(teacher=f"{tmp_path / 'dots.py'}:build", alpha=0.0, epochs=40, lr=0.2, batch=8)
    taught = compress(model, Recipe((("distill", learning),)))
    assert (taught.task, taught.lineage[-1].measured["validation_top1"]) == ("tensor", 1.0)


def test_labels_that_the_output_has_no_scores_for_are_refused_where_they_count(tmp_path):
    model = encoder(tmp_path, labels=np.zeros((64, 3), int))
    teacher = f"{tmp_path / 'encoder.py'}:teacher"
    with pytest.raises(CompressionError, match=r"labels \[64, 3\] say no class .* \[-1, 5, 8\] scores") as caught:
        Distill(teacher=teacher).apply(model, silent)
    assert "alpha = 1" in caught.value.hint
    assert truth_of(model, model.data.train, 0.0) is None
    Distill(teacher=teacher, alpha=1.0, epochs=1).apply(model, silent)
