"""What a compressed model was made from: digests of checkpoint, data and code, the tools, the machine, the seed.

Holds no date and no time: the same call on the same machine gives the same text. Measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.compress import fingerprint

if TYPE_CHECKING:
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Model


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that went in, by the last part of its path and the SHA-256 of its content."""

    name: str
    sha256: str = ""


class Origin(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The file ``lineage.json``."""

    version: int = 1
    model: Source
    checkpoint: Source | None = None
    data: Source | None = None
    data_sha256: str = ""
    samples: dict[str, int] = {}
    seeds: tuple[int, ...] = ()
    edgekit_sha256: str
    tools: dict[str, str]
    machine: dict[str, str | int]


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """What a person gave: the model, and where they gave them, a checkpoint and data."""

    model: Source
    checkpoint: Source | None = None
    data: Source | None = None


def sources_of(source: str, checkpoint: Path | None = None, data: str | None = None) -> Sources:
    """Name and hash what a person gave."""
    return Sources(
        model=source_of(source),
        checkpoint=source_of(str(checkpoint)) if checkpoint else None,
        data=source_of(data) if data else None,
    )


def origin_of(model: Model, recipe: Recipe, sources: Sources) -> Origin:
    """Describe where a model came from."""
    seeds = dict.fromkeys(getattr(step, "seed", None) for _, step in recipe.passes)
    return Origin(
        model=sources.model,
        checkpoint=sources.checkpoint,
        data=sources.data,
        data_sha256=model.data.digest() if model.data else "",
        samples={name: len(split) for name, split in model.data.splits().items()} if model.data else {},
        seeds=tuple(seed for seed in seeds if seed is not None),
        edgekit_sha256=fingerprint.code(),
        tools=fingerprint.tools(),
        machine=fingerprint.machine(),
    )


def source_of(named: str) -> Source:
    """Name ``file.py:function``, ``package.module:function``, a file or a folder, and hash what it is."""
    path = fingerprint.place_of(named)
    short = named if path.suffix == "" and not path.exists() else Path(named).name
    if path.is_dir():
        return Source(name=path.resolve().name, sha256=fingerprint.folder_digest(path))
    return Source(name=short, sha256=fingerprint.file_digest(path) if path.is_file() else "")
