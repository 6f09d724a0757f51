"""Engines that this device built, each under the name of all that it depends on. Knows no GPU and builds nothing.

One file an engine: a line of JSON (the key, and the SHA-256 of what follows), then the engine's bytes.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit import durable
from edgekit.manifest import EngineBuild

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_HEAD_BYTES = 1 << 16
MAX_ATTEMPTS = 2
"""How often an engine may have taken its process with it before it is left alone."""


def default_folder() -> Path:
    """Return where a person's engines lie: ``$XDG_CACHE_HOME/edgekit/engines``, else below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "edgekit" / "engines"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine depends on: an engine of another key is another engine.

    ``gpu`` is its name with its compute capability, ``digest`` that of the variant's files.
    """

    gpu: str
    driver: str
    builder: str
    digest: str
    options: EngineBuild

    @property
    def name(self) -> str:
        """SHA-256 over every field."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


class _Head(msgspec.Struct, frozen=True):
    key: Key
    sha256: str


class EngineCache:
    """The engines of one model in ``folder/model``; timing caches are of the machine, and lie in ``folder``."""

    def __init__(self, folder: Path, model: str) -> None:
        self._shared = folder
        self._folder = folder / model

    def find(self, key: Key) -> bytes | None:
        """Return the engine of that key; a file that is damaged is removed and counts as none."""
        path = self._path(key)
        try:
            head, _, engine = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        read = _parsed(head)
        if read is None or read.key != key or read.sha256 != hashlib.sha256(engine).hexdigest():
            self.discard(key)
            return None
        return engine

    def keep(self, key: Key, engine: bytes) -> None:
        """Write an engine in one step, and remove what no start of this machine can use any more."""
        head = msgspec.json.encode(_Head(key, hashlib.sha256(engine).hexdigest()))
        durable.write_file(self._path(key), head + b"\n" + engine)
        self._prune(key)

    def discard(self, key: Key) -> None:
        """Remove an engine that turned out to be of no use."""
        self._path(key).unlink(missing_ok=True)

    def timing(self, key: Key) -> Path:
        """Return the file of measured kernels, which every model on this GPU, driver and builder shares."""
        words = f"{key.gpu}\n{key.driver}\n{key.builder}"
        return self._shared / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.timing"

    def crashed(self, key: Key) -> bool:
        """Say whether the last tries to open that engine all took their process with them.

        Native code that dies takes the server with it, and the server's next start would try the same again.
        """
        return self._tries(key) >= MAX_ATTEMPTS

    @contextmanager
    def attempt(self, key: Key) -> Iterator[None]:
        """Count a try in a file that a crash leaves behind."""
        mark = self._mark(key)
        durable.write_file(mark, b"." * (self._tries(key) + 1))
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def _mark(self, key: Key) -> Path:
        return self._path(key).with_suffix(".trying")

    def _tries(self, key: Key) -> int:
        mark = self._mark(key)
        return len(mark.read_bytes()) if mark.is_file() else 0

    def _path(self, key: Key) -> Path:
        return self._folder / f"{key.name}.engine"

    def _prune(self, key: Key) -> None:
        """Leave the newest engine of another version of the model, in case that comes back; nothing else."""
        others = [path for path in self._folder.glob("*.engine") if path != self._path(key)]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        kept = 0
        for path in others:
            with path.open("rb") as file:
                read = _parsed(file.readline(MAX_HEAD_BYTES))
            is_version = read is not None and read.key.digest != key.digest and _same_machine(read.key, key)
            kept += is_version
            if not is_version or kept > 1:
                path.unlink(missing_ok=True)


def _parsed(head: bytes) -> _Head | None:
    try:
        return msgspec.json.decode(head, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _same_machine(one: Key, other: Key) -> bool:
    return (one.gpu, one.driver, one.builder) == (other.gpu, other.driver, other.builder)
