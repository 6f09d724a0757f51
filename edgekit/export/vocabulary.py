"""Reads a language model's tokens as llama.cpp wants them: from tokenizer.json, tokenizer.model or llama2.c's file.

Knows nothing of tensors. Token types are those of GGUF: 1 normal, 2 unknown, 3 control, 4 user's own, 5 unused,
6 byte.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import ExportError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_TOKEN_BYTES = 1024
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>\Z")

PRE_TOKENIZERS = {r"\p{N}{1,3}": "llama-bpe", r"|\p{N}|": "qwen2", "Digits": "smollm"}
"""llama.cpp's name of a byte-level pre-tokenizer, by what its description in tokenizer.json holds."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by number. ``model``: ``llama`` for SentencePiece with scores, ``gpt2`` for byte-level BPE with merges."""

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    pre: str = "default"
    bos: int | None = None
    eos: int | None = None
    chat_template: str = ""
    add_space_prefix: bool = True


def read(folder: Path, size: int) -> Vocabulary:
    """Find and read the tokenizer of a Hugging Face folder; ``size`` is what the network expects.

    llama2.c's ``tok*.bin`` is also looked for beside the folder, where its author keeps it.

    Raises:
        ExportError: there is none, it is of a kind that llama.cpp does not know, or of too many tokens.
        UsageError: the file is damaged.
    """
    found = _read_any(folder)
    if len(found.tokens) > size:
        raise ExportError(f"the tokenizer has {len(found.tokens)} tokens, the network {size}", "is it another model's?")
    return _described(_with_added(_filled(found, size), folder), folder)


def _read_any(folder: Path) -> Vocabulary:
    if (folder / "tokenizer.model").is_file():
        return _read_sentencepiece(folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        return _read_json(folder / "tokenizer.json")
    for path in (*sorted(folder.glob("tok*.bin")), *sorted(folder.resolve().parent.glob("tok*.bin"))):
        return _read_llama2c(path)
    raise ExportError(
        f"{folder} has no tokenizer, and without one a language model cannot answer",
        "put tokenizer.json, tokenizer.model or llama2.c's tokenizer.bin into the folder",
    )


def _filled(vocabulary: Vocabulary, size: int) -> Vocabulary:
    count = len(vocabulary.tokens)
    padding = tuple(f"[PAD{number}]" for number in range(count, size))
    return replace(
        vocabulary,
        tokens=vocabulary.tokens + padding,
        types=vocabulary.types + (UNUSED,) * len(padding),
        scores=vocabulary.scores + (-1e4,) * len(padding) if vocabulary.scores else (),
    )


def _with_added(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    """Take the tokens that tokenizer_config.json adds to a tokenizer: marks of turns, and words of the user's own."""
    added = _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    try:
        for number, token in sorted((int(key), value) for key, value in added.items()):
            if number >= len(tokens):
                raise ExportError(
                    f"{folder} adds token {number}, the network has {len(tokens)}", "is it another model's?"
                )
            tokens[number] = str(token["content"])
            if types[number] != UNKNOWN:
                types[number] = CONTROL if token.get("special") else USER_DEFINED
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{folder / 'tokenizer_config.json'} is damaged: {error!r}", "fetch the model again"
        ) from error
    return replace(vocabulary, tokens=tuple(tokens), types=tuple(types))


def _described(vocabulary: Vocabulary, folder: Path) -> Vocabulary:
    """Take the special tokens and the chat template that the folder's other files name."""
    config = _json(folder / "config.json")
    settings = _json(folder / "tokenizer_config.json")
    beside = folder / "chat_template.jinja"  # where transformers has written it since 4.50
    template = beside.read_text(encoding="utf-8") if beside.is_file() else settings.get("chat_template")
    return replace(
        vocabulary,
        bos=_number(config.get("bos_token_id"), vocabulary.bos),
        eos=_number(config.get("eos_token_id"), vocabulary.eos),
        chat_template=template if isinstance(template, str) else "",
    )


def _number(value: object, default: int | None) -> int | None:
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) else default


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged: {error}", "fetch the model again") from error


def _read_llama2c(path: Path) -> Vocabulary:
    """Read llama2.c's file: int32 longest token, then per token float32 score, int32 length, bytes."""
    data = path.read_bytes()
    offset, pieces, scores = 4, [], []
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if not 0 <= length <= MAX_TOKEN_BYTES or offset + length > len(data):
                raise UsageError(f"{path} is no llama2.c tokenizer: a token of {length} bytes at {offset}")
            pieces.append(data[offset : offset + length].decode("utf-8"))
            scores.append(score)
            offset += length
    except (struct.error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no llama2.c tokenizer: {error}") from error
    specials = ("<unk>", "<s>", "</s>")  # llama2.c stores them with newlines around
    tokens = tuple(specials[i] if i < 3 else piece.replace(" ", "▁") for i, piece in enumerate(pieces))
    return Vocabulary("llama", tokens, _spm_types(tokens), tuple(scores), bos=1, eos=2)


def _spm_types(tokens: Sequence[str]) -> tuple[int, ...]:
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    return tuple(kinds.get(token) or (BYTE if _BYTE_TOKEN.match(token) else NORMAL) for token in tokens)


def _read_sentencepiece(path: Path) -> Vocabulary:
    with extra("export"):
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    described = sentencepiece_model_pb2.ModelProto()
    try:
        processor = SentencePieceProcessor(model_proto=path.read_bytes())
        described.ParseFromString(path.read_bytes())
    except (RuntimeError, OSError, DecodeError) as error:
        raise UsageError(f"{path} is no SentencePiece model: {error}", "fetch the model again") from error
    numbers = range(processor.vocab_size())
    tokens = tuple(processor.id_to_piece(n) for n in numbers)
    return Vocabulary(
        "llama",
        tokens,
        tuple(_piece_type(processor, n) for n in numbers),
        tuple(float(processor.get_score(n)) for n in numbers),
        bos=processor.bos_id(),
        eos=processor.eos_id(),
        add_space_prefix=described.normalizer_spec.add_dummy_prefix,
    )


def _piece_type(processor: Any, number: int) -> int:  # noqa: ANN401  # sentencepiece is untyped
    if processor.is_unknown(number):
        return UNKNOWN
    if processor.is_control(number):
        return CONTROL
    return BYTE if processor.is_byte(number) else NORMAL


def _read_json(path: Path) -> Vocabulary:
    """Read a Hugging Face tokenizer: BPE over bytes (``gpt2``), or SentencePiece's with byte fallback (``llama``)."""
    document = _json(path)
    model = document.get("model", {})
    if model.get("type") != "BPE":
        raise ExportError(
            f"{path} is a {model.get('type')} tokenizer; llama.cpp takes BPE here", "give tokenizer.model"
        )
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    tokens, types = _numbered(model.get("vocab", {}), document.get("added_tokens", []))
    merges = tuple(" ".join(pair) for pair in pairs)
    # The setting alone does not tell: transformers writes it for BPE over bytes too. The byte tokens do.
    if not model.get("byte_fallback") or "<0x0A>" not in model.get("vocab", {}):
        return Vocabulary(
            "gpt2", tokens, types, merges=merges, pre=_pre_tokenizer(path, document), add_space_prefix=False
        )
    # SentencePiece merges the pair of the highest score first: minus the rank of the merge that makes the token.
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(pairs)))}
    scores = tuple(
        -float(ranks.get(token, 0 if kind != NORMAL else len(pairs))) for token, kind in zip(tokens, types, strict=True)
    )
    return Vocabulary("llama", tokens, types, scores, add_space_prefix=_puts_a_space_first(document))


def _numbered(vocab: dict[str, int], added: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens = {number: token for token, number in vocab.items()} | {a["id"]: a["content"] for a in added}
    if sorted(tokens) != list(range(len(tokens))):
        raise UsageError(f"the tokenizer numbers {len(tokens)} tokens up to {max(tokens, default=-1)}, with gaps")
    special = {a["id"]: CONTROL if a.get("special") else USER_DEFINED for a in added}
    names = tuple(tokens[number] for number in range(len(tokens)))
    kinds = _spm_types(names)
    return names, tuple(special.get(n, kind) if kind != UNKNOWN else kind for n, kind in enumerate(kinds))


def _puts_a_space_first(document: dict[str, Any]) -> bool:
    """Tell whether text gets a space before its first word: Llama's normalizer prepends one, Gemma's does not."""
    cut = msgspec.json.encode([document.get("normalizer"), document.get("pre_tokenizer")]).decode()
    return '"Prepend"' in cut or ('"Metaspace"' in cut and '"prepend_scheme":"never"' not in cut)


def _pre_tokenizer(path: Path, document: dict[str, Any]) -> str:
    described = msgspec.json.encode(document.get("pre_tokenizer")).decode().replace("\\\\", "\\")
    for sign, name in PRE_TOKENIZERS.items():
        if sign in described:
            return name
    if "ByteLevel" in described:
        return "gpt-2"
    raise ExportError(f"{path} cuts text in a way llama.cpp has no name for: {described[:120]}", "give tokenizer.model")
