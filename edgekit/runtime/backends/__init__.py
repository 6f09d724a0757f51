"""One file an engine: its file name is the format it runs. Knows what every engine must do; knows none.

Never imports torch, but for the one engine that is made of it (docs/adr/0010), and an engine's package only inside the
function that opens it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import msgspec

from edgekit import plugins
from edgekit.device_profiles import RuntimeSettings, machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekit.manifest import EngineBuild
    from edgekit.runtime.conversations import Room
    from edgekit.tensors import Array


SUMS, SUMS_CHECKED = "edgekit.sums", "fit 16 bits"
"""An ONNX file's own word that an x86 without 8-bit dot products computes it rightly as it is."""


@dataclass(frozen=True, kw_only=True)
class OwnEngine:
    """What it takes to build an engine of this device's own: where it is kept, under which model, how it is built.

    ``digest`` names the variant's files. ``samples`` gives inputs by the file's own names, on which the new engine has
    to answer as the engine that serves meanwhile does, by at least ``min_sqnr_db`` and ``min_top1_agreement``.
    """

    folder: Path
    model: str
    digest: str
    how: EngineBuild
    samples: Callable[[], Mapping[str, Array]]
    min_sqnr_db: float
    min_top1_agreement: float


ON_THE_CPU = RuntimeSettings(providers=())


@dataclass(frozen=True)
class EngineOptions:
    """What every engine is told: how many threads it may use (0: one a core, ``most_threads`` where that is less).

    ``runtime``: what the hardware class says; by default the processor alone, on which files are compared at export.
    ``context``: the tokens of a conversation with a language model; 0: what it was trained for, where memory allows.
    ``own``: build an engine on this device, where the format has that; ``None``: never. ``has_dot_product``: whether
    the processor adds products of 8-bit integers in 32 bits; ``None``: look.
    """

    threads: int = 0
    context: int = 0
    most_threads: int = 0
    runtime: RuntimeSettings = ON_THE_CPU
    own: OwnEngine | None = None
    has_dot_product: bool | None = None

    @property
    def workers(self) -> int:
        """The number of threads to start."""
        cores = machine.usable_cores()
        return self.threads or min(cores, self.most_threads or cores)

    @property
    def cuts_sums(self) -> bool:
        """Say whether products of u8 and s8 are added in 16 bits here, which cuts off what does not fit."""
        if platform.machine() != "x86_64":
            return False
        has = self.has_dot_product
        return not (machine.describe().integer_dot_product if has is None else has)


class Engine(Protocol):
    """A loaded tensor model. Names and layouts are the file's own; `Session` maps the public ones."""

    @property
    def engine(self) -> str:
        """Name and version of what runs now, as ``onnxruntime 1.31.1 CPUExecutionProvider``."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; safe to call from several threads at once."""
        ...

    def close(self) -> None:
        """Free memory; later calls to `run` are errors."""
        ...


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen; temperature 0 is greedy, what is None is the engine's own.

    ``grammar`` (GBNF of llama.cpp) or ``schema`` (JSON Schema, ``{}`` for any JSON) bound the answer. With
    ``alternatives`` each token comes with its log probability, and those of so many likely ones.
    """

    max_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str = ""
    schema: dict[str, Any] | None = None
    alternatives: int | None = None


class TokenScore(msgspec.Struct, frozen=True):
    """A token that was chosen, the natural logarithm of its probability, and those of the likeliest."""

    token: str
    logprob: float
    bytes: tuple[int, ...] = ()
    likely: tuple[tuple[str, float, tuple[int, ...]], ...] = ()


class TextPiece(msgspec.Struct, frozen=True):
    """A piece of an answer; the last has ``finish`` and the token counts. ``scores`` are of its tokens, if asked.

    `WAITING`, with nothing in it, comes from time to time while other answers are generated first.

    ``cached_tokens`` of the prompt's were known from an earlier turn, and not computed again.
    """

    text: str
    finish: Literal["", "stop", "length"] = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    scores: tuple[TokenScore, ...] = ()


WAITING = TextPiece("")
"""Other answers are generated first."""


class TextEngine(Protocol):
    """A loaded language model: one that answers, or one that makes a vector of a text (``embeds``)."""

    engine: str
    embeds: bool
    room: Room
    """How many conversations it holds, and how long each may be; a context of 0 has no end."""

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[TextPiece]:
        """Answer a conversation through the model's own chat template, piece by piece."""
        ...

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[TextPiece]:
        """Continue a text as it stands, without a template."""
        ...

    def next_scores(self, tokens: Sequence[int], most: int) -> Mapping[int, float]:
        """Return the log probabilities of the ``most`` likely next tokens; empty where the engine does not tell."""
        ...

    def embed(self, texts: Sequence[str]) -> tuple[Array, int]:
        """Return a vector of length 1 for each text, float32 [texts, width], and how many tokens were read."""
        ...

    def close(self) -> None:
        """Free memory; later calls are errors."""
        ...


class Backend(Protocol):
    """Opens files of one format."""

    extra: str
    """The extra that installs the engine."""

    def open(self, main: Path, options: EngineOptions) -> Engine | TextEngine:
        """Load a file.

        Raises:
            MissingExtra: the engine is not installed.
            HealthError: the engine refuses the file on this device.
        """
        ...


@runtime_checkable
class Homebound(Protocol):
    """A backend whose engine exists on some systems only, whatever is installed."""

    def absence(self) -> str:
        """Say why no engine can be had on this machine; empty where one can."""
        ...


def absence(file_format: str) -> str:
    """Say why no engine of a format can be had on this machine, whatever is installed; empty where one can."""
    if file_format not in plugins.names(__name__):
        return f"no engine runs {file_format}"
    backend = cast("Backend", plugins.load(__name__, file_format, "engine"))
    return backend.absence() if isinstance(backend, Homebound) else ""
