"""GGUF: names, row order and numbers survive; the real llama.cpp says what the float network says."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from fakes.exportable import llama_folder, rewrite_config

from edgekit import bundle, device_profiles, runtime, workload
from edgekit.cli import cli
from edgekit.errors import ExportError, ParityError, UsageError
from edgekit.export import export, families, llama, spoken, vocabulary
from edgekit.export.targets.gguf import tensor_type
from edgekit.runtime.backends import Sampling

STORIES = Path(__file__).parents[2].parent / "shared/data/stories260k/hf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama"))


def seal(folder, out, precision="q8_0"):
    return export(workload.load(str(folder)), [device_profiles.load("llama-cpp")], out, precision=precision)


def only(result):
    assert result.rows[0].error is None, result.rows[0].error.message
    return result.rows[0].variant


@pytest.mark.parametrize(
    ("precision", "least"),
    [("f32", 150), ("f16", 55), ("bf16", 35), ("q8_0", 27), ("q5_1", 15), ("q5_0", 14), ("q4_1", 8), ("q4_0", 8)],
)
def test_every_precision_keeps_the_logits(folder, tmp_path, precision, least):
    variant = only(seal(folder, tmp_path / "b", precision))
    assert variant.precision == precision
    assert variant.parity.status == ("checked" if importlib.util.find_spec("xllamacpp") else "evaluated")
    assert variant.parity.sqnr_db > least


def test_a_file_that_llama_cpp_reads_otherwise_is_refused(folder, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    main = tmp_path / "b" / only(seal(folder, tmp_path / "b", "f16")).main
    tokens = np.random.default_rng(0).integers(3, 200, (2, 24))
    logits = llama.logits(main, tokens)
    said = spoken.agreed(main, "f16", tokens, logits)
    assert re.search(r"gives the same next tokens, KL at most [\d.e-]+ in 8 places, where 0.001 is allowed", said)
    header = gguf.GGUFReader(main, "r+").fields["llama.rope.freq_base"]
    header.parts[header.data[0]][0] = 3.0
    with pytest.raises(ParityError, match=r"llama.cpp computes something else from model.gguf than its bytes say"):
        spoken.agreed(main, "f16", tokens, logits)


def test_precision_is_case_blind_and_an_unknown_one_is_refused(folder, tmp_path):
    assert only(seal(folder, tmp_path / "b", "Q8_0")).precision == "q8_0"
    error = seal(folder, tmp_path / "c", "q4_k_x").rows[0].error
    assert isinstance(error, UsageError)
    assert "q4_0" in error.hint


def test_rows_that_blocks_do_not_divide_fall_back_and_the_note_says_so(tmp_path):
    odd = llama_folder(tmp_path / "odd", intermediate_size=172)
    variant = only(seal(odd, tmp_path / "b", "q4_0"))
    assert variant.notes[0].endswith("(rows of 172 are no multiple of 32)")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "b" / variant.main).tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16"
    assert stored["blk.0.ffn_up.weight"] == "Q4_0"
    assert stored["token_embd.weight"] == "Q8_0"
    assert stored["output_norm.weight"] == "F32"
    assert variant.weights == stored
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "b")]).output
    assert re.search(r"\| blk\.0\.ffn_down\.weight +\| F16 +\|", shown)


def test_types_follow_the_rule():
    assert tensor_type("output_norm.weight", (64,), "q4_0") == "F32"
    assert tensor_type("blk.0.attn_q.weight", (64, 64), "f16") == "F16"
    assert tensor_type("blk.0.attn_q.weight", (64, 64), "f32") == "F32"
    assert tensor_type("output.weight", (300, 64), "q8_0") == "Q8_0"


def test_biases_and_tied_embeddings_survive(tmp_path):
    variant = only(
        seal(llama_folder(tmp_path / "m", attention_bias=True, tie_word_embeddings=True), tmp_path / "b", "f32")
    )
    assert variant.parity.sqnr_db > 150


def test_the_real_llama_cpp_continues_as_the_float_network_does(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    if not STORIES.is_dir():
        pytest.skip("needs the stories260k model in ../shared/data")
    result = seal(STORIES, tmp_path / "b", "f32")
    (prompt, answer), *_ = result.bundle.manifest.golden.prompts
    assert prompt + answer == greedy(prompt, 16)
    with runtime.load(tmp_path / "b") as session:
        pieces = session.complete(prompt, Sampling(max_tokens=16, temperature=0.0))
        assert "".join(p.text for p in pieces) == answer


def greedy(prompt, count):
    """Continue with transformers alone, tokens taken from llama2.c's file by hand."""
    import torch
    from transformers import LlamaForCausalLM

    words = vocabulary.read(STORIES, 512)
    pieces = list("▁" + prompt.replace(" ", "▁"))
    while True:  # SentencePiece: merge the pair with the best score until none is a token
        scored = [
            (words.scores[words.tokens.index(a + b)], -i)
            for i, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in words.tokens
        ]
        if not scored:
            break
        at = -max(scored)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    tokens = [1, *[words.tokens.index(p) for p in pieces]]
    network = LlamaForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
    return "".join(words.tokens[t] for t in tokens[1:]).replace("▁", " ").strip()


def test_reordering_rows_is_undone_by_its_inverse():
    rows = np.arange(24 * 5).reshape(24, 5)
    assert np.array_equal(llama._halve(llama._interleave(rows, 3), 3), rows)
    # Head of 8 rows: Hugging Face's halves 0..3 and 4..7 become neighbours.
    assert llama._interleave(np.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "Qwen3ForCausalLM.*this is BloomForCausalLM"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8}}, "'longrope'"),
    ],
)
def test_what_a_plain_llama_cannot_hold_is_refused(folder, tmp_path, change, told):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rewrite_config(other, **change)
    with pytest.raises(ExportError, match=told):
        families.read_shape(other)


def test_a_damaged_folder_is_told(folder, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    shape = families.read_shape(other)
    (other / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(UsageError, match="damaged"):
        list(llama.tensors(other, shape))
    (other / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no .safetensors"):
        list(llama.tensors(other, shape))
    (other / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="vocab_size"):
        workload_export(other, tmp_path)
    (other / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UsageError, match="does not describe a language model"):
        families.read_shape(other)


def workload_export(folder, tmp_path):
    return seal(folder, tmp_path / "never")


def test_a_tensor_without_a_place_is_named(folder):
    with pytest.raises(ExportError, match=r"'model.layers.0.moe.gate.weight'"):
        llama.to_gguf("model.layers.0.moe.gate.weight", np.zeros((4, 4)), families.read_shape(folder))


def test_a_bundle_of_a_language_model_says_so(folder, tmp_path):
    seal(folder, tmp_path / "b")
    manifest = bundle.read(tmp_path / "b").manifest
    assert manifest.task == "text-generation"
    assert manifest.inputs == ()


# Tokenizers


def test_llama2c_tokens_keep_scores_and_get_their_types(folder):
    words = vocabulary.read(folder, 300)
    assert words.tokens[:4] == ("<unk>", "<s>", "</s>", "<0x00>")
    assert words.types[:4] == (vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL, vocabulary.BYTE)
    assert "▁" in words.tokens
    assert words.scores[5] == -5.0
    assert (words.bos, words.eos) == (1, 2)


@pytest.mark.parametrize(
    "data", [b"\7\0\0\0\0\0\0\0\xff\xff\xff\x7fab", b"\7\0\0\0\0\0", b"\7\0\0\0\0\0\0\0\2\0\0\0\xff\xfe"]
)
def test_a_damaged_llama2c_tokenizer_is_told(tmp_path, data):
    (tmp_path / "tokenizer.bin").write_bytes(data)
    with pytest.raises(UsageError, match=r"no llama2.c tokenizer"):
        vocabulary.read(tmp_path, 8)


def test_fewer_tokens_than_the_network_are_filled_up_and_more_are_refused(folder):
    words = vocabulary.read(folder, 310)
    assert words.tokens[-1] == "[PAD309]"
    assert words.types[-1] == vocabulary.UNUSED
    assert len(words.scores) == 310
    with pytest.raises(ExportError, match="300 tokens, the network 200"):
        vocabulary.read(folder, 200)


def test_a_folder_without_a_tokenizer_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "deep").mkdir()
    with pytest.raises(ExportError, match="no tokenizer") as caught:
        vocabulary.read(tmp_path / "deep", 8)
    assert "tokenizer.json" in caught.value.hint


def write_json(folder, **changes):
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "pre_tokenizer": {"type": "ByteLevel"},
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}],
        **changes,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))


def test_a_byte_level_tokenizer_keeps_merges_and_template(tmp_path):
    write_json(tmp_path)
    words = vocabulary.read(tmp_path, 4)
    assert (words.model, words.pre, words.merges) == ("gpt2", "gpt-2", ("a b",))
    assert words.tokens == ("a", "b", "ab", "<|end|>")
    assert words.types[3] == vocabulary.CONTROL
    assert words.eos == 3
    assert words.chat_template == "{{ messages }}"


def test_byte_tokens_not_a_setting_tell_sentencepiece_from_byte_level(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 2}
    write_json(tmp_path, model={"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": ["a b"]})
    words = vocabulary.read(tmp_path, 4)
    assert (words.model, words.merges) == ("gpt2", ("a b",))


def test_a_chat_template_in_a_file_of_its_own_is_found(tmp_path):
    write_json(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ of its own }}")
    assert vocabulary.read(tmp_path, 4).chat_template == "{{ of its own }}"


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}, "smollm"),
        ({"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}"}}, "llama-bpe"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"}},
                    {"type": "ByteLevel"},
                ],
            },
            "qwen2",
        ),
    ],
)
def test_the_way_text_is_cut_is_known_by_its_description(tmp_path, pre, name):
    write_json(tmp_path, pre_tokenizer=pre)
    assert vocabulary.read(tmp_path, 4).pre == name


def test_an_unknown_cut_or_model_or_numbering_is_refused(tmp_path):
    write_json(tmp_path, pre_tokenizer={"type": "Metaspace"})
    with pytest.raises(ExportError, match="no name for"):
        vocabulary.read(tmp_path, 4)
    write_json(tmp_path, model={"type": "Unigram"})
    with pytest.raises(ExportError, match="Unigram"):
        vocabulary.read(tmp_path, 4)
    write_json(tmp_path, added_tokens=[{"id": 9, "content": "x"}])
    with pytest.raises(UsageError, match="with gaps"):
        vocabulary.read(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        vocabulary.read(tmp_path, 4)


def test_merges_of_a_sentencepiece_tokenizer_become_scores_in_their_order(tmp_path):
    vocab = {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "ab": 4, "abb": 5}
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": [["a", "b"], ["ab", "b"]]}
    write_json(tmp_path, model=model, added_tokens=[])
    words = vocabulary.read(tmp_path, 6)
    assert words.model == "llama"
    assert words.scores[4] > words.scores[5] > words.scores[2]
    assert words.types[:2] == (vocabulary.UNKNOWN, vocabulary.BYTE)


def test_a_sentencepiece_model_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a little girl\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, byte_fallback=True, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    words = vocabulary.read(tmp_path, 300)
    assert words.types[:3] == (vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL)
    assert words.types[3] == vocabulary.BYTE
    assert (words.bos, words.eos) == (1, 2)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="SentencePiece"):
        vocabulary.read(tmp_path, 300)


def test_a_file_that_llama_cpp_refuses_is_not_sealed_although_its_bytes_compute(folder, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    monkeypatch.setattr("edgekit.export.targets.gguf._add_vocabulary", lambda writer, words: None)
    error = seal(folder, tmp_path / "b").rows[0].error
    assert isinstance(error, ParityError)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("first", [True, False])
def test_whether_text_begins_with_a_space_is_taken_from_the_sentencepiece_model(tmp_path, first):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a little girl\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, byte_fallback=True, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=first,
    )  # fmt: skip
    assert vocabulary.read(tmp_path, 300).add_space_prefix is first


@pytest.mark.parametrize(
    ("normalizer", "pre", "first"),
    [
        ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace"}]}, None, True),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, None, False),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}, True),
        (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}, False),
    ],
)
def test_whether_text_begins_with_a_space_is_taken_from_tokenizer_json(tmp_path, normalizer, pre, first):
    vocab = {"<unk>": 0, "<0x0A>": 1, "a": 2}
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []}
    write_json(tmp_path, model=model, added_tokens=[], normalizer=normalizer, pre_tokenizer=pre)
    assert vocabulary.read(tmp_path, 3).add_space_prefix is first


def test_tokens_that_the_settings_add_are_taken_with_their_kind(tmp_path):
    write_json(tmp_path)
    added = {"4": {"content": "<|user|>", "special": True}, "5": {"content": "word", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    words = vocabulary.read(tmp_path, 7)
    assert words.tokens[3:] == ("<|end|>", "<|user|>", "word", "[PAD6]")
    assert words.types[4:] == (vocabulary.CONTROL, vocabulary.USER_DEFINED, vocabulary.UNUSED)
    with pytest.raises(ExportError, match="adds token 5, the network has 5"):
        vocabulary.read(tmp_path, 5)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"x": {}}}))
    with pytest.raises(UsageError, match="damaged"):
        vocabulary.read(tmp_path, 7)
