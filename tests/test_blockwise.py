"""A network whose blocks have weights while they compute only answers as the whole one does."""

import numpy as np
import pytest
from fakes.exportable import llama_folder

from edgekit import blockwise
from edgekit.model import LlamaFolder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("is_tied", [True, False])
def test_it_answers_as_the_whole_one_and_holds_no_block(tmp_path, is_tied):
    folder = llama_folder(tmp_path / "llama", tie_word_embeddings=is_tied)
    network = LlamaFolder(folder).by_blocks()
    whole = LlamaFolder(folder).opened()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(network(tokens, use_cache=False).logits, whole(tokens).logits)
    assert {p.device.type for p in network.model.layers.parameters()} == {"meta"}


def test_a_folder_of_other_names_is_opened_whole(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    whole = transformers.GPT2LMHeadModel(config).eval()
    whole.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    assert blockwise.of_folder(tmp_path) is None
    with torch.no_grad():
        wanted = whole(tokens).logits.numpy()
    found = LlamaFolder(tmp_path).run({"input_ids": tokens.numpy()})["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
