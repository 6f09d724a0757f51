"""Serves with one engine while a better one gets ready, then with that. Knows no engine's package.

A run keeps the engine on which it began; the first engine is closed by the last run that leaves it. Where the better
engine fails, the first is opened again, and the run that met the failure is answered by that.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import EdgekitError, HealthError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
    """Runs on ``first`` until ``prepare``, in a thread of its own, has made a better engine; ``what`` names that.

    ``again`` opens an engine that serves where the better one fails.
    """

    def __init__(self, first: Engine, prepare: Prepare, what: str, again: Callable[[], Engine]) -> None:
        self._lock = threading.Lock()
        self._mending = threading.Lock()
        self._better: Engine | None = None
        self._again = again
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
        """Compute one batch on the engine of this moment; safe to call from several threads at once.

        Raises:
            HealthError: the engine fails, and it is not the better one, or nothing serves in its place.
        """
        engine = self._taken()
        try:
            return engine.run(inputs)
        except HealthError as error:
            if not self._mended(engine, error):
                raise
        finally:
            self._left(engine)
        engine = self._taken()
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
        self._better = better
        if not self._replace(better):
            better.close()

    def _mended(self, engine: Engine, error: HealthError) -> bool:
        """Put another engine in the failed one's place, however many runs it failed; say whether one may run again."""
        if engine is not self._better:
            return False
        with self._mending:
            if self._serving is not engine:  # another run has been here, or it was closed
                return self._serving is not None
            log.error("%s fails, and is left: %s", engine.engine, error.message)
            other = self._again()
            self._note = f"{self._what} failed: {error.message}"
            if not self._replace(other):
                other.close()
                return False
            return True

    def _taken(self) -> Engine:
        """Return the engine of this moment, which stays open until it is left."""
        with self._lock:
            engine = self._serving
            if engine is None:
                raise UsageError("this engine is closed", "load the bundle again")
            self._runs[id(engine)] = self._runs.get(id(engine), 0) + 1
            return engine

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
            _close(old)
        return True

    def _left(self, engine: Engine) -> None:
        with self._lock:
            self._runs[id(engine)] -= 1
            is_last = self._runs[id(engine)] == 0 and self._leaving.pop(id(engine), None) is not None
        if is_last:
            _close(engine)


def _close(engine: Engine) -> None:
    """Close an engine that is needed no more; one that failed may fail at that, too, which costs nobody an answer."""
    try:
        engine.close()
    except HealthError as error:
        log.warning("%s does not close: %s", engine.engine, error.message)
