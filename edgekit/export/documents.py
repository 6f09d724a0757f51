"""What a bundle holds for people and auditors: model card, bill of materials, the plan. Knows no format.

No date, and nothing of the machine: the same model with the same tools has the same documents.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

import edgekit
from edgekit import plan
from edgekit.bundle import hash_file
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.manifest import Manifest, Variant
    from edgekit.model import Model

CARD, BOM, MODEL_BOM = "MODEL_CARD.md", "bom.cdx.json", "model.bom.cdx.json"
PATHS = {name: f"documents/{name}" for name in (CARD, BOM, plan.FILE, MODEL_BOM)}
OPEN = "> **TO BE FILLED IN BY THE OWNER:** "
EXPRESSION = re.compile(r"[A-Za-z0-9.+()-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+()-]+)*")


def check_license(expression: str) -> str:
    """Return an SPDX licence expression, as ``Apache-2.0`` or ``MIT OR LicenseRef-our-own``; empty for none told.

    Raises:
        UsageError: it is none.
    """
    if expression and not EXPRESSION.fullmatch(expression):
        raise UsageError(
            f"{expression!r} is no SPDX licence expression", "write Apache-2.0, MIT OR GPL-2.0-only, LicenseRef-our-own"
        )
    return expression


def documents_of(model: Model, draft: Manifest, sources: Mapping[str, Path | bytes]) -> dict[str, bytes]:
    """Return the documents of a bundle by name, of ``draft`` and the files that it will list.

    The card and the bill that `edgekit compress` wrote are carried, the first with a table of the files added.
    """
    found = {CARD: _card(model, draft, sources)}
    if model.plan:
        found[plan.FILE] = msgspec.json.format(msgspec.json.encode(model.plan)) + b"\n"
    if MODEL_BOM in model.documents:
        found[MODEL_BOM] = model.documents[MODEL_BOM]
    listed = {**sources, **{PATHS[name]: content for name, content in found.items()}}
    found[BOM] = msgspec.json.format(msgspec.json.encode(_bom(draft, listed))) + b"\n"
    return found


def _card(model: Model, draft: Manifest, sources: Mapping[str, Path | bytes]) -> bytes:
    own = model.documents.get(CARD, b"").decode(errors="replace")
    lines = [own.rstrip() if own else _plain_card(draft), "## Files of this bundle", _table(draft, sources)]
    if draft.license:
        lines.append(f"Licence: {draft.license}.")
    return ("\n\n".join(lines) + "\n").encode()


def _plain_card(draft: Manifest) -> str:
    specs = [f"- {kind} `{s}`" for kind, found in (("input", draft.inputs), ("output", draft.outputs)) for s in found]
    return "\n\n".join(
        [
            f"# {draft.name} {draft.version}",
            *(["\n".join(specs)] if specs else []),
            "## Intended use",
            OPEN + "what the model is for, who uses it, and what it must not be used for.",
            "## Data",
            OPEN + "what it was trained and measured on, and how well it does there.",
        ]
    )


def _table(draft: Manifest, sources: Mapping[str, Path | bytes]) -> str:
    head = ("hardware class", "format", "precision", "bytes", "needs", "compared with the model")
    rows = [head, ("---",) * len(head), *(_row(variant, sources) for variant in draft.variants)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(variant: Variant, sources: Mapping[str, Path | bytes]) -> tuple[str, ...]:
    size = sum(_size(sources[path]) for path in variant.files)
    needs = ", ".join(f"{name} {value}" for name, value in variant.requires.items())
    parity = variant.parity
    figure = "" if parity.sqnr_db is None else f", SQNR {parity.sqnr_db:g} dB over {parity.samples} samples"
    return (variant.name, variant.format, variant.precision, f"{size:,}", needs or "-", parity.status + figure)


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _sha256(source: Path | bytes) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else hash_file(source)


def _bom(draft: Manifest, listed: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """Return the bill of materials: CycloneDX 1.6 (ECMA-424); its serial number is made from the files' hashes."""
    hashes = {path: _sha256(source) for path, source in sorted(listed.items())}
    ref = f"bundle-{draft.name}"
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": draft.name,
        "version": draft.version,
        "description": ", ".join(f"{v.name}: {v.format} {v.precision}" for v in draft.variants),
    }
    if draft.license:
        component["licenses"] = [{"expression": draft.license}]
    tool = {"type": "application", "name": "edgekit", "version": edgekit.__version__}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, repr((draft.name, draft.version, hashes)))}",
        "version": 1,
        "metadata": {"component": component, "tools": {"components": [tool]}},
        "components": [
            {
                "type": "file",
                "bom-ref": f"file-{path}",
                "name": path,
                "hashes": [{"alg": "SHA-256", "content": content}],
            }
            for path, content in hashes.items()
        ],
        "dependencies": [{"ref": ref, "dependsOn": [f"file-{path}" for path in hashes]}],
    }
