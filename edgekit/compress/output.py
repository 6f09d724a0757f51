"""Writes all that a run leaves: the model, where it came from, its figures, its card, its bill of materials, a report.

The folder appears in one step, whole. ``digest`` names the model: it covers weights, graph, plan, recipe and origin,
and nothing that changes between two runs, as milliseconds do.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from edgekit import saving
from edgekit.compress import bom, card, fingerprint, recipe, report
from edgekit.compress.outcome import finite
from edgekit.durable import new_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.compress.evaluate import Score
    from edgekit.compress.outcome import Outcome

NAMED = ("weights.safetensors", "network.pt2", "model.onnx", "plan.json", "recipe.toml", "lineage.json")
"""The files that the digest covers, where they are there."""


def write(outcome: Outcome, folder: Path, others: Mapping[str, bytes] | None = None) -> str:
    """Write the folder in one step, replacing a model that was there; return the model's digest.

    ``others`` are files to lie beside these, by name.

    Raises:
        CompressionError: the network cannot be traced to a graph; says where.
        UsageError: ``folder`` holds something else than a saved model.
    """
    saving.refuse_foreign(folder)
    with new_folder(folder) as scratch:
        saving.write(outcome.compressed, scratch)
        (scratch / "recipe.toml").write_text(recipe.encode(outcome.recipe), encoding="utf-8")
        (scratch / "lineage.json").write_bytes(_json(outcome.origin))
        digest = digest_of(scratch)
        (scratch / "metrics.json").write_bytes(_json({"digest": digest, **figures(outcome)}))
        (scratch / "MODEL_CARD.md").write_text(card.card(outcome, digest), encoding="utf-8")
        (scratch / "report.html").write_text(report.page(outcome, digest), encoding="utf-8")
        for name, content in (others or {}).items():
            (scratch / name).write_bytes(content)
        written = [path for path in scratch.rglob("*") if path.is_file()]
        files = {path.relative_to(scratch).as_posix(): fingerprint.file_digest(path) for path in written}
        (scratch / "bom.cdx.json").write_bytes(bom.encode(bom.bom(outcome, digest, files)))
    return digest


def digest_of(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the files that make the model."""
    total = hashlib.sha256()
    for name in NAMED:
        if (folder / name).is_file():
            total.update(f"{name}\0{fingerprint.file_digest(folder / name)}\n".encode())
    return total.hexdigest()


def figures(outcome: Outcome) -> dict[str, object]:
    """Return every figure as plain data, as ``metrics.json`` and ``--json`` tell it."""
    return {
        "precision": outcome.compressed.precision,
        "scores": {
            split: {"before": _score(before), "after": _score(after)}
            for split, (before, after) in outcome.scores.items()
        },
        "before": {name: finite(pair[0]) for name, pair in outcome.table().items()},
        "after": {name: finite(pair[1]) for name, pair in outcome.table().items()},
        "stages": [
            {"name": s.name, "bytes": s.bytes, "macs": s.macs, "score": s.score, "ms": s.ms} for s in outcome.stages
        ],
        "reference": outcome.reference or None,
        "latency": outcome.latency_note,
        "warnings": list(outcome.warnings),
        "notes": list(outcome.notes),
    }


def _score(score: Score) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(score)
    return plain | {"value": finite(score.value), "low": finite(score.low), "high": finite(score.high)}


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"))
