"""The cache of passes: nothing is done twice, a kill costs one pass, and a damaged entry never reaches a model."""

import os
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

pytest.importorskip("torch")

from edgekit.compress import cache as caches  # torch may be missing
from edgekit.compress import compress, fingerprint  # the same
from edgekit.compress.recipe import decode  # the same

FOLD_PRUNE_QUANTIZE = """version = 1
[[pass]]
name = "fold"
[[pass]]
name = "prune"
ratio = 0.5
epochs = 1
[[pass]]
name = "quantize"
"""
FOLD = 'version = 1\n[[pass]]\nname = "fold"\n'
QUANTIZE = 'version = 1\n[[pass]]\nname = "quantize"\n'


def weights(model):
    from edgekit import network_files

    return network_files.tensors_to_bytes(model.network.module.state_dict())


def test_a_second_run_does_no_pass_again_and_gives_the_same_model(tmp_path):
    recipe = decode(FOLD_PRUNE_QUANTIZE)
    first, second = caches.Cache(tmp_path), caches.Cache(tmp_path)
    one = compress(digits.model(), recipe, cache=first)
    two = compress(digits.model(), recipe, cache=second)
    assert (len(first.kept), len(first.found), first.notes) == (3, 0, [])
    assert (len(second.kept), len(second.found)) == (0, 3)
    assert (one.plan, one.lineage, one.inputs, one.outputs) == (two.plan, two.lineage, two.inputs, two.outputs)
    assert weights(one) == weights(two)
    bare = compress(digits.model(), recipe)
    assert (bare.plan, bare.lineage, weights(bare)) == (one.plan, one.lineage, weights(one))


def test_what_a_pruned_entry_gives_back_are_modules_that_can_be_trained_and_pruned_further(tmp_path):
    prune = '[[pass]]\nname = "prune"\nratio = 0.25\nepochs = 0\n'
    for _ in range(2):
        cache = caches.Cache(tmp_path)
        compress(digits.model(), decode(f"version = 1\n{prune}"), cache=cache)
    assert len(cache.found) == 1
    again = compress(digits.model(), decode(f"version = 1\n{prune}{prune}"), cache=cache)
    bare = compress(digits.model(), decode(f"version = 1\n{prune}{prune}"))
    assert weights(again) == weights(bare)
    assert type(again.network.module) is type(digits.model().network.module)
    assert again.network.module.stem.out_channels < digits.model().network.module.stem.out_channels


@pytest.mark.parametrize("change", ["option", "weight", "data"])
def test_other_content_is_another_entry(tmp_path, change):
    import copy

    recipe, model = decode(QUANTIZE), digits.model()
    compress(model, recipe, cache=caches.Cache(tmp_path))
    if change == "option":
        recipe = decode('version = 1\n[[pass]]\nname = "quantize"\nobserver = "mse"\n')
    elif change == "weight":
        module = copy.deepcopy(model.network.module)
        module.stem.weight.data[0, 0, 0, 0] += 1e-3
        model = replace(model, network=replace(model.network, module=module))
    else:
        split = model.data.validation
        model = replace(model, data=replace(model.data, validation=split.head(len(split) - 1)))
    cache = caches.Cache(tmp_path)
    compress(model, recipe, cache=cache)
    assert cache.found == []


def test_a_teacher_that_changed_makes_another_key(tmp_path):
    from edgekit.compress.passes.distill import Distill

    (tmp_path / "t.py").write_text("one")
    step = Distill(teacher=f"{tmp_path / 't.py'}:build")
    first = fingerprint.of_pass("x", "distill", step)
    assert first == fingerprint.of_pass("x", "distill", step)
    (tmp_path / "t.py").write_text("two")
    assert fingerprint.of_pass("x", "distill", step) != first


@pytest.mark.parametrize("name", ["entry.json", "entry.sha256", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "unlink"])
def test_a_damaged_entry_is_noticed_removed_and_computed_again(tmp_path, name, damage):
    recipe = decode(FOLD)
    first = caches.Cache(tmp_path)
    whole = compress(digits.model(), recipe, cache=first)
    file = tmp_path / first.kept[0] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "unlink":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    second = caches.Cache(tmp_path)
    again = compress(digits.model(), recipe, cache=second)
    assert (second.found, second.kept) == ([], first.kept)
    assert "damaged entry" in second.notes[0]
    assert weights(again) == weights(whole)
    third = caches.Cache(tmp_path)
    compress(digits.model(), recipe, cache=third)
    assert third.found == first.kept


def test_the_entry_unused_for_longest_leaves_when_there_is_no_room(tmp_path):
    cache = caches.Cache(tmp_path)
    compress(digits.model(), decode(FOLD), cache=cache)
    old = cache.kept[0]
    size = sum(f.stat().st_size for f in (tmp_path / old).iterdir())
    os.utime(tmp_path / old, (1, 1))
    small = caches.Cache(tmp_path, limit=size + size // 2)
    compress(digits.model(), decode(QUANTIZE), cache=small)
    assert not (tmp_path / old).exists()
    assert (tmp_path / small.kept[0]).is_dir()


def test_an_onnx_network_is_kept_too(tmp_path):
    from edgekit import workload

    model = workload.load(str(digits.onnx_file()), None, digits.model().data)
    recipe = decode(QUANTIZE)
    one = compress(model, recipe, cache=caches.Cache(tmp_path))
    cache = caches.Cache(tmp_path)
    two = compress(model, recipe, cache=cache)
    assert len(cache.found) == 1
    assert one.plan == two.plan
    np.testing.assert_array_equal(
        one.network.run(digits.model().data.test.inputs)["scores"],
        two.network.run(digits.model().data.test.inputs)["scores"],
    )


def test_a_graph_that_edgekit_saved_is_kept_too(tmp_path):
    from edgekit import saving

    saving.save(digits.model(), tmp_path / "m")
    model = saving.load_saved(tmp_path / "m", digits.model().data)
    one = compress(model, decode(QUANTIZE), cache=caches.Cache(tmp_path / "c"))
    cache = caches.Cache(tmp_path / "c")
    two = compress(model, decode(QUANTIZE), cache=cache)
    assert len(cache.found) == 1
    saving.save(one, tmp_path / "one")
    saving.save(two, tmp_path / "two")
    for name in ("weights.safetensors", "network.pt2", "plan.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_network_that_cannot_be_rebuilt_is_not_kept_and_that_is_said(tmp_path):
    import torch

    class Odd(torch.nn.Linear):
        """Keeps something that is no plain value."""

    model = digits.model()
    changed = digits.example().build().eval()
    changed.classifier = Odd(48, 10)
    cache = caches.Cache(tmp_path)
    result = replace(model, network=replace(model.network, module=changed))
    assert cache.put("k", model, result) is result
    assert "not kept" in cache.notes[0]
    assert not (tmp_path / "k").exists()


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path):
    (tmp_path / "file").write_text("")
    cache = caches.Cache(tmp_path / "file" / "cache")
    done = compress(digits.model(), decode(FOLD), cache=cache)
    assert done.lineage[-1].name == "fold"
    assert "nothing is kept" in cache.notes[0]
