"""What serves, and a request's hold on it. Knows neither when models are changed nor what is done with answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, TypeVar

from edgekit.errors import EdgekitError, InputError
from edgekit.runtime.batching import batcher_for
from edgekit.runtime.comparison import Comparison
from edgekit.runtime.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.runtime.batching import Batching
    from edgekit.runtime.session import TextSession
    from edgekit.runtime.telemetry import Telemetry
    from edgekit.tensors import Array

    Told = TypeVar("Told")


class Serving:
    """A session, who uses it, and what is counted of it."""

    def __init__(self, session: Session | TextSession, telemetry: Telemetry, how: Batching | None) -> None:
        self.session = session
        self.telemetry = telemetry
        self.batcher = batcher_for(session, how) if how and isinstance(session, Session) else None
        self.in_flight = 0
        self.retired = self.closed = False
        self.used = time.perf_counter()


class Pair:
    """The older of two models that serve, and which part of the requests the newer one answers."""

    def __init__(self, old: Serving, share: float) -> None:
        self.old = old
        self.share = share
        self.comparison = Comparison()
        self._owed = 0.0

    def chosen(self, new: Serving) -> Serving:
        """Choose for one request; the host orders the calls. Of any hundred, just so many go to the newer model."""
        self._owed += self.share
        if self._owed < 1 - 1e-9:
            return self.old
        self._owed -= 1
        return new


class Lender(Protocol):
    """Whose sessions are leased."""

    def acquire(self) -> Serving:
        """Take what serves now."""
        ...

    def release(self, serving: Serving) -> None:
        """Give back what was taken."""
        ...


class Lease:
    """One request's hold on a session. A class of its own: a generator would cost every request 5 us."""

    __slots__ = ("_lender", "_serving", "_started")

    def __init__(self, lender: Lender) -> None:
        self._lender = lender

    def __enter__(self) -> Session | TextSession:
        self._serving = self._lender.acquire()
        self._started = self._serving.used = time.perf_counter()
        return self._serving.session

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute on the leased model, which takes tensors, alone or in company."""
        serving = self._serving
        return serving.batcher.run(inputs) if serving.batcher else of_tensors(serving.session).run(inputs)

    def prepared(self, prepare: Callable[[], Told]) -> Told:
        """Prepare inputs that `run` will get."""
        if self._serving.batcher is None:
            return prepare()
        with self._serving.batcher.coming():
            return prepare()

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        serving = self._serving
        if error is None:
            serving.telemetry.answered(time.perf_counter() - self._started)
        elif isinstance(error, EdgekitError):
            serving.telemetry.failed(type(error).__name__, by_caller=isinstance(error, InputError))
        self._lender.release(serving)


def of_tensors(session: Session | TextSession) -> Session:
    """Return a session that takes tensors.

    Raises:
        InputError: it is a language model's.
    """
    if isinstance(session, Session):
        return session
    raise InputError(f"{session.contract.name} is a language model", "ask it for a chat or a completion")
