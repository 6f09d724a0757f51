"""Serves with one engine while a better one gets ready, then with that. Knows no engine's package.

A run keeps the engine on which it began; the first engine is closed by the last run that leaves it.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import EdgekitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.runtime.backends import Engine
    from edgekit.tensors import Array

log = logging.getLogger(__name__)


class Prepare(Protocol):
    """Makes the better engine; may take an hour."""

    def __call__(self, first: Engine, stop: threading.Event) -> Engine:
        """Return an engine that is warm and answers as ``first`` does; give up soon after ``stop`` is set.

        Raises:
            EdgekitError: there will be none; the message is what people read.
        """
        ...


class SwappingEngine:
    """Runs on ``first`` until ``prepare``, in a thread of its own, has made a better engine; ``what`` names that."""

    def __init__(self, first: Engine, prepare: Prepare, what: str) -> None:
        self._lock = threading.Lock()
        self._serving: Engine | None = first
        self._runs: dict[int, int] = {}
        self._leaving: dict[int, Engine] = {}
        self._note = f"{what}: getting ready"
        self._what = what
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._improve, args=(first, prepare), name=what, daemon=True)
        self._thread.start()

    @property
    def engine(self) -> str:
        """What runs now, and what is to be said of the better one."""
        serving = self._serving
        name = serving.engine if serving else "closed"
        return f"{name} ({self._note})" if self._note else name

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch on the engine of this moment; safe to call from several threads at once."""
        with self._lock:
            engine = self._serving
            if engine is None:
                raise UsageError("this engine is closed", "load the bundle again")
            self._runs[id(engine)] = self._runs.get(id(engine), 0) + 1
        try:
            return engine.run(inputs)
        finally:
            self._left(engine)

    def close(self) -> None:
        """Give the better engine up, and free what runs once its last run is done."""
        self._stop.set()
        self._replace(None)

    def settled(self, seconds: float) -> bool:
        """Wait until the better engine serves or is given up; say whether that is so."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _improve(self, first: Engine, prepare: Prepare) -> None:
        note = f"{self._what}: failed, its thread's trace tells why"
        try:
            better = prepare(first, self._stop)
            note = ""
        except EdgekitError as error:
            note = f"{self._what}: {error.message}"
            if not self._stop.is_set():
                log.warning("%s serves on: %s", first.engine, error.message)
            return
        finally:
            self._note = note
        if not self._replace(better):
            better.close()

    def _replace(self, new: Engine | None) -> bool:
        """Let ``new`` run from the next call on; say False where the engine was closed meanwhile."""
        with self._lock:
            old = self._serving
            if old is None:
                return False
            self._serving = new
            is_idle = not self._runs.get(id(old))
            if not is_idle:
                self._leaving[id(old)] = old
        if is_idle:
            old.close()
        return True

    def _left(self, engine: Engine) -> None:
        with self._lock:
            self._runs[id(engine)] -= 1
            is_last = self._runs[id(engine)] == 0 and self._leaving.pop(id(engine), None) is not None
        if is_last:
            engine.close()
