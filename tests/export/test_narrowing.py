"""What narrowing costs is the KL of the whole network with those matrices rounded, computed block by block or not."""

import gguf
import numpy as np
import pytest
from fakes.exportable import llama_folder

from edgekit.export import blocks, families, narrowing
from edgekit.model import LlamaFolder, Split

torch = pytest.importorskip("torch")
TOKENS = ((np.arange(3 * 24) * 31 + 5) % 300).reshape(3, 24)
MASK = np.tile(np.arange(24) < 20, (3, 1)).astype(np.int64)
TYPES = ("Q4_0", "Q8_0")
OF = {
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "output.weight": "lm_head.weight",
    "token_embd.weight": "model.embed_tokens.weight",
}


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def folder(request, tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama"), tie_word_embeddings=request.param)


def opened(folder):
    samples = Split({"input_ids": TOKENS, "attention_mask": MASK})
    return narrowing.Narrowing(folder, families.read_shape(folder), samples, types=TYPES, columns={})


def words(network):
    with torch.no_grad():
        return torch.log_softmax(network(torch.as_tensor(TOKENS)).logits[torch.as_tensor(MASK).bool()], -1)


def want(folder, names):
    network = LlamaFolder(folder).opened()
    before = words(network)
    for name in names:
        weight = network.get_parameter(OF[name])
        stored = blocks.quantize(weight.detach().numpy().copy(), "Q4_0", None)
        weight.data = torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_0))
    return float((before.exp() * (before - words(network))).sum(-1).mean())


@pytest.mark.parametrize("names", [("blk.0.ffn_down.weight", "blk.1.attn_v.weight"), ("token_embd.weight",)])
def test_the_cost_is_that_of_the_whole_network(folder, names, monkeypatch):
    monkeypatch.setattr(narrowing, "AT_ONCE", 7 * 64)  # no divisor of the rows
    cost = opened(folder).cost(names)
    assert cost["Q4_0"] == pytest.approx(want(folder, names), rel=0.05)
    assert 0 < cost["Q8_0"] < cost["Q4_0"] / 50


def test_an_output_matrix_of_its_own_costs_by_itself(folder):
    found = opened(folder)
    if "output.weight" not in found.tensors:
        pytest.skip("this network's output is the embedding")
    assert found.cost(["output.weight"])["Q4_0"] == pytest.approx(want(folder, ["output.weight"]), rel=0.05)


def test_a_second_group_finds_the_first_one_wide_again(folder):
    found = opened(folder)
    first = found.cost(["token_embd.weight"])
    found.cost(["blk.0.ffn_down.weight"])
    assert found.cost(["token_embd.weight"]) == first


def test_scores_that_a_family_caps_are_capped(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=0.5,
    )  # fmt: skip
    network = transformers.Gemma2ForCausalLM(config)
    network.save_pretrained(tmp_path)
    found = opened(tmp_path)
    got = torch.cat([found._log_words(row[:20]) for row in found._float])
    want = words(LlamaFolder(tmp_path).opened())
    assert torch.allclose(got, want, atol=1e-4)
    found._network.config.final_logit_softcapping = None
    assert not torch.allclose(torch.cat([found._log_words(row[:20]) for row in found._float]), want, atol=1e-3)
