"""Attacks on `edgekit compress` that once got through: each is refused in words, early, and leaves nothing behind."""

import os

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from edgekit.cli import cli

NETS = """
import numpy as np
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x.relu()

def doubles():
    return Doubles()

def bad():
    network = mlp()
    network[2].bias.data[0] = float("nan")
    return network

class Greedy(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x.new_empty(1 << 46, 4)[: len(x)]

def greedy():
    return Greedy(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def splits(validation=16):
    take, label = np.random.default_rng(0).standard_normal, np.arange(32) % 4
    given = {"calibration": take((16, 8)), "train": take((32, 8)), "validation": take((validation, 8))}
    floats = {name: array.astype(np.float32) for name, array in given.items()}
    return {name: (array, label[: len(array)]) for name, array in floats.items()}

def unjudged():
    return splits(validation=0)
"""


def compress(folder, *more, build="mlp", data="splits", recipe=None):
    """Call the command in a folder of its own."""
    file = folder / "nets.py"
    file.write_text(NETS)
    given = ["compress", f"{file}:{build}", "--data", f"{file}:{data}", "--no-latency", "--no-cache"]
    if recipe:
        (folder / "r.toml").write_text(f"version = 1\n{recipe}")
        more = ("--recipe", folder / "r.toml", *more)
    out = [] if "-o" in more else ["-o", str(folder / "out")]
    return CliRunner().invoke(cli, [*given, *map(str, more), *out])


def refused(done, code, *words):
    assert done.exit_code == code, done.stderr
    for word in (*words, "hint: "):
        assert word in done.stderr


def passes(*names):
    return "".join(f'[[pass]]\nname = "{name}"\n' for name in names)


def test_a_network_that_needs_more_memory_than_there_is_leaves_nothing(tmp_path):
    refused(compress(tmp_path, build="greedy"), 12, "memory")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["nets.py"]


def test_a_target_that_runs_language_models_alone_is_refused_for_another_network(tmp_path):
    refused(compress(tmp_path, "--max-drop", "1", "--target", "llama-cpp"), 2, "llama-cpp runs language models")


def test_the_command_for_the_next_step_names_the_target_of_the_search(tmp_path):
    done = compress(tmp_path, "--max-drop", "100", "--target", "raspberry-pi-5")
    assert done.exit_code == 0
    assert f"edgekit export {tmp_path / 'out'} --target raspberry-pi-5" in done.output


def test_what_a_person_put_into_the_output_folder_is_not_replaced(tmp_path):
    assert compress(tmp_path).exit_code == 0
    assert compress(tmp_path).exit_code == 0, "what edgekit wrote itself is"
    notes = tmp_path / "out/NOTES.txt"
    notes.write_text("mine")
    refused(compress(tmp_path), 2, "would be lost", "NOTES.txt")
    notes.unlink()
    card = tmp_path / "out/MODEL_CARD.md"
    card.write_text(card.read_text() + "mine")
    refused(compress(tmp_path), 2, "would be lost", "changes of MODEL_CARD.md")
    assert card.read_text().endswith("mine")


def test_an_empty_split_is_refused_before_anything_is_computed(tmp_path):
    refused(compress(tmp_path, data="unjudged"), 2, "the validation split is empty")
    assert not (tmp_path / "out").exists()


def test_a_network_without_weights_cannot_be_pruned_to_a_share_of_its_macs(tmp_path):
    recipe = '[[pass]]\nname = "prune"\nmacs = 0.5\n'
    refused(compress(tmp_path, build="doubles", recipe=recipe), 4, "removes no channel of nets, which has 0 layers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('name = "prune"\nratio = 0.5\nmacs = 0.5', "ratio 0.5 and macs 0.5 are both asked for"),
        ('name = "prune"\nratio = 0.5\nlatency = 0.6', "ratio 0.5 and latency 0.6 are both asked for"),
        ('name = "sparsify"\nsparsity = 0.8', "2:4 zeroes half of the weights, sparsity is 0.8"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    refused(compress(tmp_path, recipe=f"[[pass]]\n{options}\nepochs = 0\n"), 4, message)


@pytest.mark.parametrize(("first", "second"), [("hqq", "gptq"), ("gptq", "adaround"), ("gptq", "hqq"), ("qat", "gptq")])
def test_a_second_choice_of_integers_is_refused_with_the_way_out(tmp_path, first, second):
    recipe = passes("quantize", first, second).replace('"qat"', '"qat"\nepochs = 1')
    refused(compress(tmp_path, recipe=recipe), 4, f"{second} has nothing to choose", f"drop {first} or {second}")


def test_training_may_follow_a_choice_of_integers(tmp_path):
    assert compress(tmp_path, recipe=passes("quantize", "gptq", "qat") + "epochs = 1\n").exit_code == 0


@pytest.mark.parametrize(
    ("build", "options", "code", "words"),
    [
        ("gone", "", 2, ("nets.py:gone: ", "has no function 'gone'")),
        ("mlp", 'teacher_checkpoint = "nosuch.pt"', 2, ("no checkpoint at nosuch.pt", "check teacher_checkpoint")),
        ("bad", "", 4, ("NaN",)),
    ],
)
def test_a_fault_of_the_teacher_is_told_as_the_teachers(tmp_path, build, options, code, words):
    recipe = f'[[pass]]\nname = "distill"\nteacher = "{tmp_path}/nets.py:{build}"\nepochs = 1\n{options}\n'
    refused(compress(tmp_path, recipe=recipe), code, "the teacher ", *words)


@pytest.mark.parametrize("late", ["prune", "sparsify"])
def test_a_pass_that_changes_the_network_after_quantize_says_where_to_put_it(tmp_path, late):
    refused(compress(tmp_path, recipe=passes("quantize", late)), 4, f"{late} must come before", "put the pass before")


def test_a_folder_given_as_recipe_names_the_recipe_in_it(tmp_path):
    refused(compress(tmp_path, "--recipe", tmp_path), 2, "it is a folder", "recipe.toml")


def test_top5_of_four_classes_says_nothing_and_is_refused(tmp_path):
    refused(compress(tmp_path, "--metric", "top5"), 4, "of 4 scores", "choose top1")


def test_an_output_that_cannot_be_made_is_refused_before_the_data_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    done = compress(tmp_path, "-o", tmp_path / "file" / "out", data="gone")
    refused(done, 2, f"{tmp_path / 'file'} is no folder")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_in_a_folder_of_another_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(compress(tmp_path, "-o", tmp_path / "locked" / "out", data="gone"), 2, "may not be written")


@pytest.mark.parametrize(("old", "new", "word"), [("[127.5]", "[nan]", "[nan]"), ("[127.5]", "[1, 2]", "2 numbers")])
def test_preprocessing_of_no_numbers_is_told_as_such(tmp_path, old, new, word):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    image.new("L", (8, 8)).save(tmp_path / "pictures" / "cat" / "1.png")
    stated = (
        'kind = "images"\nresize = 8\ncrop = 8\nmode = "L"\ninterpolation = "bilinear"\nmean = [127.5]\nstd = [1.0]\n'
    )
    (tmp_path / "pictures" / "data.toml").write_text(stated.replace(old, new))
    refused(compress(tmp_path, "--data", tmp_path / "pictures"), 2, "data.toml states", word)


def test_a_damaged_picture_is_told_without_addresses_in_memory():
    pytest.importorskip("PIL")
    from edgekit.errors import InputError
    from edgekit.manifest import ImagePreprocess
    from edgekit.pictures import picture_to_tensor

    how = ImagePreprocess(input="image", resize=8, crop=8, mode="L", mean=(0.0,), std=(1.0,))
    with pytest.raises(InputError) as caught:
        picture_to_tensor(b"no picture", how)
    assert caught.value.message == "these 10 bytes are no picture"
