"""One file a format: its file name is the format's name and the name of the backend that runs it.

Knows what every exporter must give; knows no format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.device_profiles import DeviceProfile
    from edgekit.manifest import EngineBuild, Port
    from edgekit.model import Model
    from edgekit.progress import Progress
    from edgekit.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What an exporter wrote: paths relative to its folder, the file's own ports, what it needs to run.

    ``batch`` is the only batch size the file takes, -1 for any. ``operators``: how many of each the file has.
    ``weights``: how each weight lies in the file, in words, where that is not what the plan says.
    ``engine``: how a device builds an engine of its own of the file.
    """

    main: str
    files: tuple[str, ...]
    precision: str
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    batch: int = -1
    requires: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    engine: EngineBuild | None = None


class Exporter(Protocol):
    """Lowers a model and its plan into one format."""

    extra: str
    """The extra that installs what the exporter needs."""

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file(s) for one hardware class into the empty ``folder``.

        Raises:
            ExportError: the format cannot hold the model; names the tensor or node and the nearest thing it can do.
            MissingExtra: a package is not installed.
        """
        ...


@runtime_checkable
class Evaluator(Protocol):
    """An exporter that can read its file back and compute it where no engine runs it."""

    def evaluate(self, main: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the file's public outputs from public inputs, from the bytes on disk alone."""
        ...
