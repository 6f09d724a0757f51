"""What a model's file may not do to the engine that opens it: checked by the declared format, before native code reads.

One file a format, by the format's name. Reads structure through a mapping of the file, never the weights, so that
size costs nothing. Knows no engine and needs no package. That bytes are the signed ones is for `edgekit.bundle` to say:
these look at what a signed, or a foreign, file asks of a parser written in C++.
"""

from __future__ import annotations

import mmap
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol, cast

from edgekit import plugins
from edgekit.errors import BundleError, UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgekit.manifest import Variant

_HINT = "do not run it: have the model exported again, by somebody you trust"
_NUMBER = re.compile(rb"[0-9]{1,19}\Z")


class Damaged(ValueError):
    """A file is not what its format says: at which byte, and what is wrong there."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(f"at byte {at}: {what}")
        self.at = at
        self.what = what


@dataclass(frozen=True)
class ModelFile:
    """A file to be looked at, and what it may refer to: the files that lie beside it and are ``listed``.

    Paths are relative to ``folder``. ``listed`` ``None``: a foreign file, which may name any plain file below its own
    folder.
    """

    folder: Path
    main: str
    listed: frozenset[str] | None = None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.folder / self.main

    @contextmanager
    def mapped(self, name: str = "") -> Iterator[mmap.mmap]:
        """Map the main file, or a listed one, into memory for reading.

        Raises:
            Damaged: it is empty.
            OSError: it cannot be read.
        """
        with (self.folder / (name or self.main)).open("rb") as file:
            if not file.seek(0, 2):
                raise Damaged(0, "the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data

    def size_of(self, location: str, at: int) -> int:
        """Return the length of a file that this one names, relative to its own place.

        Raises:
            Damaged: the name leads out of the folder, to a link, or to what is not listed; ``at`` is where it stands.
        """
        parts = PurePosixPath(location).parts
        unsafe = not parts or location.startswith("/") or "\\" in location or "\0" in location or ".." in parts
        named = str(PurePosixPath(self.main).parent / location)
        if unsafe or (self.listed is not None and named not in self.listed):
            raise Damaged(at, f"it reads {location[:200]!r}, which is not a file of this model")
        path = self.folder / named
        steps = [path, *path.parents][: len(PurePosixPath(named).parts)]
        if any(step.is_symlink() for step in steps) or not path.is_file():
            raise Damaged(at, f"it reads {location[:200]!r}, which is no plain file here")
        return path.stat().st_size


class Guard(Protocol):
    """Looks at a file of one format."""

    def __call__(self, file: ModelFile) -> None:
        """Return where the file may be opened.

        Raises:
            Damaged: it is not what its format says, or reads what is not its own.
        """
        ...


def check(folder: Path, variant: Variant) -> None:
    """Look at a variant's main file before its engine does; formats without a guard are their engine's own matter.

    Raises:
        BundleError: the file is damaged or made to do harm; names file, byte and what is wrong there.
    """
    check_file(ModelFile(folder, variant.main, frozenset(variant.files)), variant.format)


def check_file(file: ModelFile, file_format: str) -> None:
    """Look at one file; see `check`.

    Raises:
        BundleError: the file is damaged or made to do harm.
    """
    try:
        guard = cast("Guard", plugins.load(__name__, file_format, "guard"))
    except UnknownName:
        return
    if not file.path.is_file():
        raise BundleError(f"{file.path.name} is missing from the bundle", "fetch or export the bundle again")
    try:
        guard(file)
    except Damaged as error:
        raise BundleError(f"{file.path.name}, byte {error.at}: {error.what}", _HINT) from error


def number(text: bytes, at: int) -> int:
    """Read a decimal number as its digits alone: what one parser skips, another does not.

    Raises:
        Damaged: anything else stands there.
    """
    if not _NUMBER.match(text):
        raise Damaged(at, f"{text[:40]!r} is no number")
    return int(text)
