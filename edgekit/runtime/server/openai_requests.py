"""What OpenAI's clients send, decoded and bounded: chats, completions, texts to embed. Knows no engine and no answer.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from edgekit.runtime.backends import Message, Sampling
from edgekit.runtime.server.exchange import HttpError

if TYPE_CHECKING:
    from edgekit.runtime.server.exchange import Request

MAX_TOKENS = 256
MAX_BODY = 4 << 20
"""More text than any context holds; it is parsed on the event loop, where 64 MB would stop everybody for 0.4 s."""


NOT_OFFERED = ("tools", "functions", "logit_bias", "echo", "suffix")


class _Part(msgspec.Struct):
    type: Literal["text"]
    text: str


class _Turn(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Generation(msgspec.Struct, kw_only=True):
    model: str
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    grammar: Annotated[str, msgspec.Meta(max_length=1 << 16)] | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logit_bias: dict[str, float] | None = None


class _Schema(msgspec.Struct):
    schema: dict[str, Any] = {}


class _Format(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class Chat(_Generation, kw_only=True):
    """A body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[_Turn], msgspec.Meta(min_length=1, max_length=1000)]
    response_format: _Format | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are told beside each one; None for no scores."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def schema(self) -> dict[str, Any] | None:
        """What bounds the answer; empty for any JSON object."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        stated = self.response_format.json_schema
        return stated.schema if self.response_format.type == "json_schema" and stated else {"type": "object"}


class Completion(_Generation, kw_only=True):
    """A body of ``POST /v1/completions``."""

    prompt: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=1)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Literal[1] | None = None

    @property
    def alternatives(self) -> int | None:
        """The same."""
        return self.logprobs

    @property
    def schema(self) -> None:
        """Completions have no such option."""


class Embeddings(msgspec.Struct):
    """A body of ``POST /v1/embeddings``."""

    model: str
    input: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def parse(request: Request, kind: type[Any]) -> Any:  # noqa: ANN401  # the callers name the type
    """Decode a body.

    Raises:
        HttpError: 413 where it is too long; 400 where it is malformed, or wants what would be left out silently.
    """
    if len(request.body) > MAX_BODY:
        raise HttpError(413, f"a text request has {len(request.body)} bytes, at most {MAX_BODY} are taken")
    try:
        asked = msgspec.json.decode(request.body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"malformed request: {error}") from error
    if wanted := [name for name in NOT_OFFERED if getattr(asked, name, None)]:
        raise HttpError(400, f"{wanted[0]} is not offered here: leave it out", "unsupported_parameter")
    return asked


def sampling_of(asked: Chat | Completion) -> Sampling:
    """Return how the next token is to be chosen."""
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    return Sampling(
        max_tokens=asked.max_completion_tokens or asked.max_tokens or MAX_TOKENS,
        temperature=0.8 if asked.temperature is None else asked.temperature,
        top_p=0.95 if asked.top_p is None else asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        seed=asked.seed,
        stop=stop,
        grammar=asked.grammar or "",
        schema=asked.schema,
        alternatives=asked.alternatives,
    )


def messages_of(asked: Chat) -> list[Message]:
    """Return the conversation."""
    return [Message(_role(turn.role), _text(turn.content)) for turn in asked.messages]


def prompt_of(asked: Completion) -> str:
    """Return the text to continue."""
    return asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]


def _role(role: str) -> Literal["system", "user", "assistant"]:
    if role == "user":
        return "user"
    return "assistant" if role == "assistant" else "system"


def _text(content: str | list[_Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
