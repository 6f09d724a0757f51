"""One process that runs one bundle and says how long each request took: the other end of `measure`.

``python -m edgekit.runtime.measured`` speaks JSON lines: a `Start`, then a `Turn` a line; each is answered by a line.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

import msgspec

from edgekit import bundle
from edgekit.errors import EdgekitError, HealthError
from edgekit.runtime import failures
from edgekit.runtime.failures import Failed
from edgekit.runtime.memory import rss_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgekit.manifest import Manifest
    from edgekit.runtime.session import Session, TextSession
    from edgekit.tensors import Array

    Request: TypeAlias = Callable[[], tuple[list[float], list[float]]]

TOKENS_PER_REQUEST = 32
PROMPT = "Once upon a time"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How long to measure each bundle: by ``seconds``, or by ``requests`` where given. ``cpu`` pins to one core."""

    threads: int = 1
    seconds: float = 5.0
    requests: int = 0
    warmup_seconds: float = 0.5
    batch: int = 1
    cpu: int | None = None


class Contender(msgspec.Struct, frozen=True):
    """A bundle, and which of its variants; ``None`` lets the runtime choose."""

    bundle: str
    variant: str | None = None


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The bundle is loaded and warm."""

    name: str
    digest: str
    variant: str
    precision: str
    engine: str
    bytes: int
    load_ms: float


class Samples(msgspec.Struct, frozen=True, kw_only=True, tag="samples"):
    """What one turn measured, in ms; the memory is the process's after the turn."""

    samples_ms: list[float]
    first_token_ms: list[float]
    rss_mib: float
    peak_rss_mib: float


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """Run for so long, or until so many samples where ``requests`` is given."""

    seconds: float
    requests: int = 0


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Load this, with these settings."""

    contender: Contender
    settings: Settings


Answer = Ready | Samples | Failed


def main() -> None:
    """Be the child: load what the first line names, then answer every further line with samples."""
    # Engines print to standard output; only answers may go to the parent, the rest goes to standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            _serve(sys.stdin, answers)
        except EdgekitError as error:
            _answer(answers, failures.told(error))
        except MemoryError:
            _answer(answers, Failed(kind="ResourceError", message="out of memory", hint="measure a smaller batch"))


def _serve(requests: TextIO, answers: TextIO) -> None:
    start = msgspec.json.decode(requests.readline(), type=Start)
    if start.settings.cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {start.settings.cpu})
    session, ready = _load(start)
    request = _request(session, start)
    _answer(answers, ready)
    for line in requests:
        _answer(answers, _run(request, msgspec.json.decode(line, type=Turn)))


def _answer(answers: TextIO, answer: Answer) -> None:
    answers.write(msgspec.json.encode(answer).decode() + "\n")
    answers.flush()


def _load(start: Start) -> tuple[Session | TextSession, Ready]:
    from edgekit.runtime import load

    folder = Path(start.contender.bundle)
    began = time.perf_counter()
    session = load(folder, variant=start.contender.variant, threads=start.settings.threads)
    took = time.perf_counter() - began
    variant = session.variant
    return session, Ready(
        name=f"{folder.resolve().name}:{variant.name}",
        digest=session.digest,
        variant=variant.name,
        precision=variant.precision,
        engine=session.engine,
        bytes=sum((folder / path).stat().st_size for path in variant.files),
        load_ms=1000 * took,
    )


def _request(session: Session | TextSession, start: Start) -> Request:
    """Return a function that makes one request and gives its latencies, and its times to the first token, in ms."""
    from edgekit.runtime.session import TextSession

    folder = Path(start.contender.bundle)
    manifest = bundle.read(folder, session.variant.name).manifest
    if isinstance(session, TextSession):
        prompts = manifest.golden.prompts
        return _text_request(session, prompts[0][0] if prompts else PROMPT)
    return _tensor_request(session, _batches(folder, manifest, start.settings.batch))


def _tensor_request(session: Session, batches: Sequence[dict[str, Array]]) -> Request:
    turn = 0

    def request() -> tuple[list[float], list[float]]:
        nonlocal turn
        inputs = batches[turn % len(batches)]
        turn += 1
        began = time.perf_counter()
        session.run(inputs)
        return [1000 * (time.perf_counter() - began)], []

    return request


def _text_request(session: TextSession, prompt: str) -> Request:
    from edgekit.runtime.backends import Sampling

    sampling = Sampling(max_tokens=TOKENS_PER_REQUEST, temperature=0.0)

    def request() -> tuple[list[float], list[float]]:
        times = [time.perf_counter()]
        times += [time.perf_counter() for piece in session.complete(prompt, sampling) if piece.text]
        gaps = [1000 * (later - earlier) for earlier, later in itertools.pairwise(times)]
        if len(gaps) < 2:
            raise HealthError(f"the model gave {len(gaps)} tokens for {prompt!r}, too few to measure")
        return gaps[1:], gaps[:1]

    return request


def _batches(folder: Path, manifest: Manifest, size: int) -> list[dict[str, Array]]:
    """Take the bundle's golden inputs, in batches of ``size``; zeros where it has none."""
    import numpy as np

    from edgekit.runtime import arrays, ports

    golden = manifest.golden.inputs
    if any(spec.name not in golden for spec in manifest.inputs):
        return [ports.zeros(manifest.inputs, batch=size)]
    given = {name: arrays.read(folder / path) for name, path in golden.items()}
    count = min(len(array) for array in given.values())
    picks = [np.arange(start, start + size) % count for start in range(0, count, size)]
    return [{name: np.ascontiguousarray(array[pick]) for name, array in given.items()} for pick in picks]


def _run(request: Request, turn: Turn) -> Samples:
    samples: list[float] = []
    first_tokens: list[float] = []
    deadline = time.perf_counter() + turn.seconds
    while not samples or time.perf_counter() < deadline:
        gaps, firsts = request()
        samples += gaps
        first_tokens += firsts
        if turn.requests and len(samples) >= turn.requests:
            break
    rss, peak = memory_mib()
    return Samples(samples_ms=samples, first_token_ms=first_tokens, rss_mib=rss, peak_rss_mib=peak)


def memory_mib() -> tuple[float, float]:
    """Return this process's resident memory now and at most, in MiB.

    Not from ``getrusage`` where there is ``/proc``: after a fork its maximum still counts the parent's pages.
    """
    now = rss_mib()
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return now, now
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return now, max(now, int(fields["VmHWM"].split()[0]) / 1024)


if __name__ == "__main__":
    main()
