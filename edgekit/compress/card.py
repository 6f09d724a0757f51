"""The model card: what the model is, what it was made from, what it can do and what that cost, as Markdown.

Its head is the YAML that Hugging Face reads (Mitchell et al. 2019, "Model Cards for Model Reporting"). What only the
owner can know is left open, and says so.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgekit.compress.evaluate import Score
    from edgekit.compress.outcome import Outcome
    from edgekit.model import Model

OPEN = "> **TO BE FILLED IN BY THE OWNER:** "
MEASURED = (
    "The figures were measured on this machine with the plan applied in float arithmetic; a file exported for a device "
    "is compared with the model at export."
)
TASKS = {"detection": "object-detection", "text-generation": "text-generation"}
PICTURES = 4
"""Axes of a batch of pictures."""


def card(outcome: Outcome, digest: str) -> str:
    """Return the card of a compressed model; ``digest`` names its files."""
    model = outcome.compressed
    parts = [
        _head(outcome),
        f"# {model.name}, {model.precision}",
        _about(outcome, digest),
        *[f"**Warning:** {warning}." for warning in outcome.warnings],
        *[f"**Note:** {note}." for note in outcome.notes],
        "## Intended use",
        OPEN + "what the model is for, who uses it, and what it must not be used for.",
        "## What it takes and gives",
        _table(
            ["", "name", "type", "shape"],
            [
                [kind, spec.name, spec.dtype, "x".join("?" if n < 0 else str(n) for n in spec.shape)]
                for kind, specs in (("input", model.inputs), ("output", model.outputs))
                for spec in specs
            ],
        ),
        "## Figures",
        _figures(outcome),
        _scores(outcome),
        "## What each step bought",
        _steps(outcome),
        *_parts(outcome),
        "## Data",
        _data(outcome),
        "## Limits",
        _limits(outcome),
        "## How it was made",
        _making(outcome),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(outcome: Outcome, digest: str) -> str:
    tool, passes = outcome.origin.tools.get("edgekit", ""), [name for name, _ in outcome.recipe.passes]
    made = f"{outcome.compressed.name} compressed by edgekit {tool} with {', '.join(passes)}."
    return f"{made} Digest of the model: `{digest}`."


def _task(model: Model) -> str:
    """Return what Hugging Face calls the model's task, empty where there is no name for it."""
    if model.task != "classification":
        return TASKS.get(model.task, "")
    if model.data and model.data.text:
        return "text-classification"
    pictures = any(len(spec.shape) == PICTURES for spec in model.inputs)
    return "image-classification" if pictures else "tabular-classification"


def _head(outcome: Outcome) -> str:
    """Return the front matter; JSON strings are YAML strings, so no name can break out."""
    model = outcome.compressed
    lines = ["---", "library_name: edgekit", f"pipeline_tag: {_task(model)}" if _task(model) else ""]
    lines += ["tags:", *[f"- {_quoted(tag)}" for tag in ("edgekit", "compressed", model.precision)]]
    lines += ["model-index:", f"- name: {_quoted(model.name)}"]
    if outcome.scores:
        lines += ["  results:"]
    for split, (_, score) in outcome.scores.items():
        lines += ["  - task:", f"      type: {_task(model) or 'other'}", "    dataset:"]
        lines += [f"      name: {_quoted(_data_name(outcome))}", f"      type: {_quoted(_data_name(outcome))}"]
        lines += [f"      split: {split}", "    metrics:", f"    - type: {_quoted(score.metric)}"]
        lines += [f"      value: {score.value if math.isfinite(score.value) else '.nan'}"]
    return "\n".join([line for line in lines if line] + ["---"])


def _quoted(text: str) -> str:
    return json.dumps(text)


def _data_name(outcome: Outcome) -> str:
    return outcome.origin.data.name if outcome.origin.data else "unnamed"


def _figures(outcome: Outcome) -> str:
    rows = []
    for name, (before, after) in outcome.table().items():
        if not name.startswith(("validation_", "test_")):
            change = f"{after / before:.2f}x" if before else ""
            rows.append([name.replace("_", " "), number(before), number(after), change])
    note = f"\n\nLatency: {outcome.latency_note}." if outcome.latency_note else ""
    return _table(["", "before", "after", "change"], rows) + note


def _scores(outcome: Outcome) -> str:
    rows = [
        [f"{split} {before.metric}", interval(before), interval(after), str(after.samples)]
        for split, (before, after) in outcome.scores.items()
    ]
    told = f"\n\n{likeness(outcome)}" if outcome.reference else ""
    return _table(["metric (95 % interval)", "before", "after", "samples"], rows) + told if rows else ""


def likeness(outcome: Outcome) -> str:
    """Return the sentence that says what a metric without labels compares with."""
    return f"{outcome.metric.name if outcome.metric else 'The metric'} compares with {outcome.reference}."


def interval(score: Score) -> str:
    """Return a figure with its 95 % interval."""
    if not (math.isfinite(score.low) and math.isfinite(score.high)):
        return number(score.value)
    return f"{number(score.value)} ({number(score.low)} to {number(score.high)})"


def number(value: float) -> str:
    """Return a figure as a person reads it: whole numbers whole, others with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4g}"


def _steps(outcome: Outcome) -> str:
    rows = [
        [
            stage.name,
            number(stage.bytes),
            "" if stage.macs is None else number(stage.macs),
            "" if stage.score is None else number(stage.score),
            "" if stage.ms is None else f"{stage.ms:.3g}",
        ]
        for stage in outcome.stages
    ]
    metric = outcome.metric.name if outcome.metric else "score"
    return _table(["after", "bytes", "MACs", f"validation {metric}", "ms a sample"], rows)


def _parts(outcome: Outcome) -> list[str]:
    """Return the tables by class and by group, where there are any."""
    found = []
    for split, (before, after) in outcome.scores.items():
        for kind, one, two in (("class", before.by_class, after.by_class), ("group", before.by_group, after.by_group)):
            if one:
                rows = [[name, number(value), number(two.get(name, math.nan))] for name, value in one.items()]
                found += [f"### {split} {before.metric} by {kind}", _table([kind, "before", "after"], rows)]
    return found


def _data(outcome: Outcome) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in outcome.origin.samples.items()) or "none"
    return (
        f"Samples: {sizes}. Calibration and validation steered the compression; test was read once, at the end. "
        f"SHA-256 of the arrays: `{outcome.origin.data_sha256 or 'none'}`.\n\n"
        f"{OPEN}where the data comes from, its licence, and whom it leaves out."
    )


def _limits(outcome: Outcome) -> str:
    plan = outcome.compressed.plan
    said = [MEASURED]
    if plan and plan.activations:
        said.append("Inputs outside the range seen on calibration data are clipped.")
    if "test" not in outcome.scores:
        said.append("There was no test split: the validation figures steered the choice and flatter.")
    return " ".join(said) + f"\n\n{OPEN}known failures, and what was not tested."


def _making(outcome: Outcome) -> str:
    origin = outcome.origin
    rows = [["model", origin.model.name, origin.model.sha256]]
    rows += [["checkpoint", origin.checkpoint.name, origin.checkpoint.sha256]] if origin.checkpoint else []
    rows += [["data", origin.data.name, origin.data.sha256]] if origin.data else []
    tools = ", ".join(f"{name} {version}" for name, version in origin.tools.items())
    said = f"Recipe: `recipe.toml`. Tools: {tools}. Machine: {machine(outcome)}."
    return _table(["", "name", "SHA-256"], rows) + f"\n\n{said}"


def machine(outcome: Outcome) -> str:
    """Return what the machine is, each part with its name: a processor may be called 207."""
    return ", ".join(f"{name} {value}" for name, value in outcome.origin.machine.items())


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )
