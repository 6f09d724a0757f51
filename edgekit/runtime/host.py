"""Holds the model that serves, and replaces it without dropping a request. Knows no HTTP and no update channel.

A request keeps the session on which it began until it ends; a session that was replaced is closed by the last
request that leaves it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from edgekit.errors import InputError, UsageError
from edgekit.runtime.comparison import Agreement
from edgekit.runtime.lease import Lease, Pair, Serving, of_tensors
from edgekit.runtime.session import Session, TextSession
from edgekit.runtime.telemetry import Statistics, Telemetry, are_finite
from edgekit.runtime.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekit.runtime.batching import Batching
    from edgekit.runtime.detection import Detected
    from edgekit.runtime.drift import Alert
    from edgekit.tensors import Array

    Again = Callable[[], Session | TextSession]
    Told = TypeVar("Told")
    Question = Callable[[Session], tuple[dict[str, Array], Callable[[dict[str, Array]], Told]]]

MAX_REMEMBERED = 16
DRAIN_SECONDS = 30.0
"""So long does a model that needs the memory of another one wait for the other's last request."""


class Answer(NamedTuple):
    """The outputs of a request, and the digest of the bundle that computed them."""

    outputs: dict[str, Array]
    digest: str


class Host:
    """Serves one model at a time to any number of threads, or two for a while.

    ``again`` opens the model anew after `unload`; requests that come meanwhile wait for it. ``watch`` looks at what was
    answered; several hosts may share one.
    """

    def __init__(
        self,
        session: Session | TextSession,
        again: Again | None = None,
        *,
        batching: Batching | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch or Watch()
        self._lock = threading.Lock()
        self._batching = batching
        self._left = threading.Condition(self._lock)
        self._changing = threading.RLock()
        self._known: OrderedDict[str, Telemetry] = OrderedDict()
        self._serving = Serving(session, self._telemetry(session.digest), batching)
        self._pair: Pair | None = None
        self._again = again
        self._closed = False

    @property
    def session(self) -> Session | TextSession:
        """The session that serves new requests now; may be replaced at any time, so take it once."""
        pair = self._pair
        return pair.old.session if pair and not pair.share else self._serving.session

    @property
    def digest(self) -> str:
        """The digest of the bundle that serves now."""
        return self.session.digest

    def lease(self) -> Lease:
        """Keep the serving session alive for one request, and count its time or its error: to be used by ``with``.

        Raises:
            UsageError: the host is closed; when it is entered.
        """
        return Lease(self)

    def run(self, inputs: Mapping[str, Array]) -> Answer:
        """Compute the outputs for a batch on the serving model.

        Raises:
            InputError: an input does not fit, or the model takes text.
            HealthError: the engine fails.
        """
        lease = self.lease()
        with lease as leased:
            session = of_tensors(leased)
            outputs = lease.run(inputs)
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

        if isinstance(self.session, TextSession):
            return self._embed_text(texts)
        (vectors, tokens), digest = self._asked(question)
        return vectors, tokens, digest

    def _embed_text(self, texts: Sequence[str]) -> tuple[Array, int, str]:
        with self.lease() as session:
            if not isinstance(session, TextSession):
                raise InputError(f"{session.contract.name} has just taken over", "ask again")
            return *session.embed_counted(texts), session.digest

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
        lease = self.lease()
        with lease as leased:
            session = of_tensors(leased)
            inputs, told = lease.prepared(lambda: question(session))
            outputs = lease.run(inputs)
            answer = told(outputs)
        self._observe(session, inputs, outputs)
        return answer, session.digest

    def swap(self, new: Session | TextSession, *, shadow: bool = False, share: float = 1.0) -> None:
        """Let ``new`` serve from the next request on; requests in flight finish where they began.

        With ``shadow`` the old model lives on and computes the live requests too, until `end_shadow` or
        `roll_back`; only the new one's answers are returned. With a ``share`` below 1 only that part of the requests,
        evenly spread, is answered by ``new``; the old model stays and answers the others, and each is computed by both.
        With 0 the old one serves on, and `split` lets ``new`` take over.

        Raises:
            UsageError: the host is closed; ``new`` is closed too, then.
        """
        with self._changing:
            self.end_shadow()
            if shadow or share < 1:
                self._reload()  # it is to answer, too
            serving = self._served(new)
            with self._lock:
                closed = self._closed
                old = self._serving
                if not closed:
                    self._serving = serving
                    self._pair = Pair(old, share) if shadow or share < 1 else None
        if closed:
            new.close()
            raise UsageError("the host is closed")
        if self._pair is None:
            self._retire(old)

    def replace(self, open_new: Again, open_old: Again | None = None) -> float:
        """Close the model, then let the one that is opened serve; return for how many seconds requests had to wait.

        For devices whose memory does not hold two. Requests in flight finish first. Where the new model does not open,
        the old one is opened again, by ``open_old`` or as the host was told.

        Raises:
            HealthError: the new model does not open; the old one serves again, or nothing does.
            UsageError: the host is closed.
        """
        with self._changing:
            self.end_shadow()
            began, old = time.perf_counter(), self._serving
            before, self._again = open_old or self._again, open_new
            self._emptied(old)
            try:
                self._reload()
            except BaseException:  # the lack of memory above all
                self._again = before
                if before:
                    self._reload()
                raise
        return time.perf_counter() - began

    def aside(self, work: Callable[[], Told], open_old: Again) -> Told:
        """Close the model, do some work that needs its memory, and open it again by ``open_old``; requests wait.

        Whatever ``work`` raises, the model is opened again; where that fails, each request that comes tries it anew.

        Raises:
            HealthError: the model does not open again.
            UsageError: the host is closed.
        """
        with self._changing:
            self.end_shadow()
            before, self._again = self._again, self._again or open_old
            self._emptied(self._serving)
            try:
                return work()
            finally:
                self._reload()
                self._again = before

    def _emptied(self, old: Serving) -> None:
        self.unload()
        with self._left:
            self._left.wait_for(lambda: old.closed, DRAIN_SECONDS)

    def split(self, share: float) -> None:
        """Let the newer of two models answer that part of the requests from now on.

        Raises:
            UsageError: no old model is kept.
        """
        pair = self._pair
        if pair is None:
            raise UsageError(
                "there is no model to share requests with", "swap with shadow=True or a share keeps the old one"
            )
        pair.share = share

    @property
    def sessions(self) -> tuple[Session | TextSession, ...]:
        """What answers requests now: the serving session, and the older one where requests are split."""
        pair = self._pair
        return (self.session, pair.old.session) if pair and 0 < pair.share < 1 else (self.session,)

    def agreement(self) -> Agreement:
        """Compare so far; nothing where no shadow runs."""
        pair = self._pair
        return pair.comparison.agreement() if pair else Agreement()

    @property
    def is_paired(self) -> bool:
        """Say whether another model computes what is asked, too."""
        return self._pair is not None

    def settled(self, seconds: float) -> Agreement:
        """Compare what was answered until now, for at most so many seconds, and return the counts."""
        pair = self._pair
        return pair.comparison.settled(seconds) if pair else Agreement()

    def end_shadow(self) -> Agreement:
        """Finish the comparison, close the model that does not serve, and return how well both agreed.

        That is the old one, unless the new one has no share of the requests yet.
        """
        pair, leaving = self._part(back=False)
        if pair is None or leaving is None:
            return Agreement()
        result = pair.comparison.finish()
        self._retire(leaving)
        return result

    def roll_back(self) -> None:
        """Let the shadowed old model serve again, and close the new one after its last request.

        Raises:
            UsageError: no old model is kept.
        """
        with self._changing:
            pair, leaving = self._part(back=True)
            if pair is None or leaving is None:
                raise UsageError("there is no model to go back to", "swap with shadow=True keeps the old one")
            pair.comparison.finish()
            self._retire(leaving)

    def batch_sizes(self) -> Mapping[int, int]:
        """Return how many batches of each size the serving model has computed; none where it computes none."""
        batcher = self._serving.batcher
        return batcher.sizes() if batcher else {}

    @property
    def is_loaded(self) -> bool:
        """Say whether the model is in memory."""
        return not self._serving.retired

    @property
    def idle_seconds(self) -> float:
        """For how long no request has come; 0 while one is computed."""
        serving = self._serving
        return 0.0 if serving.in_flight else time.perf_counter() - serving.used

    def yields(self) -> bool:
        """Free the model as `unload` does, unless it is just being changed; say whether it is free."""
        if not self._changing.acquire(blocking=False):
            return False
        try:
            self.unload()
        finally:
            self._changing.release()
        return True

    def unload(self) -> None:
        """Free the model after its last request; the next one opens it again.

        Raises:
            UsageError: the host is closed.
            InputError: it was not told how to open the model again.
        """
        with self._changing:
            self.end_shadow()
            with self._lock:
                if self._closed:
                    raise UsageError("the host is closed")
                if self._again is None:
                    raise InputError(f"nobody said how {self.session.contract.name} is loaded again", "let it stay")
            self._retire(self._serving)

    def statistics(self, digest: str | None = None) -> Statistics:
        """Return what was counted of one bundle, by default the serving one."""
        with self._lock:
            digest = self.digest if digest is None else digest
            telemetry = self._known.get(digest)
        return telemetry.statistics() if telemetry else Statistics(digest=digest)

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """What is not as it was with the serving model, its requests and the device."""
        return self.alerts_of(self.digest)

    def alerts_of(self, digest: str) -> tuple[Alert, ...]:
        """Return the same of one bundle."""
        return self.watch.alerts(self.statistics(digest))

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

    def acquire(self) -> Serving:
        """Take what serves now, for `Lease`; a model that was unloaded is opened first.

        Raises:
            UsageError: the host is closed.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise UsageError("the host is closed")
                serving = self._pair.chosen(self._serving) if self._pair else self._serving
                if not serving.retired:
                    serving.in_flight += 1
                    return serving
            self._reload()

    def _reload(self) -> None:
        with self._changing:
            if not self._serving.retired or self._closed:
                return  # another request has been here
            if self._again is None:
                raise UsageError(f"{self.session.contract.name} is not loaded", "load its bundle again")
            session = self._again()
            serving = self._served(session)
            with self._lock:
                self._serving = serving

    def _served(self, session: Session | TextSession) -> Serving:
        """Get a session ready to serve; it is closed where that fails."""
        try:
            return Serving(session, self._telemetry(session.digest), self._batching)
        except BaseException:
            session.close()
            raise

    def release(self, serving: Serving) -> None:
        """Give back what was taken; the last one closes what was replaced."""
        with self._lock:
            serving.in_flight -= 1
            last = serving.retired and serving.in_flight == 0
        if last:
            self._close(serving)

    def _retire(self, serving: Serving) -> None:
        with self._lock:
            serving.retired = True
            idle = serving.in_flight == 0
        if idle:
            self._close(serving)

    def _close(self, serving: Serving) -> None:
        serving.session.close()
        with self._left:
            serving.closed = True
            self._left.notify_all()

    def _part(self, *, back: bool) -> tuple[Pair | None, Serving | None]:
        """Let one of two models serve alone, in one step, and return the other: no request meets it in between."""
        with self._lock:
            pair, self._pair = self._pair, None
            if pair is None:
                return None, None
            if not back and pair.share:
                return pair, pair.old
            leaving, self._serving = self._serving, pair.old
        return pair, leaving

    def _observe(self, session: Session, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        # A client that sends NaN gets NaN: that is no fault of the model, and must not roll it back.
        if not are_finite(outputs.values()) and are_finite(inputs.values()):
            telemetry = self._known.get(session.digest)
            if telemetry:
                telemetry.saw_non_finite()
        self.watch.observe(session, inputs, outputs)
        pair = self._pair
        if pair is not None:
            old, new = pair.old.session, self._serving.session
            pair.comparison.compare((session, outputs), old if session is new else new, inputs)
