"""GGUF of each family of language models: the real llama.cpp scores the next token as transformers does."""

import dataclasses
import importlib.util
import json
import warnings

import numpy as np
import pytest
from fakes.exportable import llama2c_tokenizer

from edgekit import device_profiles, workload
from edgekit.errors import ExportError, ParityError, UsageError
from edgekit.export import export, families, llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="the GGUF exporter reads Hugging Face folders")

VOCABULARY = 300
LETTERS = 3 + 256
"""Tokens before are marks and bytes."""
PLAIN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "max_position_embeddings": 1024, "original_max_position_embeddings": 256,
    "rope_scaling": {"type": "longrope", "short_factor": [1 + 0.1 * n for n in range(8)],
                     "long_factor": [1.5 + n for n in range(8)]},
}  # fmt: skip
WINDOWS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA2 = {**WINDOWS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
GEMMA3 = {**WINDOWS, "num_hidden_layers": 6, "rope_theta": 5e4, "rope_local_base_freq": 700.0}
KINDS = {
    "llama": ("llama", {"attention_bias": True}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-yarn": ("qwen3", {"head_dim": 32, "rope_scaling": {**YARN, "attention_factor": 1.5}}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-largest": ("gemma2", {**GEMMA2, "num_hidden_layers": 46, "hidden_size": 96, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-linear": ("gemma3_text", {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {**LONGROPE, "sliding_window": None}),
}


def network_of(kind, changes):
    """Return a network whose every tensor matters: norms off one, biases off zero, scores far apart."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(kind, **{**PLAIN, **changes})
        network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        elif name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter))
        else:
            parameter.data.mul_(8)
    return network


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory):
    """Return a network, its folder, and the sealed variant of that with the file's path."""
    place = tmp_path_factory.mktemp(request.param)
    network, folder = saved(place / "model", *KINDS[request.param])
    variant = seal(folder, place / "b", "f32")
    return network, folder, variant, place / "b" / variant.main


def saved(folder, kind, changes):
    network = network_of(kind, changes)
    network.save_pretrained(folder)
    (folder / "tokenizer.bin").write_bytes(llama2c_tokenizer(VOCABULARY))
    return network, folder


def seal(folder, out, precision):
    (row,) = export(workload.load(str(folder)), [device_profiles.load("llama-cpp")], out, precision=precision).rows
    if row.error:
        raise row.error
    return row.variant


def test_the_file_holds_the_network(family):
    parity = family[2].parity
    assert parity.sqnr_db > 120
    if importlib.util.find_spec("xllamacpp") is None:
        assert parity.status == "evaluated"
    else:
        assert parity.status == "checked"
        assert "in 16 places, where 0.0001 is allowed" in parity.reason


@pytest.mark.parametrize("kind", ["llama-llama3", "qwen2", "gemma3", "phi3"])
def test_integers_hold_it_nearly(kind, tmp_path):
    _, folder = saved(tmp_path / "model", *KINDS[kind])
    assert seal(folder, tmp_path / "b", "q8_0").parity.sqnr_db > 27


def test_llama_cpp_scores_the_next_token_as_transformers_does(family):
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    network, _, _, main = family
    assert divergence(xllamacpp, network, main, length=61) < 2e-5  # keys and values are cached as halves


def test_llama_cpp_takes_longropes_other_numbers_beyond_the_first_context(tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    network, folder = saved(tmp_path / "model", *KINDS["phi3-longrope"])
    main = tmp_path / "b" / seal(folder, tmp_path / "b", "f32").main
    assert divergence(xllamacpp, network, main, length=300, context=512) < 2e-5
    tokens = torch.arange(300).unsqueeze(0) % VOCABULARY
    with torch.no_grad():
        computed = torch.from_numpy(llama.logits(main, tokens.numpy()))
        assert (computed - network(tokens).logits).abs().max() < 1e-3


def divergence(xllamacpp, network, main, length, context=256):
    """Return KL from transformers' probabilities of the next token to llama.cpp's, at the last place it tells them."""
    tokens = [1, *((n * 7919 + 3) % VOCABULARY for n in range(length - 1))]
    with torch.no_grad():
        scores = torch.log_softmax(network(torch.tensor([tokens])).logits[0].double(), -1).numpy()
    # where the text ends, or half a character comes, llama.cpp tells no scores
    end = max(place for place, row in enumerate(scores) if row.argmax() >= LETTERS)
    assert end > length / 3
    return float((np.exp(scores[end]) * (scores[end] - next_scores(xllamacpp, main, tokens[: end + 1], context))).sum())


def next_scores(xllamacpp, main, tokens, context):
    settings = xllamacpp.CommonParams()
    settings.model.path = str(main)
    settings.n_ctx, settings.n_parallel, settings.verbosity = context, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup = settings.fit_params = settings.ui = settings.endpoint_slots = False
    server = xllamacpp.Server(settings)
    answer = server.handle_completions({"prompt": tokens, "max_tokens": 1, "logprobs": VOCABULARY, "temperature": 0.0})
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(found) == VOCABULARY
    scores = np.zeros(VOCABULARY)
    scores[[one["id"] for one in found]] = [one["logprob"] for one in found]
    return scores


@pytest.mark.parametrize(
    ("kind", "family", "fault"),
    [
        ("llama", "LlamaForCausalLM", {"interleaved": False}),
        ("gemma", "GemmaForCausalLM", {"norm_offset": 0.0}),
        ("qwen2-yarn", "Qwen2ForCausalLM", {"interleaved": True}),
    ],
)
def test_a_fault_that_reading_undoes_is_found_by_llama_cpp(tmp_path, monkeypatch, kind, family, fault):
    pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    _, folder = saved(tmp_path / "model", *KINDS[kind])
    changed = dataclasses.replace(families.FAMILIES[family], **fault)
    monkeypatch.setattr(families, "FAMILIES", {family: changed})
    with pytest.raises(ParityError, match=r"llama\.cpp computes something else"):
        seal(folder, tmp_path / "b", "f32")
    assert not (tmp_path / "b").exists()


def test_a_window_becomes_the_context(tmp_path):
    network_of(*KINDS["mistral-window"]).save_pretrained(tmp_path)
    assert families.read_shape(tmp_path).context == 64


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gemma", {"tie_word_embeddings": False}, "no output matrix of its own"),
        ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 224}, "has query_pre_attn_scalar 16, this one 224"),
        ("gemma2", {**GEMMA2, "attn_logit_softcapping": None}, "caps attention scores; .* is None"),
        ("gemma3", {**WINDOWS, "attn_logit_softcapping": 50.0}, "does not cap attention scores; .* is 50"),
        ("gemma3", {**WINDOWS, "layer_types": ["full_attention"] * 2}, "all tokens in every 6. block"),
        ("gemma3", {**WINDOWS, "sliding_window_pattern": 4}, "all tokens in every 6. block"),
        ("gemma3", {**WINDOWS, "use_bidirectional_attention": True}, "looks back only"),
        ("qwen2", {"hidden_act": "relu"}, "computes silu, this one 'relu'"),
        ("qwen2", {"rope_scaling": LLAMA3}, "Qwen2ForCausalLM has no rope scaling 'llama3'"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "Phi3ForCausalLM has no rope scaling 'yarn'"),
        ("qwen3", {"rope_scaling": {"rope_type": "proportional"}}, "has no rope scaling 'proportional'"),
        ("qwen3", {"rope_scaling": {**YARN, "beta_fast": 16}}, "has beta_fast 32 in every file, this model has 16"),
        ("qwen3", {"rope_scaling": {**YARN, "truncate": False}}, "has truncate True in every file"),
        ("qwen3", {"rope_scaling": {**YARN, "section": [1]}}, "'yarn' with section is not known"),
        ("gpt2", {}, "written for LlamaForCausalLM, .*Gemma3ForCausalLM, .*; this is GPT2LMHeadModel"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(tmp_path, kind, changes, told):
    known = {family.arch: architecture for architecture, family in families.FAMILIES.items()}
    config = {**PLAIN, "architectures": [known.get(kind, "GPT2LMHeadModel")], **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=told):
        families.read_shape(tmp_path)


def test_rotations_are_read_as_transformers_5_writes_them_too(tmp_path):
    old = {**PLAIN, **GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {name: value for name, value in old.items() if not name.startswith("rope")} | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        }
    }
    shapes = []
    for config in (old, new):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma3ForCausalLM"]}))
        shapes.append(families.read_shape(tmp_path))
    assert shapes[0] == shapes[1]
    assert (shapes[1].theta, shapes[1].window_theta, shapes[1].scaling.factor) == (5e4, 700.0, 8.0)


@pytest.mark.parametrize("lacking", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_a_scaling_without_its_numbers_is_told(tmp_path, lacking):
    rope = {name: value for name, value in LLAMA3.items() if name != lacking}
    config = {**PLAIN, "architectures": ["LlamaForCausalLM"], "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=lacking):
        families.read_shape(tmp_path)
