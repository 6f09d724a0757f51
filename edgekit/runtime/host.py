"""Holds the model that serves, and replaces it without dropping a request. Knows no HTTP and no update channel.

A request keeps the session on which it began until it ends; a session that was replaced is closed by the last
request that leaves it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgekit.errors import EdgekitError, InputError, UsageError
from edgekit.runtime.session import Session, TextSession
from edgekit.runtime.telemetry import Statistics, Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from edgekit.runtime.detection import Detected
    from edgekit.tensors import Array

    Told = TypeVar("Told")
    Question = Callable[[Session], tuple[dict[str, Array], Callable[[dict[str, Array]], Told]]]

MAX_SHADOWED = 8
MAX_REMEMBERED = 16


@dataclass(frozen=True)
class Answer:
    """The outputs of a request, and the digest of the bundle that computed them."""

    outputs: dict[str, Array]
    digest: str


@dataclass(frozen=True)
class Agreement:
    """How often the old and the new model chose the same class: ``same`` of ``samples``.

    ``skipped`` requests were not compared: the old model was still busy, or failed on them.
    """

    samples: int = 0
    same: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        """From 0 to 1; 1 where nothing was compared."""
        return self.same / self.samples if self.samples else 1.0


class _Serving:
    """A session, who uses it, and what is counted of it."""

    def __init__(self, session: Session | TextSession, telemetry: Telemetry) -> None:
        self.session = session
        self.telemetry = telemetry
        self.in_flight = 0
        self.retired = False


class Host:
    """Serves one model at a time to any number of threads."""

    def __init__(self, session: Session | TextSession) -> None:
        self._lock = threading.Lock()
        self._changing = threading.RLock()
        self._known: OrderedDict[str, Telemetry] = OrderedDict()
        self._serving = _Serving(session, self._telemetry(session.digest))
        self._shadow: _Shadow | None = None
        self._closed = False

    @property
    def session(self) -> Session | TextSession:
        """The session that serves new requests now; may be replaced at any time, so take it once."""
        return self._serving.session

    @property
    def digest(self) -> str:
        """The digest of the bundle that serves now."""
        return self._serving.session.digest

    @contextmanager
    def lease(self) -> Iterator[Session | TextSession]:
        """Keep the serving session alive for one request, and count its time or its error.

        Raises:
            UsageError: the host is closed.
        """
        serving = self._acquire()
        started = time.perf_counter()
        try:
            yield serving.session
        except EdgekitError as error:
            serving.telemetry.failed(type(error).__name__, by_caller=isinstance(error, InputError))
            raise
        else:
            serving.telemetry.answered(time.perf_counter() - started)
        finally:
            self._release(serving)

    def run(self, inputs: Mapping[str, Array]) -> Answer:
        """Compute the outputs for a batch on the serving model.

        Raises:
            InputError: an input does not fit, or the model takes text.
            HealthError: the engine fails.
        """
        with self.lease() as leased:
            session = _of_tensors(leased)
            outputs = session.run(inputs)
        self._observe(session, inputs, outputs)
        return Answer(outputs, session.digest)

    def run_raw(self, picture: bytes) -> tuple[list[tuple[str, float]], str]:
        """Return the best labels for an encoded picture, and the digest of the bundle.

        Raises:
            InputError: the bytes are no picture, or the model takes none or gives no labels.
            HealthError: the engine fails.
        """
        return self._asked(lambda session: (session.picture_inputs(picture), lambda out: session.labels(out)[0]))

    def run_text(self, texts: Sequence[str]) -> tuple[list[tuple[str, float]], str]:
        """Return the best labels for a text or a pair, and the digest of the bundle.

        Raises:
            InputError: the model takes no text, or gives no labels.
            HealthError: the engine fails.
        """
        return self._asked(lambda session: (session.text_inputs(*texts), lambda out: session.labels(out)[0]))

    def embed(self, texts: Sequence[str]) -> tuple[Array, int, str]:
        """Return a vector for each text [texts, width], how many tokens were read, and the digest of the bundle.

        Raises:
            InputError: the model takes no text, or gives no vectors.
            HealthError: the engine fails.
        """

        def question(
            session: Session,
        ) -> tuple[dict[str, Array], Callable[[dict[str, Array]], tuple[Array, int]]]:
            inputs = session.texts_inputs(texts)
            how = session.contract.text
            counted = inputs.get(how.mask) if how else None
            tokens = int(counted.sum()) if counted is not None else sum(array.size for array in inputs.values())
            return inputs, lambda outputs: (session.vectors(inputs, outputs), tokens)

        (vectors, tokens), digest = self._asked(question)
        return vectors, tokens, digest

    def detect(self, picture: bytes) -> tuple[list[Detected], str]:
        """Return the objects in an encoded picture, and the digest of the bundle.

        Raises:
            InputError: the bytes are no picture, or the model takes none or finds no objects.
            HealthError: the engine fails.
        """

        def question(session: Session) -> tuple[dict[str, Array], Callable[[dict[str, Array]], list[Detected]]]:
            inputs, placement = session.placed(picture)
            return inputs, lambda outputs: session.objects(outputs, (placement,))[0]

        return self._asked(question)

    def _asked(self, question: Question[Told]) -> tuple[Told, str]:
        """Prepare inputs, compute, and tell of the outputs, all by the session that serves now."""
        with self.lease() as leased:
            session = _of_tensors(leased)
            inputs, told = question(session)
            outputs = session.run(inputs)
            answer = told(outputs)
        self._observe(session, inputs, outputs)
        return answer, session.digest

    def swap(self, new: Session | TextSession, *, shadow: bool = False) -> None:
        """Let ``new`` serve from the next request on; requests in flight finish where they began.

        With ``shadow`` the old model lives on and computes the live requests too, until `end_shadow` or
        `roll_back`; only the new one's answers are returned.

        Raises:
            UsageError: the host is closed; ``new`` is closed too, then.
        """
        with self._changing:
            self.end_shadow()
            with self._lock:
                closed = self._closed
                old = self._serving
                if not closed:
                    self._serving = _Serving(new, self._telemetry(new.digest))
                    self._shadow = _Shadow(old) if shadow else None
        if closed:
            new.close()
            raise UsageError("the host is closed")
        if not shadow:
            self._retire(old)

    def agreement(self) -> Agreement:
        """Compare so far; nothing where no shadow runs."""
        shadow = self._shadow
        return shadow.agreement() if shadow else Agreement()

    def end_shadow(self) -> Agreement:
        """Finish the comparison, close the old model, and return how well both agreed."""
        shadow = self._take_shadow()
        if shadow is None:
            return Agreement()
        result = shadow.finish()
        self._retire(shadow.old)
        return result

    def roll_back(self) -> None:
        """Let the shadowed old model serve again, and close the new one after its last request.

        Raises:
            UsageError: no old model is kept.
        """
        with self._changing:
            shadow = self._take_shadow()
            if shadow is None:
                raise UsageError("there is no model to go back to", "swap with shadow=True keeps the old one")
            shadow.finish()
            with self._lock:
                new, self._serving = self._serving, shadow.old
            self._retire(new)

    def statistics(self, digest: str | None = None) -> Statistics:
        """Return what was counted of one bundle, by default the serving one."""
        with self._lock:
            digest = self._serving.session.digest if digest is None else digest
            telemetry = self._known.get(digest)
        return telemetry.statistics() if telemetry else Statistics(digest=digest)

    def close(self) -> None:
        """Refuse new requests; the model is closed after the last one in flight."""
        with self._changing:
            self.end_shadow()
            with self._lock:
                self._closed = True
            self._retire(self._serving)

    def _telemetry(self, digest: str) -> Telemetry:
        telemetry = self._known.setdefault(digest, Telemetry(digest))
        telemetry.forget_latencies()  # of an earlier time: they must not judge the model again
        self._known.move_to_end(digest)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return telemetry

    def _acquire(self) -> _Serving:
        with self._lock:
            if self._closed:
                raise UsageError("the host is closed")
            self._serving.in_flight += 1
            return self._serving

    def _release(self, serving: _Serving) -> None:
        with self._lock:
            serving.in_flight -= 1
            last = serving.retired and serving.in_flight == 0
        if last:
            serving.session.close()

    def _retire(self, serving: _Serving) -> None:
        with self._lock:
            serving.retired = True
            idle = serving.in_flight == 0
        if idle:
            serving.session.close()

    def _take_shadow(self) -> _Shadow | None:
        with self._lock:
            shadow, self._shadow = self._shadow, None
        return shadow

    def _observe(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        # A client that sends NaN gets NaN: that is no fault of the model, and must not roll it back.
        if not all(map(_is_finite, outputs.values())) and all(map(_is_finite, inputs.values())):
            telemetry = self._known.get(session.digest)
            if telemetry:
                telemetry.saw_non_finite()
        shadow = self._shadow
        if shadow is not None:
            shadow.compare(session, inputs, outputs)


def _of_tensors(session: Session | TextSession) -> Session:
    if isinstance(session, Session):
        return session
    raise InputError(f"{session.contract.name} is a language model", "ask it for a chat or a completion")


class _Shadow:
    """Runs the old model on live requests in one thread of its own, never more than a few behind."""

    def __init__(self, old: _Serving) -> None:
        self.old = old
        self._lock = threading.Lock()
        self._pending = self._samples = self._same = self._skipped = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def compare(self, new: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Queue one request that ``new`` has answered; skip it where the old model cannot keep up."""
        with self._lock:
            if self._pending >= MAX_SHADOWED:
                self._skipped += 1
                return
            self._pending += 1
        try:
            self._thread.submit(self._compare, new, dict(inputs), dict(outputs))
        except RuntimeError:  # the comparison ended in this moment
            with self._lock:
                self._pending -= 1

    def agreement(self) -> Agreement:
        """Return the counts as they stand."""
        with self._lock:
            return Agreement(self._samples, self._same, self._skipped)

    def finish(self) -> Agreement:
        """Compare what is queued, and end."""
        self._thread.shutdown(wait=True)
        return self.agreement()

    def _compare(self, new: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        samples = same = skipped = 0
        try:
            session = self.old.session
            if isinstance(session, Session):
                samples, same = _same((session, session.run(inputs)), (new, outputs))
        except EdgekitError:
            skipped = 1
        with self._lock:
            self._pending -= 1
            self._samples += samples
            self._same += same
            self._skipped += skipped


def _same(old: tuple[Session, Mapping[str, Array]], new: tuple[Session, Mapping[str, Array]]) -> tuple[int, int]:
    """Count the samples, and those on which both answer alike.

    Detectors do where they see the same kind of object best, each by its own manifest, or both none.
    """
    if not all(session.contract.detection for session, _ in (old, new)):
        return _same_choices(old[1], new[1])
    best = [
        [objects[0].label if objects else None for objects in session.objects(outputs)]
        for session, outputs in (old, new)
    ]
    return len(best[1]), sum(before == now for before, now in zip(*best, strict=False))


def _same_choices(old: Mapping[str, Array], new: Mapping[str, Array]) -> tuple[int, int]:
    """Count the samples, and those on which both have their largest score in the same place of the first output."""
    name = next(iter(new))
    ours, theirs = new[name], old.get(name)
    if theirs is None or theirs.shape != ours.shape or ours.ndim == 0:
        return len(ours) if ours.ndim else 1, 0
    flat = ours.reshape(len(ours), -1), theirs.reshape(len(ours), -1)
    return len(ours), int((flat[0].argmax(1) == flat[1].argmax(1)).sum())


def _is_finite(array: Array) -> bool:
    if array.dtype.kind != "f":
        return True
    import numpy as np

    # A sum is NaN or infinite if any part is, and cheap; it may also overflow, so a bad one is looked at closely.
    return math.isfinite(np.add.reduce(array, axis=None)) or bool(np.isfinite(array).all())
