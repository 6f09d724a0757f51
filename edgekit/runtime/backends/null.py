"""Runs nothing: a small JSON file says what it answers. For tests, dry runs and demonstrations without an engine."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import HealthError, InputError, UsageError
from edgekit.runtime.backends import TextPiece
from edgekit.runtime.conversations import Room
from edgekit.tensors import DYNAMIC, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekit.runtime.backends import Backend, EngineOptions, Message, Sampling
    from edgekit.tensors import Array


class NullFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds: the outputs, all filled with ``value``; or ``text``, which echoes the prompt."""

    outputs: tuple[TensorSpec, ...] = ()
    value: float = 0.0
    text: bool = False


class NullEngine:
    """Answers every batch with one value."""

    engine = "null"

    def __init__(self, file: NullFile) -> None:
        self._file: NullFile | None = file

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Fill each output; its batch is that of the first input."""
        import numpy as np

        file = self._file
        if file is None:
            raise UsageError("this null engine is closed", "load the bundle again")
        batch = len(next(iter(inputs.values())))
        return {
            s.name: np.full(tuple(batch if n == DYNAMIC else n for n in s.shape), file.value, s.dtype)
            for s in file.outputs
        }

    def close(self) -> None:
        """Forget the file."""
        self._file = None


class NullText:
    """Answers with the words it was given."""

    engine = "null"
    embeds = False
    room = Room(context=0)

    def __init__(self) -> None:
        self._closed = False

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[TextPiece]:
        """Echo the last message, a word at a time."""
        return self.complete(messages[-1].content, sampling)

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[TextPiece]:
        """Echo the prompt, a word at a time."""
        if self._closed:
            raise UsageError("this null engine is closed", "load the bundle again")
        words = [word + " " for word in prompt.split()]
        said = words[: sampling.max_tokens]
        last = TextPiece("", "stop" if len(said) == len(words) else "length", len(words), len(said))
        return itertools.chain((TextPiece(word) for word in said), (last,))

    def next_scores(self, tokens: Sequence[int], most: int) -> Mapping[int, float]:
        """Tell nothing."""
        del tokens, most
        return {}

    def embed(self, texts: Sequence[str]) -> tuple[Array, int]:
        """Refuse: an echo is no vector."""
        raise InputError(f"the null engine makes no vectors of {len(texts)} texts")

    def close(self) -> None:
        """Refuse later calls."""
        self._closed = True


class NullBackend:
    """Opens the JSON that says what to answer."""

    extra = "onnx"

    def open(self, main: Path, options: EngineOptions) -> NullEngine | NullText:
        """Read the file.

        Raises:
            HealthError: it is no such JSON.
        """
        del options
        try:
            file = msgspec.json.decode(main.read_bytes(), type=NullFile)
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            raise HealthError(f"{main.name} is no file of the null backend: {error}") from error
        return NullText() if file.text else NullEngine(file)


PLUGIN: Backend = NullBackend()
