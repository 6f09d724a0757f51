"""Nine models, every format, fp32, int8 and int4: how near each written file is to its model, or why there is none.

A cell is the signal-to-noise ratio of the file beside the float network with the plan's weights, in dB, measured by
the format's engine or from the file's own bytes; it holds where the format keeps parity's limit. Where a format cannot
hold a plan, the next recipe of the list is taken and marked: ``d`` activations ranged as they come, ``w`` weights only.
What is refused has to be among `REFUSED`, word for word as far as it stands there; everything else is a miss.
``EDGEKIT_BENCH_ONLY`` names models, with commas between them.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import _zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _report import Row, run

from edgekit import device_profiles, plugins
from edgekit.cli._terminal import markdown_table
from edgekit.compress import compress, recipe
from edgekit.errors import CompressionError, EdgekitError, UsageError
from edgekit.export import PACKAGE, export

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgekit.export import TargetResult
    from edgekit.model import Model

HERE = Path(__file__).resolve().parent
MODELS: dict[str, tuple[str, Callable[[Path], Model]]] = {
    "residual": ("residual CNN", lambda _: _zoo.residual()),
    "depthwise": ("depthwise CNN, SE, hard-swish", lambda _: _zoo.depthwise()),
    "lite0": ("EfficientNet-Lite0", lambda _: _zoo.lite0()),
    "minilm": ("MiniLM-L6-v2", lambda _: _zoo.minilm()),
    "gru": ("GRU", lambda _: _zoo.recurrent()),
    "llama": ("tiny Llama", _zoo.llama),
    "two-ways": ("two inputs, two outputs", lambda _: _zoo.two_ways()),
    "mlp": ("MLP", lambda _: _zoo.mlp()),
    "sklearn": ("scikit-learn pipeline", _zoo.pipeline),
}
QUICK = ("mlp", "two-ways")
RECIPES = {
    "fp32": (("", ""),),
    "int8": (("int8", ""), ("int8-dynamic", "d"), ("w8", "w")),
    "int4": (("w4a8-gptq", ""), (str(HERE / "recipes/w4-dynamic.toml"), "d"), ("w4-channel-gptq", "w")),
}
"""By column: recipes in the order in which they are tried, and how a cell is marked that took one."""
INSTEAD = {
    ("llama", "int8"): "int8-smooth",
    ("minilm", "int8"): str(HERE / "recipes/minilm-int8.toml"),
    ("minilm", "w4a8-gptq"): str(HERE / "recipes/minilm-w4a8.toml"),
}
"""What transformers take in place of a recipe."""
TYPES = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}
"""What llama.cpp calls the columns."""
REFUSED: dict[tuple[str, str, str], str] = {
    ("*", "gguf", "*"): "the model is no language model; GGUF holds those",
    ("gru", "tensorrt", "int8"): "TensorRT builds no engine of model.onnx: IBuilder::buildSerializedNetwork",
    ("gru", "tensorrt", "int4"): "TensorRT builds no engine of model.onnx: IBuilder::buildSerializedNetwork",
    ("sklearn", "*", "int8"): "the model has no weight that can be quantized",
    ("sklearn", "*", "int4"): "the model has no weight that can be quantized",
    ("sklearn", "coreml", "fp32"): "the model is no PyTorch network",
    ("sklearn", "tflite", "fp32"): "the model is no PyTorch network",
    ("sklearn", "executorch", "fp32"): "the model is no PyTorch network",
    ("sklearn", "openvino", "fp32"): "the model has no OpenVINO form: No conversion rule found for operations",
    ("sklearn", "tensorrt", "fp32"): "TensorRT does not take model.onnx: Scaler 'Scaler' (no such operator)",
}
"""By model, format and column (``*``: any of them): how the documented refusal begins."""


ABSENT = "not measured"
"""How a cell begins whose model is not installed."""


@dataclass(frozen=True)
class Cell:
    """One model in one format and column: its parity, or the refusal."""

    model: str
    format: str
    column: str
    mark: str = ""
    result: TargetResult | None = None
    refusal: str = ""

    def row(self) -> Row:
        """Return the cell as a row of the report."""
        what = f"{self.model}, {self.format}, {self.column}{self.mark}"
        variant = self.result.variant if self.result else None
        if variant is not None and variant.parity.sqnr_db is not None:
            return Row(
                what,
                variant.parity.sqnr_db,
                f"dB, {variant.parity.status}",
                goal=f"value >= {variant.parity.min_sqnr_db}",
            )
        if variant is not None:
            return Row(what, None, f"{variant.parity.status}: {variant.parity.reason}", goal="value >= 0")
        return Row(what, None, self.refusal, goal="" if self.is_documented else "value >= 0")

    @property
    def is_documented(self) -> bool:
        """Say whether the refusal is one that the page knows."""
        wanted = (
            REFUSED.get((model, form, column))
            for model in (self.model, "*")
            for form in (self.format, "*")
            for column in (self.column, "*")
        )
        return self.refusal.startswith(ABSENT) or any(
            begin is not None and self.refusal.startswith(begin) for begin in wanted
        )

    def text(self, notes: list[str]) -> str:
        """Return what stands in the table; refusals go to the notes and are pointed at."""
        variant = self.result.variant if self.result else None
        if variant is None:
            if self.refusal not in notes:
                notes.append(self.refusal)
            return f"[{notes.index(self.refusal) + 1}]"
        parity = variant.parity
        figure = "unverified" if parity.sqnr_db is None else f"{min(parity.sqnr_db, 200):.0f}"
        return f"{figure}{self.mark}{'*' if parity.status == 'evaluated' else ''}"


def main(quick: bool) -> list[Row]:
    cells: list[Cell] = []
    for name in QUICK if quick else _wanted():
        with tempfile.TemporaryDirectory() as scratch:
            cells += cells_of(name, Path(scratch))
    print(page(cells))
    return [cell.row() for cell in cells]


def _wanted() -> list[str]:
    only = os.environ.get("EDGEKIT_BENCH_ONLY", "")
    return [name for name in MODELS if not only or name in only.split(",")]


def cells_of(name: str, scratch: Path) -> list[Cell]:
    """Compress and export one model for every format and column."""
    formats = plugins.names(PACKAGE)
    try:
        model = MODELS[name][1](scratch)
    except (ModuleNotFoundError, UsageError) as error:
        return [Cell(name, form, column, refusal=f"{ABSENT}: {error}") for column in RECIPES for form in formats]
    cells = []
    for column, recipes in RECIPES.items():
        left = [form for form in formats if not (form == "gguf" and name == "llama")]
        found: dict[str, Cell] = {}
        for number, (named, mark) in enumerate(recipes):
            left = [form for form in left if not _is_written(found.get(form))]
            chosen = INSTEAD.get((name, named), named)
            print(f"{name} {column} {chosen or 'float'}: {', '.join(left)}", file=sys.stderr, flush=True)
            for form, cell in _tried(model, chosen, left, scratch / f"{column}{number}").items():
                first = found.get(form)
                if first is None or _is_written(cell):
                    found[form] = _placed(cell, name, column, mark)
        if name == "llama":
            found["gguf"] = _placed(_spoken(column, scratch), name, column, "")
        cells += [found[form] for form in formats]
    return cells


def _is_written(cell: Cell | None) -> bool:
    return cell is not None and cell.result is not None and cell.result.variant is not None


def _placed(cell: Cell, name: str, column: str, mark: str) -> Cell:
    return Cell(name, cell.format, column, mark if _is_written(cell) else "", cell.result, cell.refusal)


def _tried(model: Model, named: str, formats: Sequence[str], folder: Path) -> dict[str, Cell]:
    if not formats:
        return {}
    try:
        small = compress(model, recipe.read(Path(named))) if named else model
    except CompressionError as error:
        return {form: Cell("", form, "", refusal=_said(error, model)) for form in formats}
    return _exported(small, formats, folder, None)


def _exported(model: Model, formats: Sequence[str], folder: Path, precision: str | None) -> dict[str, Cell]:
    profiles = [device_profiles.of_format(form) for form in formats]
    try:
        rows = export(model, profiles, folder, precision=precision).rows
    except EdgekitError as error:
        return {form: Cell("", form, "", refusal=_said(error, model)) for form in formats}
    return {
        row.format: Cell("", row.format, "", result=row, refusal=_said(row.error, model) if row.error else "")
        for row in rows
    }


def _said(error: EdgekitError, model: Model) -> str:
    """Return the message in one line, for any model, without addresses in memory."""
    line = error.message.splitlines()[0].replace(model.name, "the model")
    return re.sub(r" \(?\[utils\.cpp.*", " (Myelin)", line)[:200]


def _spoken(column: str, scratch: Path) -> Cell:
    return _exported(_zoo.spoken(scratch), ["gguf"], scratch / f"{column}-gguf", TYPES[column])["gguf"]


def page(cells: Sequence[Cell]) -> str:
    """Return the table of all cells, and below it why some are refused."""
    notes: list[str] = []
    formats = list(dict.fromkeys(cell.format for cell in cells))
    found = {(cell.model, cell.format, cell.column): cell for cell in cells}
    rows = [
        (MODELS[name][0], column, *(found[name, form, column].text(notes) for form in formats))
        for name in dict.fromkeys(cell.model for cell in cells)
        for column in RECIPES
    ]
    told = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    return f"{markdown_table(('model', 'precision', *formats), rows)}\n\n{told}"


if __name__ == "__main__":
    run("Every model in every format", main)
