"""The training loop: the same weights after a kill and on two processes, clear when it fails."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import digits

from edgekit.compress.batches import _augmented
from edgekit.compress.losses import Hint, Labels, Matched, Softened, mimicry, truth_of
from edgekit.compress.training import Lesson, Schedule, has_bfloat16_units, resumable, train
from edgekit.errors import CompressionError
from edgekit.model import Data, Split, TorchNetwork
from edgekit.progress import silent
from edgekit.workload import from_module

torch = pytest.importorskip("torch")
nn = torch.nn

SHORT = Schedule(epochs=3, lr=1e-2, batch=20, seed=4, shift=1)


def student():
    return TorchNetwork(digits.example().build_student(), ("image",), ("scores",))


def lesson(**options):
    return Lesson(digits.example().data().train.head(100), (Labels(),), **options)


def weights(network):
    return torch.cat([t.flatten().float() for t in network.module.state_dict().values()])


class Killed(Exception):
    pass


def test_a_training_that_was_killed_ends_with_the_very_same_weights(tmp_path):
    def kill(what, done, total):
        if done == 12:  # in the third of three epochs of five batches
            raise Killed

    options = {"validation": digits.example().data().validation.head(50)}
    schedule = replace(SHORT, keep="best")
    whole, parts = student(), student()
    expected = train(whole, lesson(**options), schedule, silent)
    with resumable(tmp_path), pytest.raises(Killed):
        train(parts, lesson(**options), schedule, kill)
    again, said = student(), []
    with resumable(tmp_path):
        loss = train(again, lesson(**options), schedule, lambda *told: said.append(told))
    assert said[0][1] == 11
    assert loss == expected
    assert torch.equal(weights(again), weights(whole))


def test_another_training_does_not_go_on_from_it(tmp_path):
    said = []
    with resumable(tmp_path):
        train(student(), lesson(), SHORT, silent)
        train(student(), lesson(), replace(SHORT, lr=2e-2), lambda *told: said.append(told))
    assert said[0][1] == 1
    assert len(list(tmp_path.iterdir())) == 2


PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_training as t
from edgekit.compress.losses import Hint
torch.set_num_threads(1)
said = []
network = t.student()
teacher = t.TorchNetwork(t.digits.example().build().eval(), ("image",), ("scores",))
plan = t.Lesson(t.digits.example().data().train.head(100), (t.Labels(), t.Softened(), Hint("far.0", "far.0")), teacher)
loss = t.train(network, plan, t.replace(t.SHORT, shift=0), lambda *told: said.append(told))
import os
torch.save({"weights": t.weights(network), "loss": loss, "said": len(said)}, f"{sys.argv[2]}/{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_only_the_first_reports(tmp_path):
    (tmp_path / "go.py").write_text(PROCESS)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    subprocess.run(
        [*line, str(tmp_path / "go.py"), str(here), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["weights"], two["weights"])
    assert one["loss"] == two["loss"]
    assert (one["said"], two["said"]) == (15, 0)
    assert not torch.equal(one["weights"], weights(student()))


def test_the_best_epoch_stays_where_it_is_asked_for():
    """The rate is so high at the end of the warm-up that later epochs are worse than the first."""
    validation = digits.example().data().validation
    wild = Schedule(epochs=6, lr=0.5, batch=20, seed=0, warmup=0.9)

    def accuracy(keep):
        network = student()
        train(network, lesson(validation=validation), replace(wild, keep=keep), silent)
        scores = network.run(validation.inputs)["scores"]
        return (scores.argmax(1) == validation.labels).mean()

    assert accuracy("best") > accuracy("last") + 0.05
    with pytest.raises(CompressionError, match="needs a validation split"):
        train(student(), lesson(), replace(wild, keep="best"), silent)


def test_pictures_are_flipped_and_shifted_over_zeros_each_by_itself():
    torch.manual_seed(0)
    picture = torch.arange(1.0, 17).reshape(1, 1, 4, 4).repeat(64, 1, 1, 1)
    (moved,) = _augmented([picture], replace(SHORT, flip=True, shift=1))
    padded = nn.functional.pad(picture[0, 0], (1, 1, 1, 1))
    possible = {
        tuple(side[y : y + 4, x : x + 4].flatten().tolist())
        for side in (padded, padded.flip(1))
        for y in range(3)
        for x in range(3)
    }
    seen = {tuple(one.flatten().tolist()) for one in moved}
    assert seen <= possible
    assert len(seen) > 9


def test_progress_tells_loss_and_accuracy():
    said = []
    train(student(), lesson(), replace(SHORT, epochs=12, shift=0), lambda what, *_: said.append(what))
    assert said[-1].startswith("train: loss ")
    assert said[-1].endswith(" %")
    assert float(said[-1].split()[-2]) > float(said[0].split()[-2])


def test_a_diverging_loss_is_an_error_with_its_step():
    with pytest.raises(CompressionError, match=r"diverged: the loss became \w+ at step \d+") as caught:
        train(student(), lesson(), replace(SHORT, lr=1e30, optimizer="sgd"), silent)
    assert "lower lr" in caught.value.hint


def test_masked_weights_stay_zero():
    network = student()
    mask = np.ones((6, 6, 3, 3), bool)
    mask[::2] = False
    with torch.no_grad():
        network.module.near[0].first.weight[::2] = 0
    train(network, lesson(masks={"near.0.first.weight": mask}), SHORT, silent)
    weight = network.module.near[0].first.weight
    assert (weight[::2] == 0).all()
    assert (weight[1::2] != 0).all()


class TwoTasks(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.sort, self.size = nn.Linear(4, width), nn.Linear(width, 3), nn.Linear(width, 1)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.sort(x), self.size(x)


def test_several_outputs_are_taught_each_in_its_kind():
    torch.manual_seed(0)
    numbers = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    split = Split({"x": numbers}, np.arange(64) % 3)
    model = from_module("two", TwoTasks(3), Data(split, split))
    teacher = TorchNetwork(TwoTasks(16).eval(), ("x",), ("a", "b"))
    losses = mimicry(model, 1.0, 2.0)
    assert losses == (Softened(0.5, 2.0, 0), Matched(0.5, 1))
    long = Schedule(epochs=60, lr=2e-2, batch=32, seed=0)
    short = train(
        from_module("two", TwoTasks(3), Data(split)).network,
        Lesson(split, losses, teacher),
        replace(long, epochs=1),
        silent,
    )
    assert train(model.network, Lesson(split, losses, teacher), long, silent) < short / 2


def test_values_are_learned_by_their_squared_error():
    numbers = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)
    split = Split({"x": numbers}, (numbers @ np.float32([3, -2])).astype(np.float32))
    model = from_module("line", nn.Linear(2, 1), Data(split))
    truth = truth_of(model, split)
    assert truth.kind == "values"
    train(model.network, Lesson(split, (truth,)), Schedule(epochs=60, lr=0.1, batch=50, seed=0), silent)
    np.testing.assert_allclose(model.network.module.weight.detach()[0], [3, -2], atol=0.05)


def test_language_models_learn_the_next_token_where_the_mask_lets_them():
    class Echo(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 5)

        def forward(self, input_ids, attention_mask):
            return self.table(input_ids) * attention_mask[..., None]

    tokens = np.tile(np.array([[1, 2, 1, 2, 0, 3]]), (16, 1))
    split = Split({"input_ids": tokens, "attention_mask": np.tile([[1, 1, 1, 1, 0, 0]], (16, 1))})
    model = from_module("echo", Echo(), Data(split, outputs=("logits",)))
    truth = truth_of(model, split)
    assert truth.kind == "tokens"
    before = model.network.module.table.weight.detach().clone()
    train(
        model.network, Lesson(split, (truth,)), Schedule(epochs=30, lr=0.1, batch=8, seed=0, weight_decay=0.0), silent
    )
    table = model.network.module.table.weight.detach()
    assert table[1].argmax() == 2
    assert table[2].argmax() == 1
    assert torch.equal(table[[0, 3]], before[[0, 3]])


def test_hints_of_equal_width_need_no_projection_and_others_get_one():
    narrow, wide = torch.zeros(2, 6, 4, 4), torch.zeros(2, 24, 4, 4)
    assert not list(Hint("a", "b").projection(wide, wide).parameters())
    projection = Hint("a", "b").projection(narrow, wide)
    assert projection(narrow).shape == wide.shape
    assert sum(p.numel() for p in projection.parameters()) == 6 * 24
    with pytest.raises(CompressionError, match=r"joins \[6, 4, 4\] with \[6, 8, 8\]") as caught:
        Hint("a", "b").projection(narrow, torch.zeros(2, 6, 8, 8))
    assert "differ only in their width" in caught.value.hint


def test_bfloat16_learns_as_well_as_float32():
    if not has_bfloat16_units():
        pytest.skip("this machine has no bfloat16 units")
    data = digits.example().data()

    def accuracy(mixed_precision):
        network = student()
        how = Schedule(epochs=12, lr=1e-2, batch=32, seed=0, mixed_precision=mixed_precision)
        train(network, Lesson(data.train, (Labels(),)), how, silent)
        assert network.module.stem.weight.dtype == torch.float32
        return weights(network), (
            network.run(data.validation.inputs)["scores"].argmax(1) == data.validation.labels
        ).mean()

    (half, share), (single, wanted) = accuracy("auto"), accuracy("off")
    assert not torch.equal(half, single)
    assert share > wanted - 0.02


class Clip(nn.Module):
    """A small classifier of films: convolutions over time and pictures beside one over pictures alone."""

    def __init__(self, width):
        super().__init__()
        self.still, self.film = nn.Conv2d(1, 2, 3, padding=1), nn.Conv3d(2, width, 3, padding=1)
        self.head = nn.Linear(width, 2)

    def forward(self, films):
        count, frames = films.shape[0], films.shape[1]
        stills = self.still(films.reshape(-1, 1, 6, 6)).reshape(count, frames, 2, 6, 6)
        return self.head(torch.relu(self.film(stills.movedim(2, 1))).mean((2, 3, 4)))


@pytest.mark.parametrize("learn", ["distill", "qat"])
def test_a_network_with_three_dimensional_convolutions_is_trained(learn):
    from edgekit.compress.passes.qat import Qat
    from edgekit.compress.passes.quantize import Quantize

    torch.manual_seed(0)
    films = np.random.default_rng(0).normal(size=(16, 4, 6, 6)).astype(np.float32)
    films[::2] += 2
    split = Split({"films": films}, np.arange(16) % 2)
    model = from_module("clip", Clip(4).eval(), Data(split, split))
    before = model.network.module.film.weight.detach().clone()
    if learn == "qat":
        how = {"epochs": 2, "batch": 8, "lr": 1e-2}
        trained = Qat(**how).apply(Quantize(bits=4).apply(model, silent), silent).network.module
    else:
        teacher = TorchNetwork(Clip(8).eval(), ("films",), ("scores",))
        plan = Lesson(split, mimicry(model, 1.0, 2.0), teacher)
        train(model.network, plan, Schedule(epochs=2, lr=1e-2, batch=8, seed=0), silent)
        trained = model.network.module
    weight = trained.state_dict()["film.weight"]
    assert weight.is_contiguous()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("line", "has_units"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu sse2 avx512f avx2", False),
        ("Features\t: fp asimd sve i8mm bf16 dgh", True),
        ("Features\t: fp asimd sve svei8mm svebf16", True),
        ("Features\t: fp asimd evtstrm aes crc32 cpuid asimddp", False),
    ],
)
def test_units_for_bfloat16_are_known_by_the_names_that_linux_gives_them(line, has_units, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("edgekit.compress.training._CPUINFO", tmp_path / "cpuinfo")
    assert not has_bfloat16_units(), "no such file"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert has_bfloat16_units() == has_units
