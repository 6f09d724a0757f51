"""A network whose blocks have weights while they compute only answers as the whole one does."""

import pytest
from fakes.exportable import llama_folder

from edgekit import blockwise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("is_tied", [True, False])
def test_it_answers_as_transformers_own_and_holds_no_block(tmp_path, is_tied):
    folder = llama_folder(tmp_path / "llama", tie_word_embeddings=is_tied)
    network = blockwise.of_folder(folder)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(network(tokens, use_cache=False).logits, whole(tokens, use_cache=False).logits)
    assert {p.device.type for p in network.model.layers.parameters()} == {"meta"}


def test_a_folder_with_other_names_is_opened_whole(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    whole = transformers.GPT2LMHeadModel(config).eval()
    whole.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(blockwise.of_folder(tmp_path)(tokens).logits, whole(tokens).logits)
