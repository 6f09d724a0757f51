"""How fast and how large bundles run here, side by side. Each runs in a process of its own, so that its memory is
its own; they take turns in short rounds, so that a noisy machine is noisy for all. Prints nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, cast

import msgspec

from edgekit.errors import HealthError, UsageError
from edgekit.progress import silent
from edgekit.runtime import failures, measured
from edgekit.runtime.measured import Contender, Settings
from edgekit.runtime.telemetry import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgekit.progress import Progress

__all__ = ["Contender", "Measurement", "Settings", "measure"]

TURN_SECONDS = 0.2
LEAVE_SECONDS = 5.0
RELIABLE_P99 = 662
"""Requests that a 99th percentile needs (MLPerf inference rules, early stopping at 99 % confidence)."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one contender. Latencies in ms per request; for a language model, per token.

    ``ratio`` is its median over the first contender's. Percentiles are nearest-rank. ``load_ms`` is from an
    empty process with edgekit imported to a warm session; ``rss_mib`` after the run, ``peak_rss_mib`` at most.
    """

    name: str
    bundle: str
    digest: str
    variant: str
    precision: str
    engine: str
    bytes: int
    load_ms: float
    rss_mib: float
    peak_rss_mib: float
    requests: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    per_second: float
    ratio: float
    first_token_ms: float | None = None

    @property
    def has_reliable_p99(self) -> bool:
        """Say whether enough requests were made for the 99th percentile to mean something."""
        return self.requests >= RELIABLE_P99


def measure(
    contenders: Sequence[Contender], settings: Settings | None = None, progress: Progress = silent
) -> list[Measurement]:
    """Load every contender in a process of its own, warm up, and measure them in turns.

    Raises:
        UsageError: nothing to measure, or a setting out of range.
        HealthError: a process died.
        EdgekitError: whatever loading or running a contender raised, with its name in front.
    """
    settings = settings or Settings()
    _check(contenders, settings)
    with contextlib.ExitStack() as stack:
        children = []
        for position, contender in enumerate(contenders):
            progress("loading", position, len(contenders))
            children.append(stack.enter_context(_child(contender, settings)))
        progress("loading", len(contenders), len(contenders))
        for child in children:
            child.turn(measured.Turn(seconds=settings.warmup_seconds))
            child.forget()
        _take_turns(children, settings, progress)
    first = percentile(sorted(children[0].samples), 50)
    return [child.measurement(first) for child in children]


def _check(contenders: Sequence[Contender], settings: Settings) -> None:
    if not contenders:
        raise UsageError("there is nothing to measure", "name a bundle")
    if settings.seconds <= 0 or settings.requests < 0 or settings.threads < 0 or settings.batch < 1:
        raise UsageError(f"a setting is out of range: {settings}", "times and counts are positive")
    if settings.cpu is not None and hasattr(os, "sched_getaffinity") and settings.cpu not in os.sched_getaffinity(0):
        raise UsageError(f"there is no CPU {settings.cpu} here", f"choose of {sorted(os.sched_getaffinity(0))}")


def _take_turns(children: Sequence[_Child], settings: Settings, progress: Progress) -> None:
    # The order turns around every round, so that no contender always follows the same one.
    total = settings.requests or round(settings.seconds * 1000)
    order = list(children)
    while True:
        done = min(child.requests if settings.requests else round(child.busy * 1000) for child in children)
        progress("measuring", min(done, total), total)
        if done >= total:
            return
        for child in order:
            left = settings.requests - child.requests if settings.requests else 0
            if not settings.requests or left > 0:
                child.turn(measured.Turn(seconds=TURN_SECONDS, requests=left))
        order.reverse()


@dataclass
class _Child:
    """The parent's end of one measuring process."""

    contender: Contender
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    ready: measured.Ready | None = None

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.samples: list[float] = []
        self.first_tokens: list[float] = []
        self.busy = 0.0
        self.last: measured.Samples | None = None

    @property
    def requests(self) -> int:
        return len(self.samples)

    def ask(self, message: measured.Start | measured.Turn) -> measured.Answer:
        assert self.process.stdin is not None  # noqa: S101  # opened with PIPE
        assert self.process.stdout is not None  # noqa: S101  # the same
        with contextlib.suppress(BrokenPipeError):  # a dead child is told by the missing answer
            self.process.stdin.write(msgspec.json.encode(message) + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise HealthError(
                f"{self.contender.bundle}: {_last_words(self.process, self.log)}", "run it alone with: edgekit run"
            )
        answer: measured.Answer = msgspec.json.decode(line, type=measured.Answer)
        if isinstance(answer, failures.Failed):
            raise failures.rebuilt(answer, self.contender.bundle)
        return answer

    def turn(self, turn: measured.Turn) -> None:
        answer = cast("measured.Samples", self.ask(turn))
        self.samples += answer.samples_ms
        self.first_tokens += answer.first_token_ms
        self.busy += (sum(answer.samples_ms) + sum(answer.first_token_ms)) / 1000
        self.last = answer

    def measurement(self, first_median: float) -> Measurement:
        assert self.ready is not None  # noqa: S101  # set when the child started
        assert self.last is not None  # noqa: S101  # every child had a turn
        ordered = sorted(self.samples)
        median = percentile(ordered, 50)
        return Measurement(
            **msgspec.structs.asdict(self.ready),
            bundle=self.contender.bundle,
            rss_mib=self.last.rss_mib,
            peak_rss_mib=self.last.peak_rss_mib,
            requests=self.requests,
            p50_ms=median,
            p90_ms=percentile(ordered, 90),
            p99_ms=percentile(ordered, 99),
            per_second=1000 * len(self.samples) / sum(self.samples),
            ratio=median / first_median,
            first_token_ms=percentile(sorted(self.first_tokens), 50) if self.first_tokens else None,
        )


@contextlib.contextmanager
def _child(contender: Contender, settings: Settings) -> Iterator[_Child]:
    # -P: the folder one stands in must not shadow a package of the child.
    arguments = [sys.executable, "-P", "-m", measured.__name__]
    # Engines talk much on standard error: a file cannot fill up and stop them, a pipe would.
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the pipes below
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    try:
        child = _Child(contender, process, log)
        child.ready = cast("measured.Ready", child.ask(measured.Start(contender=contender, settings=settings)))
        yield child
    finally:
        for stream in (process.stdin, process.stdout, log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            process.wait(timeout=LEAVE_SECONDS)  # its standard input ended, so it leaves by itself
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    code = process.wait(timeout=30)
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"its process ended with {how}{': ' + said[-1][:300] if said else ''}"
