"""GGUF of each family of language models: the real llama.cpp scores the next token as transformers does."""

import importlib.util
import warnings

import numpy as np
import pytest
from fakes.exportable import llama2c_tokenizer

from edgekit import device_profiles, workload
from edgekit.errors import ExportError
from edgekit.export import export, families

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
KINDS = {
    "llama3-scaling": ("llama", {"rope_scaling": LLAMA3}),
    "linear-scaling": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "yarn-scaling": ("qwen2", {"rope_scaling": YARN}),
    "llama": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 6},
    ),
    "phi3": ("phi3", {}),
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
    folder = tmp_path_factory.mktemp(request.param) / "model"
    network = network_of(*KINDS[request.param])
    network.save_pretrained(folder)
    (folder / "tokenizer.bin").write_bytes(llama2c_tokenizer(VOCABULARY))
    return network, folder


def seal(folder, out, precision):
    (row,) = export(workload.load(str(folder)), [device_profiles.load("llama-cpp")], out, precision=precision).rows
    if row.error:
        raise row.error
    return row.variant


@pytest.mark.parametrize(("precision", "least"), [("f32", 120), ("q8_0", 27)])
def test_the_file_holds_the_network(family, tmp_path, precision, least):
    parity = seal(family[1], tmp_path / "b", precision).parity
    assert parity.status == ("checked" if importlib.util.find_spec("xllamacpp") else "evaluated")
    assert parity.sqnr_db > least


def test_llama_cpp_scores_the_next_token_as_transformers_does(family, tmp_path):
    network, folder = family
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    main = tmp_path / "b" / seal(folder, tmp_path / "b", "f32").main
    tokens = [1, *((n * 7919 + 3) % VOCABULARY for n in range(60))]
    with torch.no_grad():
        scores = torch.log_softmax(network(torch.tensor([tokens])).logits[0], -1).numpy()
    ends = [place for place, row in enumerate(scores) if row.argmax() >= LETTERS]
    want = scores[ends[-1]]  # where the text ends, or half a character comes, llama.cpp tells no scores
    got = next_scores(xllamacpp, main, tokens[: ends[-1] + 1])
    assert ends[-1] > 20
    assert got.argmax() == want.argmax()
    assert np.abs(got - want).max() < 0.05  # keys and values are cached as halves


def next_scores(xllamacpp, main, tokens):
    settings = xllamacpp.CommonParams()
    settings.model.path = str(main)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 128, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup = settings.fit_params = settings.ui = settings.endpoint_slots = False
    server = xllamacpp.Server(settings)
    answer = server.handle_completions({"prompt": tokens, "max_tokens": 1, "logprobs": VOCABULARY, "temperature": 0.0})
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(found) == VOCABULARY
    scores = np.zeros(VOCABULARY)
    scores[[one["id"] for one in found]] = [one["logprob"] for one in found]
    return scores


def test_a_window_becomes_the_context(tmp_path):
    network_of(*KINDS["mistral-window"]).save_pretrained(tmp_path)
    assert families.read_shape(tmp_path).context == 64


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gemma", {"tie_word_embeddings": False}, "no output matrix of its own"),
        ("gemma2", {"query_pre_attn_scalar": 224, "head_dim": 16}, "divides scores by the root of 16"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "sees all in every layer of 6"),
        ("qwen2", {"hidden_act": "relu"}, "computes silu, this one 'relu'"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not written; linear, llama3, yarn are"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 16}}, "'yarn' with beta_fast"),
        ("gpt2", {}, "written for LlamaForCausalLM, .*; this is GPT2LMHeadModel"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(tmp_path, kind, changes, told):
    import json

    known = {name: architecture for architecture, one in families.FAMILIES.items() for name in (one.arch,)}
    config = {**PLAIN, "architectures": [known.get(kind, "GPT2LMHeadModel")], **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=told):
        families.read_shape(tmp_path)
