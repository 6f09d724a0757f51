"""Reads text and tables of text as ``data.toml`` states, as token numbers. Knows no model."""

from __future__ import annotations

import csv
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit import token_numbers
from edgekit.errors import UsageError
from edgekit.model import Data, Split, TextReading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgekit.tensors import Array
    from edgekit.token_numbers import Tokenizer

Name = Literal["calibration", "train", "validation", "test"]
Count = Annotated[int, msgspec.Meta(ge=1)]
Tokens = Annotated[int, msgspec.Meta(ge=2, le=1 << 20)]


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="text"):
    """What ``data.toml`` says of running text for a language model.

    ``separator`` stands between documents; with ``bos`` each begins with the tokenizer's first token.
    """

    files: dict[Name, str]
    tokenizer: str
    tokens: Tokens
    counts: dict[Name, Count] = {}
    separator: str = ""
    bos: bool = False
    overlap: Literal["refuse", "drop"] = "refuse"


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="tsv"):
    """What ``data.toml`` says of a table with one text, or two, and a label a line."""

    files: dict[Name, str]
    tokenizer: str
    tokens: Tokens
    text: str | tuple[str, ...]
    label: str = ""
    group: str = ""
    separator: str = "\t"
    counts: dict[Name, Count] = {}
    overlap: Literal["refuse", "drop"] = "refuse"


def read_text(spec: Text, beside: Path) -> Data:
    """Cut each split's file into windows of ``tokens`` token numbers, ``input_ids`` [windows, tokens].

    Raises:
        UsageError: a file is missing, no text, too short, or given for two splits; or there is no tokenizer.
    """
    paths = _paths(spec.files, beside)
    tokenizer = token_numbers.read(beside / spec.tokenizer)
    if spec.bos and tokenizer.bos is None:
        raise UsageError(
            f"the tokenizer of {spec.tokenizer} has no token that begins a text", "drop bos from data.toml"
        )
    return Data.of({name: _windows(spec, path, tokenizer, spec.counts.get(name)) for name, path in paths.items()})


def read_table(spec: Table, beside: Path) -> Data:
    """Read each split's lines as ``input_ids`` and ``attention_mask`` [lines, tokens], with labels and groups.

    Columns go by the names in the first line. Labels that are integers are classes, other numbers targets, and words
    classes in alphabetical order over all splits.

    Raises:
        UsageError: a file or a column is missing, a split is empty, or there is no tokenizer.
    """
    tables = {name: _lines(spec, path, spec.counts.get(name)) for name, path in _paths(spec.files, beside).items()}
    tokenizer = token_numbers.read(beside / spec.tokenizer)
    words = [row[spec.label] for rows in tables.values() for row in rows] if spec.label else []
    kind = _kind(words)
    classes = tuple(sorted(set(words))) if kind == "words" else ()
    columns = (spec.text,) if isinstance(spec.text, str) else spec.text
    splits: dict[str, Split] = {}
    for name, rows in tables.items():
        inputs = token_numbers.padded(
            [tokenizer.framed([row[c] for c in columns], spec.tokens) for row in rows], spec.tokens
        )
        labels = _labels([row[spec.label] for row in rows], kind, classes) if spec.label else None
        splits[name] = Split(inputs, labels, _strings([row[spec.group] for row in rows]) if spec.group else None)
    written = tokenizer.written(spec.tokens)
    return replace(Data.of(splits, labels=classes), text=TextReading(written, spec.tokens) if written else None)


def _paths(files: Mapping[Name, str], beside: Path) -> dict[Name, Path]:
    """Find each split's file; the same for two is refused."""
    if "calibration" not in files:
        raise UsageError("data.toml has no file for calibration", 'state [files] calibration = "…"')
    seen: dict[Path, str] = {}
    for name, file in files.items():
        path = (beside / file).resolve()
        if not path.is_file():
            raise UsageError(f"there is no file {path} for {name}", "check [files] in data.toml")
        if path in seen:
            raise UsageError(
                f"{path.name} is given for {seen[path]} and for {name}", "cut it in two: a split is a file of its own"
            )
        seen[path] = name
    return {name: beside / file for name, file in files.items()}


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8: {error}", "convert it") from error


def _windows(spec: Text, path: Path, tokenizer: Tokenizer, most: int | None) -> Split:
    import numpy as np

    content = _content(path)
    documents = content.split(spec.separator) if spec.separator else [content]
    numbers: list[int] = []
    for document in documents:
        if document.strip():
            numbers += ([tokenizer.bos] if spec.bos and tokenizer.bos is not None else []) + tokenizer.encode(
                document.strip() if spec.separator else document
            )
        if most is not None and len(numbers) >= most * spec.tokens:
            break
    count = len(numbers) // spec.tokens
    if not count or (most is not None and count < most):
        raise UsageError(
            f"{path} gives {count} windows of {spec.tokens} tokens, {most or 1} wanted",
            "give a longer text, or state fewer tokens or smaller counts",
        )
    count = min(count, most or count)
    return Split({"input_ids": np.array(numbers[: count * spec.tokens], np.int64).reshape(count, spec.tokens)})


def _lines(spec: Table, path: Path, most: int | None) -> list[dict[str, str]]:
    if len(spec.separator) != 1:
        raise UsageError(f"data.toml separates columns by {spec.separator!r}", "one character, as a tab or a comma")
    quoting: Literal[0, 3] = csv.QUOTE_NONE if spec.separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(_content(path).splitlines(), delimiter=spec.separator, quoting=quoting)
    columns = (spec.text,) if isinstance(spec.text, str) else spec.text
    for column in (*columns, *filter(None, (spec.label, spec.group))):
        if column not in (reader.fieldnames or ()):
            raise UsageError(
                f"{path} has no column {column!r}",
                f"its first line names {', '.join(reader.fieldnames or ()) or 'none'}",
            )
    rows = list(reader)[:most]
    if not rows or (most is not None and len(rows) < most):
        raise UsageError(f"{path} has {len(rows)} lines, {most or 1} wanted", "give more, or state smaller counts")
    for number, row in enumerate(rows, 2):
        if None in row.values() or None in row:
            raise UsageError(f"line {number} of {path} has another number of columns than the first", "mend that line")
    return rows


def _kind(words: Sequence[str]) -> Literal["integers", "numbers", "words"]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return "words"
    return "integers" if all(word.strip().isdigit() for word in words) and numbers else "numbers"


def _labels(words: Sequence[str], kind: str, classes: Sequence[str]) -> Array:
    import numpy as np

    if kind == "words":
        return np.array([classes.index(word) for word in words], np.int64)
    return np.array([float(word) for word in words], np.int64 if kind == "integers" else np.float32)


def _strings(values: Sequence[str]) -> Array:
    import numpy as np

    return np.array(values)
