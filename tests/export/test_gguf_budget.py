"""Types of tensors are chosen under a size by what narrowing costs in KL; the header is read without its lists."""

import struct

import gguf
import numpy as np
import pytest
from fakes.exportable import llama_folder

from edgekit import device_profiles, workload
from edgekit.errors import UsageError
from edgekit.export import budget, export, gguf_file, llama
from edgekit.export.parity import limit_of
from edgekit.model import Data, Split

torch = pytest.importorskip("torch")
TOKENS = ((np.arange(8 * 32) * 31 + 5) % 300).reshape(8, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama"))


def seal(folder, out, precision, tokens=TOKENS):
    data = None if tokens is None else Data(Split({"input_ids": tokens}))
    model = workload.load(str(folder), data=data)
    return export(model, [device_profiles.load("llama-cpp")], out, precision=precision).rows[0]


@pytest.fixture(scope="module")
def sealed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sealed") / "b"
    row = seal(folder, out, "6.5bpw")
    assert row.error is None, row.error
    return out / row.variant.main, row.variant


def group(name, weights, worst):
    costs = dict(zip(budget.TYPES, (1.0, 0.8, 0.25, 0.2, 0.01), strict=True))
    return budget.Group(name, (name,), weights, {kind: worst * cost for kind, cost in costs.items()})


def test_bits_go_where_they_lower_kl_most():
    groups = [group("cheap", 1024, 0.01), group("dear", 1024, 1.0)]
    assert budget.spend(groups, 0, 2048, 6.5) == {"cheap": "Q4_0", "dear": "Q8_0"}
    assert budget.spend(groups, 0, 2048, 8.5) == {"cheap": "Q8_0", "dear": "Q8_0"}


def test_a_group_that_loses_nothing_gets_nothing():
    assert budget.spend([group("free", 1024, 0.0)], 0, 1024, 8.5) == {"free": "Q4_0"}


def test_too_few_bits_are_refused_with_the_least():
    with pytest.raises(UsageError) as caught:
        budget.spend([group("one", 1024, 1.0)], 32 * 64, 1024 + 64, 4.5)
    least = float(caught.value.hint.removeprefix("the least is ").removesuffix("bpw"))
    assert budget.spend([group("one", 1024, 1.0)], 32 * 64, 1024 + 64, least) == {"one": "Q4_0"}
    with pytest.raises(UsageError):
        budget.spend([group("one", 1024, 1.0)], 32 * 64, 1024 + 64, least - 0.01)


def test_the_file_keeps_to_its_size_and_mixes_types(sealed):
    path, variant = sealed
    tensors = gguf.GGUFReader(path).tensors
    bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
    assert 6.0 < bits <= 6.5
    assert len({t.tensor_type.name for t in tensors}) > 2
    assert any("by measured KL: " in note for note in variant.notes)
    assert variant.precision == "6.5bpw"


def test_without_text_or_with_one_window_the_choice_is_refused(folder, tmp_path):
    for tokens in (None, TOKENS[:1]):
        error = seal(folder, tmp_path / "b", "6.5bpw", tokens).error
        assert isinstance(error, UsageError)
        assert "calibration text" in error.message


def test_the_text_that_chooses_is_not_the_text_that_weighs():
    weighs, chooses = budget.apart(Split({"input_ids": TOKENS}))
    assert np.array_equal(np.concatenate([weighs.inputs["input_ids"], chooses.inputs["input_ids"]]), TOKENS)
    assert len(chooses) == 2


def test_mixed_files_are_judged_by_their_bits():
    assert limit_of("4.6bpw") == limit_of("q4_0")
    assert limit_of("6bpw") == limit_of("q5_0")
    assert limit_of("8.5bpw") == limit_of("q8_0")


def test_the_quick_reader_finds_what_ggufs_own_finds(sealed):
    path, _ = sealed
    quick, own = gguf_file.opened(path), gguf.GGUFReader(path)
    assert quick.data_offset == own.data_offset
    assert list(quick.fields) == list(own.fields)
    for ours, theirs in zip(quick.tensors, own.tensors, strict=True):
        assert (ours.name, ours.tensor_type, ours.data_offset) == (theirs.name, theirs.tensor_type, theirs.data_offset)
    assert quick.fields["general.architecture"].contents() == "llama"


def test_a_list_that_leaves_the_file_is_damage(sealed, tmp_path):
    content = bytearray(sealed[0].read_bytes())
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    content[at : at + 8] = struct.pack("<Q", 1 << 40)
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises((ValueError, KeyError, IndexError, OSError)):
        gguf_file.opened(tmp_path / "bad.gguf")


def test_a_file_is_computed_without_its_blocks_staying_in_memory(sealed):
    network = llama.network_of(sealed[0])
    with torch.no_grad():
        first, second = (network(torch.as_tensor(TOKENS[:2])).logits for _ in range(2))
    assert torch.equal(first, second)
    assert {p.device.type for p in network.model.layers.parameters()} == {"meta"}
