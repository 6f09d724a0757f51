"""Turns text into token numbers, with the tokenizer of a Hugging Face folder or of llama2.c. Knows no splits."""

from __future__ import annotations

import functools
import itertools
import re
import struct
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import UsageError
from edgekit.plugins import extra
from edgekit.sources import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgekit.tensors import Array

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt")


class Tokenizer(Protocol):
    """Text in, numbers out. ``bos`` begins a document where the tokenizer has such a token."""

    bos: int | None

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text, without special tokens."""
        ...

    def framed(self, texts: Sequence[str], most: int) -> list[int]:
        """Return one or two texts as an encoder wants them, special tokens included, at most ``most``."""
        ...

    def written(self, most: int) -> bytes | None:
        """Return it as a ``tokenizer.json`` that frames texts alike on a device; None where that cannot be."""
        ...


def is_there(folder: Path) -> bool:
    """Say whether a folder has a tokenizer of Hugging Face."""
    return any((folder / name).is_file() for name in FILES)


def read(folder: Path) -> Tokenizer:
    """Read a folder's tokenizer; llama2.c's ``tok*.bin`` may also lie beside the folder.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if is_there(folder):
        return _HuggingFace(folder)
    for path in (*sorted(folder.glob("tok*.bin")), *sorted(folder.resolve().parent.glob("tok*.bin"))):
        return _Llama2c(path)
    raise UsageError(
        f"{folder} has no tokenizer", f"name a folder with {', '.join(FILES[:2])} or llama2.c's tok*.bin as tokenizer"
    )


def padded(rows: Sequence[Sequence[int]], length: int) -> dict[str, Array]:
    """Return ``input_ids`` and ``attention_mask`` [rows, length] in int64, with zeros behind each row."""
    import numpy as np

    numbers, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for row, found in enumerate(rows):
        numbers[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return {"input_ids": numbers, "attention_mask": mask}


class _HuggingFace:
    def __init__(self, folder: Path) -> None:
        with extra("compress"):
            from transformers import AutoTokenizer
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
        self._tokenizer.model_max_length = 1 << 30  # it would warn of long texts, which are cut here
        self.bos: int | None = self._tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        """Leave out what marks the ends."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def framed(self, texts: Sequence[str], most: int) -> list[int]:
        """Cut the longer text first, as the tokenizer does."""
        return list(self._tokenizer(*texts, truncation=True, max_length=most)["input_ids"])[:most]

    def written(self, most: int) -> bytes | None:
        """Say at which end texts are cut; filling up is the reader's."""
        if not self._tokenizer.is_fast:
            return None
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        copy.enable_truncation(most, direction=self._tokenizer.truncation_side)
        copy.no_padding()
        return str(copy.to_str(pretty=True)).encode()


class _Llama2c:
    """Byte-pair merges by score; a token never reaches over a space, so words are encoded one by one."""

    bos: int | None = 1

    def __init__(self, path: Path) -> None:
        scores: dict[bytes, tuple[float, int]] = {}
        data = path.read_bytes()
        offset = 4
        try:
            while offset < len(data):
                score, length = struct.unpack_from("<fi", data, offset)
                offset += 8 + length
                scores.setdefault(data[offset - length : offset], (score, len(scores)))
        except struct.error as error:
            raise UsageError(f"{path} is no llama2.c tokenizer: {error}", "fetch it again") from error
        if len(scores) < 259:
            raise UsageError(f"{path} is no llama2.c tokenizer: it has {len(scores)} tokens", "fetch it again")
        self._word = functools.lru_cache(1 << 16)(functools.partial(_merged, scores))

    def encode(self, text: str) -> list[int]:
        """Put the space in front that SentencePiece puts there."""
        words = re.findall(r" ?[^ \n]+| |\n", f" {text}")
        return [number for word in words for number in self._word(word)]

    def framed(self, texts: Sequence[str], most: int) -> list[int]:
        """Begin with the token that begins a text."""
        return [1, *(number for text in texts for number in self.encode(text))][:most]

    def written(self, most: int) -> None:
        """It has no such form."""
        del most


def _merged(scores: Mapping[bytes, tuple[float, int]], word: str) -> tuple[int, ...]:
    """Join the pair with the best score until no pair is a token (Sennrich, Haddow, Birch 2016, by score)."""
    parts: list[bytes] = []
    for character in word:
        whole = character.encode()
        parts += [whole] if whole in scores else [b"<0x%02X>" % byte for byte in whole]
    while True:
        pairs = [(scores[a + b][0], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            return tuple(scores[part][1] for part in parts)
        place = -max(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
