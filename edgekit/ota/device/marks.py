"""Low-water marks, in one small file of their own: the time, and the version of each model, below which nothing goes.

They outlive `state.json`: a device that loses it must not become one that accepts old releases again.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit.durable import BAD_BLOCK, write_file

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.ota.release import Release

log = logging.getLogger(__name__)

FILE = "marks.json"
REMEMBERED = 100
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """When metadata was last verified here, and which version of each model was last confirmed."""

    verified: Annotated[datetime, msgspec.Meta(tz=True)] = EPOCH
    versions: dict[str, int] = {}


def load(folder: Path) -> Marks:
    """Read the marks; where there are none, or none that can be read, everything is above them.

    Lost marks cost the second line of defence, not the update: until the next version is confirmed only `state.json`
    forbids the way back, and the time when this version of edgekit was made stands in for that of the last metadata.
    """
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Marks)
    except FileNotFoundError:
        return Marks()
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in BAD_BLOCK:
            raise
        log.error("%s is damaged and begun anew: %s", path, error)  # noqa: TRY400  # no trace: it is no bug
        return Marks()


def note_time(folder: Path, now: datetime) -> None:
    """Remember that metadata was verified now; a mark never goes back."""
    marks = load(folder)
    if now > marks.verified:
        _save(folder, msgspec.structs.replace(marks, verified=now))


def note_version(folder: Path, release: Release) -> None:
    """Remember the version of a model that serves here for good."""
    marks = load(folder)
    if marks.versions.get(release.model) != release.version:
        others = {model: n for model, n in marks.versions.items() if model != release.model}
        versions = {**dict(list(others.items())[1 - REMEMBERED :]), release.model: release.version}
        _save(folder, msgspec.structs.replace(marks, versions=versions))


def _save(folder: Path, marks: Marks) -> None:
    write_file(folder / FILE, msgspec.json.encode(marks))
