"""Engines that run in a process of their own, which is started anew when it dies. Knows no engine's package.

A process that died is started again after a pause (`crashes`); until it is ready every request fails at once. A request
that was under way when it died is not repeated: it may be what kills it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import EdgekitError, EngineCrashed, UsageError
from edgekit.runtime import failures
from edgekit.runtime.failures import Failed
from edgekit.runtime.isolation import Condition, crashes
from edgekit.runtime.isolation.crashes import Crashes
from edgekit.runtime.isolation.lanes import (
    UNBOUNDED,
    Chat,
    Complete,
    Done,
    Embed,
    Embedded,
    Nonsense,
    Piece,
    Ran,
    Run,
    Score,
    Scored,
)
from edgekit.runtime.isolation.process import Died, EngineProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgekit.runtime.backends import Message, Sampling, TextPiece
    from edgekit.runtime.isolation import Isolation
    from edgekit.runtime.isolation.lanes import Lane, Start
    from edgekit.tensors import Array

log = logging.getLogger(__name__)


class _Watched:
    """A process, and the next one where it dies, until it is closed."""

    def __init__(self, start: Start, digest: str, isolation: Isolation) -> None:
        self._start = start
        self._digest = digest
        self._isolation = isolation
        self._name = f"{start.folder}: {start.variant.name}"
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._process: EngineProcess | None = None
        self._runs = 0
        self._restarts = 0
        self._kinds: Counter[str] = Counter()
        self._crashes = Crashes()
        self._last = ""
        self._back_at = 0.0
        self.engine, self.embeds, self.room = "", False, UNBOUNDED
        begun: Future[None] = Future()
        self._thread = threading.Thread(target=self._watch, args=(begun,), name="edgekit-engine", daemon=True)
        self._thread.start()
        begun.result()

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """Lend a lane to one request.

        Raises:
            EngineCrashed: there is no process now, or it dies under the request.
            UsageError: the engine is closed.
        """
        process = self._entered()
        try:
            with process.lane(self._isolation.seconds) as lane:
                yield lane
        except Died as error:
            raise self._crashed(process.how) from error
        finally:
            self._left()

    def condition(self) -> Condition:
        """Return how the process does now."""
        with self._lock:
            return Condition(
                pid=self._process.pid if self._process else None,
                restarts=self._restarts,
                crashes=dict(self._kinds),
                is_broken=self._crashes.are_too_many(time.monotonic()),
            )

    def close(self) -> None:
        """Let the process end after the last request in flight; later ones are errors."""
        with self._lock:
            self._closed.set()
            process = self._process if self._runs == 0 else None
        if process is not None:
            process.leave()

    def _entered(self) -> EngineProcess:
        with self._lock:
            if self._closed.is_set():
                raise UsageError("this engine is closed", "load the bundle again")
            if self._process is not None:
                self._runs += 1
                return self._process
            last = self._last
        raise self._crashed(last)

    def _left(self) -> None:
        with self._lock:
            self._runs -= 1
            process = self._process if self._closed.is_set() and self._runs == 0 else None
        if process is not None:
            process.leave()

    def _crashed(self, how: str) -> EngineCrashed:
        pause = max(0.0, self._back_at - time.monotonic())
        then = f"it starts again in {pause:.1f} s" if pause else "it is being started again"
        hint = "the system may lack memory: see its log" if how == "SIGKILL" else "ask again then"
        return EngineCrashed(f"the engine {crashes.told(how)}; {then}", hint, retry_seconds=max(pause, 1.0))

    def _watch(self, begun: Future[None]) -> None:
        """Be the thread that starts the processes and waits for their end."""
        try:
            first = EngineProcess(self._start)
        except BaseException as error:  # noqa: BLE001  # it is raised where the engine was asked for
            begun.set_exception(error)
            return
        self._up(first)
        begun.set_result(None)
        process: EngineProcess | None = first
        while process is not None:
            how = process.wait()
            closed = self._down(how)
            process.gone.set()
            process = None if closed else self._again()

    def _again(self) -> EngineProcess | None:
        """Start another process after a pause, over and over; None where the engine was closed meanwhile."""
        start = msgspec.structs.replace(self._start, digest=self._digest)
        while not self._closed.wait(max(0.0, self._back_at - time.monotonic())):
            try:
                process = EngineProcess(start)
            except EdgekitError as error:
                log.error("%s: the engine does not start: %s", self._name, error.message)  # noqa: TRY400  # no bug
                self._down(crashes.START)
                continue
            self._restarts += 1
            self._up(process)
            return process
        return None

    def _up(self, process: EngineProcess) -> None:
        with self._lock:
            self.engine, self.embeds, self.room = process.ready.engine, process.ready.embeds, process.ready.room
            self._process = process
            closed = self._closed.is_set()
        if closed:
            process.leave()

    def _down(self, how: str) -> bool:
        """Count the end of a process; say whether it was wanted."""
        with self._lock:
            self._process = None
            if self._closed.is_set() and self._runs == 0:
                return True
            self._last = how
            self._kinds[how] += 1
            now = time.monotonic()
            self._crashes = self._crashes.after(now)
            self._back_at = now + self._crashes.pause(random.random())  # noqa: S311  # spreads load, protects nothing
            count, broken = len(self._crashes.times), self._crashes.are_too_many(now)
        window = crashes.WINDOW_SECONDS / 60
        log.error("%s: the engine %s; crash %d within %g min", self._name, crashes.told(how), count, window)
        if broken:
            self._isolation.on_broken(
                f"the engine crashed {count} times within {window:g} min; at last it {crashes.told(how)}"
            )
        return False


class Isolated:
    """What both kinds of engine share: a process that is watched, and ends with the last reference to its engine.

    Raises:
        EngineCrashed: the process died when it opened the engine.
        EdgekitError: what opening the engine raised.
    """

    def __init__(self, start: Start, digest: str, isolation: Isolation) -> None:
        self._watched = _Watched(start, digest, isolation)
        weakref.finalize(self, self._watched.close)

    def condition(self) -> Condition:
        """Return how the process does now."""
        return self._watched.condition()

    def close(self) -> None:
        """Let the process end after the last request in flight; later ones are errors."""
        self._watched.close()


class IsolatedEngine(Isolated):
    """A tensor model in a process of its own."""

    @property
    def engine(self) -> str:
        """Name and version of what runs now, and that it does so in a process of its own."""
        return f"{self._watched.engine}, isolated"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch; safe to call from several threads at once.

        Raises:
            EngineCrashed: the process is down, or dies under this request.
            EdgekitError: what the engine raised.
        """
        with self._watched.lane() as lane:
            lane.link.send(Run(lane.put(inputs), lane.size))
            told = lane.link.answer()
            if isinstance(told, Failed):
                raise failures.rebuilt(told)
            if not isinstance(told, Ran):
                raise Nonsense(type(told).__name__)
            outputs = {name: array.copy() for name, array in lane.get(told.tensors, told.size).items()}
        if told.engine:
            self._watched.engine = told.engine
        return outputs


class IsolatedText(Isolated):
    """A language model in a process of its own."""

    def __init__(self, start: Start, digest: str, isolation: Isolation) -> None:
        super().__init__(start, digest, isolation)
        self.engine = f"{self._watched.engine}, isolated"
        self.embeds, self.room = self._watched.embeds, self._watched.room

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[TextPiece]:
        """Answer a conversation piece by piece; leaving the iterator stops the generation.

        Raises:
            EngineCrashed: the process is down, or dies under this request.
            EdgekitError: what the engine raised.
        """
        return self._pieces(Chat(tuple(messages), sampling))

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[TextPiece]:
        """Continue a text piece by piece; raises as `stream` does."""
        return self._pieces(Complete(prompt, sampling))

    def next_scores(self, tokens: Sequence[int], most: int) -> Mapping[int, float]:
        """Return the log probabilities of the ``most`` likely next tokens; raises as `stream` does."""
        with self._watched.lane() as lane:
            lane.link.send(Score(tuple(tokens), most))
            told = lane.link.answer()
            if isinstance(told, Failed):
                raise failures.rebuilt(told)
            if not isinstance(told, Scored):
                raise Nonsense(type(told).__name__)
        return told.scores

    def embed(self, texts: Sequence[str]) -> tuple[Array, int]:
        """Return a vector for each text, and how many tokens were read; raises as `stream` does."""
        with self._watched.lane() as lane:
            lane.link.send(Embed(tuple(texts), lane.size))
            told = lane.link.answer()
            if isinstance(told, Failed):
                raise failures.rebuilt(told)
            if not isinstance(told, Embedded):
                raise Nonsense(type(told).__name__)
            return lane.get(told.tensors, told.size)["vectors"].copy(), told.tokens

    def _pieces(self, asked: Chat | Complete) -> Iterator[TextPiece]:
        with self._watched.lane() as lane:
            lane.link.send(asked)
            while not isinstance(told := lane.link.answer(), Done):
                if isinstance(told, Failed):
                    raise failures.rebuilt(told)
                if not isinstance(told, Piece):
                    raise Nonsense(type(told).__name__)
                yield told.piece
