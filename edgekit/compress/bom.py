"""The bill of materials of a compressed model: CycloneDX 1.6 with a model card (ECMA-424), as JSON.

Names what the model is, what it was made from, the hash of every file, the tools, and its figures. No date, and a
serial number made from the digest, so that the same model has the same bill.
"""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.compress.evaluate import Score
    from edgekit.compress.origin import Source
    from edgekit.compress.outcome import Outcome

Document = dict[str, Any]


def bom(outcome: Outcome, digest: str, files: Mapping[str, str]) -> Document:
    """Return the document; ``files`` gives the SHA-256 of each file of the folder."""
    model, origin = outcome.compressed, outcome.origin
    component: Document = {
        "type": "machine-learning-model",
        "bom-ref": f"model-{digest}",
        "name": model.name,
        "version": digest[:12],
        "description": f"{model.name}, {model.precision}, compressed by edgekit",
        "hashes": [_hash(digest)],
        "pedigree": {
            "ancestors": [_ancestor(origin.model, model.name, original=outcome)],
            "notes": "compressed by: " + ", ".join(step.name for step in model.lineage if step.name != "load"),
        },
        "modelCard": _card(outcome),
        "properties": [
            {"name": f"edgekit:bytes:{when}", "value": str(stage.bytes)}
            for when, stage in (("before", outcome.stages[0]), ("after", outcome.stages[-1]))
        ],
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {
            "component": component,
            "tools": {
                "components": [
                    {"type": "application" if name == "edgekit" else "library", "name": name, "version": version}
                    for name, version in origin.tools.items()
                ]
            },
        },
        "components": [*_materials(outcome), *_files(files)],
        "dependencies": [
            {"ref": f"model-{digest}", "dependsOn": [f"file-{name}" for name in sorted(files)]},
        ],
    }


def _ancestor(source: Source, name: str, *, original: Outcome) -> Document:
    found: Document = {"type": "machine-learning-model", "name": name, "description": f"from {source.name}"}
    weights = original.origin.checkpoint or source
    return found | ({"hashes": [_hash(weights.sha256)]} if weights.sha256 else {})


def _card(outcome: Outcome) -> Document:
    model = outcome.compressed
    parameters: Document = {
        "task": model.task,
        "inputs": [{"format": str(spec)} for spec in model.inputs],
        "outputs": [{"format": str(spec)} for spec in model.outputs],
    }
    if outcome.origin.data_sha256:
        parameters["datasets"] = [{"ref": "data"}]
    metrics = [
        _metric(score, f"{split}, {when}", part=part, value=value)
        for split, pair in outcome.scores.items()
        for when, score in zip(("before compression", "after compression"), pair, strict=True)
        for part, value in (("", score.value), *score.by_group.items())
        if math.isfinite(value)
    ]
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {"technicalLimitations": list(outcome.warnings)} if outcome.warnings else {},
    }


def _metric(score: Score, place: str, *, part: str, value: float) -> Document:
    found: Document = {"type": score.metric, "value": repr(value), "slice": f"{place}{f', {part}' if part else ''}"}
    if not part and math.isfinite(score.low) and math.isfinite(score.high):
        found["confidenceInterval"] = {"lowerBound": repr(score.low), "upperBound": repr(score.high)}
    return found


def _materials(outcome: Outcome) -> list[Document]:
    origin = outcome.origin
    found: list[Document] = []
    if origin.data_sha256:
        sizes = ", ".join(f"{name} {size}" for name, size in origin.samples.items())
        name = origin.data.name if origin.data else "data"
        contents = [{"name": name, "value": f"{sizes} samples"}]
        data = {"type": "dataset", "name": name, "contents": {"properties": contents}}
        hashes = [_hash(origin.data_sha256)]
        found.append({"type": "data", "bom-ref": "data", "name": name, "data": [data], "hashes": hashes})
    for kind, source in (("code of the model", origin.model), ("checkpoint", origin.checkpoint)):
        if source and source.sha256:
            found.append(
                {"type": "file", "bom-ref": f"source-{kind}", "name": source.name, "hashes": [_hash(source.sha256)]}
            )
    return found


def _files(files: Mapping[str, str]) -> list[Document]:
    return [
        {"type": "file", "bom-ref": f"file-{name}", "name": name, "hashes": [_hash(sha256)]}
        for name, sha256 in sorted(files.items())
    ]


def _hash(sha256: str) -> Document:
    return {"alg": "SHA-256", "content": sha256}


def encode(document: Document) -> bytes:
    """Return the document as JSON that a person can read."""
    return msgspec.json.format(msgspec.json.encode(document))
