"""A tokenizer of BERT's kind with a vocabulary of letters and three words."""

import json

import pytest

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word_piece(folder):
    """Write BERT's kind of tokenizer: lower case, accents dropped, pieces of words, ends marked."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##ly", *LETTERS, *(f"##{x}" for x in LETTERS)]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
