"""Which columns count is gathered from calibration text, and used: by our own blocks, and by llama.cpp's K types."""

import importlib.util

import gguf
import numpy as np
import pytest
from fakes.exportable import llama_folder

from edgekit import device_profiles, workload
from edgekit.errors import MissingExtra, UsageError
from edgekit.export import blocks, export, families, importance
from edgekit.export.parity import limit_of
from edgekit.model import Data, LlamaFolder, Split
from edgekit.progress import silent

torch = pytest.importorskip("torch")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="K types are written by llama-cpp-python, built from source"
)
TOKENS = ((np.arange(6 * 32) * 31 + 5) % 300).reshape(6, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama"), intermediate_size=256, max_position_embeddings=256)


def seal(folder, out, precision, data=None):
    model = workload.load(str(folder), data=data)
    return export(model, [device_profiles.load("llama-cpp")], out, precision=precision).rows[0]


def stored(out, row):
    reader = gguf.GGUFReader(out / row.variant.main)
    return reader, {t.name: t.tensor_type.name for t in reader.tensors}


def text():
    return Data(Split({"input_ids": TOKENS}))


def test_the_matrix_is_the_mean_of_squares_of_what_enters(folder):
    found = importance.gather(folder, families.read_shape(folder), Split({"input_ids": TOKENS}), silent)
    network = LlamaFolder(folder).opened()
    with torch.no_grad():
        last = network.model(torch.as_tensor(TOKENS)).last_hidden_state.reshape(-1, 64)
    want = last.double().square().mean(0).numpy()
    assert np.allclose(found.columns["output.weight"], want, rtol=1e-4)
    assert {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"} < set(found.columns)
    assert found.windows == 6


def test_padding_does_not_count(folder):
    shape = families.read_shape(folder)
    short = importance.gather(folder, shape, Split({"input_ids": TOKENS[:, :20]}), silent)
    mask = np.tile(np.arange(32) < 20, (6, 1)).astype(np.int64)
    masked = importance.gather(folder, shape, Split({"input_ids": TOKENS, "attention_mask": mask}), silent)
    for name, columns in short.columns.items():
        assert np.allclose(masked.columns[name], columns, rtol=1e-3), name


@pytest.mark.parametrize("kind", blocks.BITS)
def test_weighted_blocks_have_less_weighted_error_than_plain_ones(kind):
    random = np.random.default_rng(0)
    array = random.standard_normal((40, 96)).astype(np.float32)
    array[0] = 0
    weights = (random.random(96) ** 4 * 10).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]

    def error(stored):
        return float((weights * (gguf.quants.dequantize(stored, number) - array) ** 2).sum())

    plain, weighted = blocks.quantize(array, kind), blocks.quantize(array, kind, weights)
    assert weighted.shape == plain.shape
    assert error(weighted) < 0.85 * error(plain)


def test_calibration_text_changes_the_file_and_its_keys_say_so(folder, tmp_path):
    blind, seeing = seal(folder, tmp_path / "a", "q4_0"), seal(folder, tmp_path / "b", "q4_0", text())
    assert seeing.error is None, seeing.error
    assert seeing.variant.notes[-1] == "importance matrix: 15 tensors, 6 windows of calibration text"
    reader, _ = stored(tmp_path / "b", seeing)
    assert reader.fields["quantize.imatrix.entries_count"].contents() == 15
    assert reader.fields["quantize.imatrix.chunks_count"].contents() == 6
    assert not any("imatrix" in key for key in stored(tmp_path / "a", blind)[0].fields)


def test_k_types_judge_by_their_bits():
    assert limit_of("q4_k_m") == limit_of("iq4_xs") == limit_of("q4_0")
    assert limit_of("q6_k") == limit_of("q5_0")
    assert limit_of("q2_k").sqnr_db == 0


def test_without_llama_cpp_the_error_gives_the_command_that_builds_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = seal(folder, tmp_path / "b", "q4_k_m").error
    assert isinstance(error, MissingExtra)
    assert error.hint == """CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" pip install 'edgekit[llama-cpp]'"""


def test_types_that_need_the_matrix_are_refused_without_text(folder, tmp_path):
    error = seal(folder, tmp_path / "b", "iq2_xs").error
    assert isinstance(error, UsageError)
    assert "no calibration text" in error.message


@needs_llama_cpp
def test_llama_cpp_writes_k_types_and_the_fallback_is_told(folder, tmp_path, capfd):
    row = seal(folder, tmp_path / "b", "q4_k_m", text())
    assert row.error is None, row.error
    reader, types = stored(tmp_path / "b", row)
    assert types["blk.0.ffn_down.weight"] in ("Q4_K", "Q6_K")
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert "rows of 64 are no multiple of 256" in row.variant.notes[0]
    assert "matrices fell back to" in row.variant.notes[2]
    assert reader.fields["general.file_type"].contents() == 15
    assert reader.fields["quantize.imatrix.entries_count"].contents() == 15
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in (tmp_path / "b" / "llama-cpp").iterdir()) == ["model.gguf"]
