"""From a text to the numbers of its tokens, as on the workstation. Knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import HealthError, InputError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgekit.manifest import TextPreprocess
    from edgekit.tensors import Array

MAX_CHARACTERS = 1 << 20
"""A longer text is refused: it is tokenized whole before it is cut."""


class _Described(msgspec.Struct):
    """As much of a ``tokenizer.json`` as tells that it is one; its package says of others only that they fail."""

    model: dict[str, object]


class TextReader:
    """The tokenizer of a bundle. Thread-safe."""

    def __init__(self, path: Path, how: TextPreprocess) -> None:
        with extra("text"):
            from tokenizers import Tokenizer
        self._how = how
        try:
            content = path.read_text(encoding="utf-8")
            msgspec.json.decode(content, type=_Described)
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise HealthError(f"{path.name} is no tokenizer: {error}", "export the bundle again") from error
        self._tokenizer = Tokenizer.from_str(content)
        self._tokenizer.no_padding()
        side = (self._tokenizer.truncation or {}).get("direction", "right")
        self._tokenizer.enable_truncation(how.tokens, direction=side)

    def read(self, texts: Sequence[str]) -> dict[str, Array]:
        """Return the inputs of one sample, each [1, tokens], of one text or of a pair.

        Raises:
            InputError: no text, three, more than ``MAX_CHARACTERS``, or what is no Unicode.
        """
        import numpy as np

        if not 1 <= len(texts) <= 2:
            raise InputError(f"{len(texts)} texts are no sample", "give one text, or a pair")
        if max(map(len, texts)) > MAX_CHARACTERS:
            raise InputError(f"the text has {max(map(len, texts))} characters, more than {MAX_CHARACTERS}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is no Unicode: {error.reason}", "give it in UTF-8") from error
        pair = texts if all(texts[1:]) else texts[:1]  # transformers takes an empty second text for none
        found = self._tokenizer.encode(*pair)
        how, read = self._how, {}
        for name, values in ((how.ids, found.ids), (how.mask, found.attention_mask), (how.types, found.type_ids)):
            if name:
                read[name] = np.zeros((1, how.tokens), np.int64)
                read[name][0, : len(values)] = values[: how.tokens]  # of two tokens, special ones alone are three
        return read
