"""A loaded model as the program that uses it sees it: public names, checked inputs, one variant, one engine.

Knows no engine's package; `opening` chooses and opens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from edgekit.errors import InputError, UsageError
from edgekit.runtime import ports
from edgekit.runtime.backends import Message, Sampling
from edgekit.runtime.isolation.engine import Isolated
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekit.baseline import Baseline
    from edgekit.manifest import Classification, Detection, Embedding, ImagePreprocess, Task, TextPreprocess, Variant
    from edgekit.pictures import Placement
    from edgekit.runtime.backends import Engine, TextEngine, TextPiece
    from edgekit.runtime.detection import Detected
    from edgekit.runtime.isolation import Condition
    from edgekit.runtime.tokens import TextReader
    from edgekit.tensors import Array, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a model promises whatever variant runs it: its part of the manifest, known before a bundle is sealed.

    ``folder`` is where the files lie that it names, None where there are none yet.
    """

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    task: Task = "tensor"
    name: str = "model"
    version: str = "0"
    preprocess: ImagePreprocess | None = None
    text: TextPreprocess | None = None
    postprocess: Classification | None = None
    detection: Detection | None = None
    embedding: Embedding | None = None
    baseline: Baseline | None = None
    digest: str = ""
    folder: Path | None = None


class Session:
    """A loaded tensor model. Thread-safe; warm; ends with `close` or a ``with`` block.

    ``variant``, ``engine`` and ``choice`` say what runs and why, ``considered`` what became of every variant of the
    bundle, in the order of trying: its name and the reason. ``digest`` names the bundle ("" before sealing).
    """

    def __init__(self, engine: Engine, variant: Variant, contract: Contract, choice: str = "") -> None:
        self.contract = contract
        self.variant = variant
        self.choice = choice
        self.considered: tuple[tuple[str, str], ...] = ((variant.name, choice),)
        self._ran = engine.engine
        self._engine: Engine | None = engine
        self._inputs = ports.ports_for(contract.inputs, variant.inputs)
        self._outputs = ports.ports_for(contract.outputs, variant.outputs)

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle's manifest."""
        return self.contract.digest

    @property
    def engine(self) -> str:
        """Name and version of what runs now, after closing of what ran; an engine may replace itself."""
        engine = self._engine
        return self._ran if engine is None else engine.engine

    @property
    def is_isolated(self) -> bool:
        """Say whether the engine has a process of its own."""
        return isinstance(self._engine, Isolated)

    def condition(self) -> Condition | None:
        """Return how the engine's own process does; None where it has none, or is closed."""
        return self._engine.condition() if isinstance(self._engine, Isolated) else None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs for a batch: arrays by public name, samples on the first axis.

        Raises:
            InputError: names the input whose name, dtype or shape does not fit.
            HealthError: the engine fails, or gives another shape than the manifest says.
            UsageError: the session is closed.
        """
        engine = self._engine
        if engine is None:
            raise UsageError(f"the session of {self.contract.name} is closed", "load the bundle again")
        batch = ports.check_inputs(inputs, self.contract.inputs)
        fixed = self.variant.batch
        if fixed == DYNAMIC or batch in (0, fixed):
            return self._once(engine, inputs)
        pieces = [self._once(engine, piece) for piece in ports.chunks(inputs, self.contract.inputs, fixed)]
        return ports.joined(pieces, self.contract.outputs, batch)

    def run_raw(self, picture: bytes) -> list[tuple[str, float]]:
        """Return the best labels with their probabilities for one encoded picture (JPEG, PNG, …).

        Raises:
            InputError: the bytes are no picture, or the model takes none or gives no labels.
        """
        return self.labels(self.run(self.picture_inputs(picture)))[0]

    def run_text(self, *texts: str) -> list[tuple[str, float]]:
        """Return the best labels with their probabilities for one text, or for a pair.

        Raises:
            InputError: the model takes no text, or gives no labels.
            MissingExtra: the tokenizer's package is not installed.
        """
        return self.labels(self.run(self.text_inputs(*texts)))[0]

    def detect(self, picture: bytes) -> list[Detected]:
        """Return the objects in one encoded picture, best first, their boxes in its pixels.

        Raises:
            InputError: the bytes are no picture, or the model takes none or finds no objects.
        """
        inputs, placement = self.placed(picture)
        return self.objects(self.run(inputs), (placement,))[0]

    def picture_inputs(self, picture: bytes) -> dict[str, Array]:
        """Turn one encoded picture into the inputs of `run`.

        Raises:
            InputError: the bytes are no picture, or the model takes none.
        """
        return self.placed(picture)[0]

    def placed(self, picture: bytes) -> tuple[dict[str, Array], Placement]:
        """Turn one encoded picture into the inputs of `run`, and say where it lies in them.

        Raises:
            InputError: the bytes are no picture, or the model takes none.
        """
        from edgekit import pictures

        how = self.contract.preprocess
        if how is None:
            raise InputError(
                f"{self.contract.name} does not say how to read a picture",
                "its manifest has no preprocess: give arrays",
            )
        tensor, placement = pictures.placed(picture, how)
        return {how.input: tensor}, placement

    def text_inputs(self, *texts: str) -> dict[str, Array]:
        """Turn one text, or a pair, into the inputs of `run`.

        Raises:
            InputError: the model takes no text, or the text is too long to be read.
            MissingExtra: the tokenizer's package is not installed.
        """
        types = {spec.name: spec.dtype for spec in self.contract.inputs}
        return {name: array.astype(types[name], copy=False) for name, array in self._reader.read(texts).items()}

    def labels(self, outputs: Mapping[str, Array], top_k: int = 0) -> list[list[tuple[str, float]]]:
        """Turn the outputs of `run` into the ``top_k`` labels (0: as the manifest says), a list a sample.

        Raises:
            InputError: the manifest does not say how.
        """
        from edgekit.runtime.labels import best_labels

        how = self.contract.postprocess
        if how is None:
            raise InputError(f"{self.contract.name} gives no labels", "its manifest has no postprocess")
        return [best_labels(scores, how, top_k or how.top_k) for scores in outputs[how.output]]

    def embed(self, texts: Sequence[str]) -> Array:
        """Return a vector for each text: float32 [texts, width].

        Raises:
            InputError: the model takes no text, or gives no vectors.
            HealthError: the output has another shape than the manifest says.
        """
        inputs = self.texts_inputs(texts)
        return self.vectors(inputs, self.run(inputs))

    def texts_inputs(self, texts: Sequence[str]) -> dict[str, Array]:
        """Turn several texts into one batch of inputs for `run`.

        Raises:
            InputError: no text, the model takes none, or one is too long to be read.
        """
        import numpy as np

        if not texts:
            raise InputError("there is no text", "give one or more")
        rows = [self.text_inputs(text) for text in texts]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def vectors(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Array:
        """Turn the outputs of `run` for texts into vectors, float32 [texts, width].

        Raises:
            InputError: the manifest does not say how.
            HealthError: the output has another shape than the manifest says, or holds NaN.
        """
        from edgekit.runtime.vectors import pooled

        how, text = self.contract.embedding, self.contract.text
        if how is None or text is None:
            raise InputError(f"{self.contract.name} gives no vectors", "its manifest has no text and embedding")
        return pooled(outputs[how.output], inputs.get(text.mask), how)

    def objects(
        self, outputs: Mapping[str, Array], placements: Sequence[Placement] | None = None
    ) -> list[list[Detected]]:
        """Turn the outputs of `run` into objects, a list a sample.

        Boxes are in pixels of the pictures that ``placements`` are of; without, in pixels of the network's input.

        Raises:
            InputError: the manifest does not say how, an output is missing, or there is not one placement a sample.
            HealthError: an output has another shape than the manifest says, or holds NaN.
        """
        from edgekit.runtime import detection

        how, picture = self.contract.detection, self.contract.preprocess
        if how is None or picture is None:
            raise InputError(f"{self.contract.name} finds no objects", "its manifest has no preprocess and detection")
        if missing := {how.boxes, how.scores} - set(outputs):
            raise InputError(f"objects are read from the output {min(missing)!r} too", f"given {', '.join(outputs)}")
        count = len(outputs[how.boxes])
        if placements is not None and len(placements) != count:
            raise InputError(f"{count} samples have {len(placements)} placements", "give one for each, or none at all")
        return detection.objects(outputs, how, picture.crop, tuple(placements or [None] * count))

    def warm(self) -> None:
        """Run once on zeros and open the tokenizer, so that the first request is not the slow one.

        Raises:
            MissingExtra: texts are to be read, and the tokenizer's package is not installed.
        """
        if self.contract.text and self.contract.folder:
            self.text_inputs("")
        specs = self.contract.inputs
        if all(DYNAMIC not in spec.shape[1:] for spec in specs):
            self.run(ports.zeros(specs, batch=max(1, self.variant.batch)))

    def close(self) -> None:
        """Free the engine; runs in flight finish, later ones are errors. A second call does nothing."""
        self._ran = self.engine
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @functools.cached_property
    def _reader(self) -> TextReader:
        from edgekit.runtime.tokens import TextReader

        how, folder = self.contract.text, self.contract.folder
        if how is None or folder is None:
            raise InputError(
                f"{self.contract.name} does not say how to read a text", "its manifest has no text: give arrays"
            )
        return TextReader(folder / how.tokenizer, how)

    def _once(self, engine: Engine, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = engine.run(ports.to_file(inputs, self._inputs))
        return ports.from_file(arrays, self._outputs, self.contract.outputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TextSession:
    """A loaded language model; the same attributes as `Session`.

    ``embeds``: it makes vectors of texts, and answers none. ``room``: how many conversations it holds, and how long.
    """

    def __init__(self, engine: TextEngine, variant: Variant, contract: Contract, choice: str = "") -> None:
        self.contract = contract
        self.variant = variant
        self.choice = choice
        self.considered: tuple[tuple[str, str], ...] = ((variant.name, choice),)
        self.engine = engine.engine
        self.embeds = engine.embeds
        self.room = engine.room
        self._engine: TextEngine | None = engine

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle's manifest."""
        return self.contract.digest

    @property
    def is_isolated(self) -> bool:
        """Say whether the engine has a process of its own."""
        return isinstance(self._engine, Isolated)

    def condition(self) -> Condition | None:
        """Return how the engine's own process does; None where it has none, or is closed."""
        return self._engine.condition() if isinstance(self._engine, Isolated) else None

    def stream(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Iterator[TextPiece]:
        """Answer a conversation piece by piece; the last piece has ``finish`` and the token counts.

        Raises:
            ContextError: more tokens than the context holds.
            InputError: no message, or the model answers none.
            UsageError: the session is closed.
        """
        if not messages:
            raise InputError("a conversation needs at least one message")
        return self._open_to_answer().stream(messages, sampling or Sampling())

    def complete(self, prompt: str, sampling: Sampling | None = None) -> Iterator[TextPiece]:
        """Continue a text as it stands, piece by piece.

        Raises:
            ContextError: more tokens than the context holds.
            InputError: an empty prompt, or the model continues none.
            UsageError: the session is closed.
        """
        if not prompt:
            raise InputError("the prompt is empty")
        return self._open_to_answer().complete(prompt, sampling or Sampling())

    def embed(self, texts: Sequence[str]) -> Array:
        """Return a vector of length 1 for each text: float32 [texts, width].

        Raises:
            ContextError: one has more tokens than the context holds.
            InputError: no text, an empty one, or the model was not made for vectors.
            UsageError: the session is closed.
        """
        return self.embed_counted(texts)[0]

    def embed_counted(self, texts: Sequence[str]) -> tuple[Array, int]:
        """Return the same as `embed`, and how many tokens were read. Raises the same."""
        if not texts or not all(texts):
            raise InputError("there is no text, or an empty one", "give one or more")
        engine = self._open()
        if not self.embeds:
            raise InputError(
                f"{self.contract.name} makes no vectors: its file names no pooling",
                "serve an embedding model, as GGUF with a pooling_type or as an encoder with an embedding",
            )
        return engine.embed(texts)

    def warm(self) -> None:
        """Produce one token or vector, so that the first request is not the slow one."""
        if self.embeds:
            self.embed(["Hello"])
            return
        for _ in self.complete("Hello", Sampling(max_tokens=1, temperature=0.0)):
            pass

    def close(self) -> None:
        """Free the engine; later calls are errors. A second call does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _open_to_answer(self) -> TextEngine:
        if self.embeds:
            raise InputError(f"{self.contract.name} is an embedding model: it answers none", "ask it for embeddings")
        return self._open()

    def _open(self) -> TextEngine:
        if self._engine is None:
            raise UsageError(f"the session of {self.contract.name} is closed", "load the bundle again")
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
