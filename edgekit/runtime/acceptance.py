"""Tries a bundle out on this device: its golden inputs must give its golden outputs, within the variant's limits.

`try_out` does so in a child process that is shut in (`edgekit.runtime.sandbox`), because a native engine that crashes
takes its process with it, and a hostile file whatever that process may reach.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import site
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit.errors import (
    BundleError,
    EdgekitError,
    HealthError,
    MissingExtra,
    ResourceError,
    Unrunnable,
    UsageError,
    out_of_memory,
)
from edgekit.runtime import arrays, memory
from edgekit.runtime.backends import Sampling
from edgekit.runtime.opening import load, read_manifest
from edgekit.runtime.session import Session, TextSession
from edgekit.runtime.telemetry import percentile

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from edgekit.manifest import Expected, Golden, Parity, Variant
    from edgekit.runtime.sandbox.warden import Ended
    from edgekit.tensors import Array

log = logging.getLogger(__name__)

MIN_RUNS = 20
GOLDEN_TOKENS = 8
FREE_SHARE, LEAST_MIB = 0.9, 256.0
"""Without a signed limit a try-out may take that share of the free memory, and in any case so many MiB."""
RESERVED, RESERVED_MIB = 2, 256
EXACT_DB = 200.0
"""Reported where the outputs agree to the last bit: JSON has no infinity."""


def check(folder: Path, variant: str | None = None, threads: int = 0) -> dict[str, float]:
    """Load a sealed bundle's variant and compare it with its golden samples.

    Returns:
        ``load_ms``, ``p95_ms`` of single samples, ``rss_mib`` of this process and the most that it ever was,
        ``peak_rss_mib``, and ``sqnr_db`` and ``top1_agreement`` against the golden outputs (only the last of these for
        a language model).

    Raises:
        Unrunnable: no engine is installed that takes the file.
        HealthError: a limit does not hold, or the engine fails; says the figures.
        BundleError: a golden file does not hold what the manifest says.
    """
    started = time.perf_counter()
    with _opened(folder, variant, threads) as session:
        measured = {"load_ms": 1000 * (time.perf_counter() - started)}
        golden = read_manifest(folder).golden
        if isinstance(session, Session):
            measured |= _check_tensors(session, *golden_arrays(folder, golden, session.variant))
        else:
            measured |= _check_prompts(session, golden)
        measured |= {"rss_mib": memory.rss_mib(), "peak_rss_mib": memory.peak_mib()}
        _hold_limits(measured, session.variant.expected or session.variant.parity)
    return {name: round(value, 3) for name, value in measured.items()}


def _opened(folder: Path, variant: str | None, threads: int) -> Session | TextSession:
    try:
        return load(folder, variant=variant, threads=threads)
    except HealthError as error:
        raise Unrunnable(error.message, error.hint) from error
    except MissingExtra as error:  # its hint is the way out, and only the message travels to the fleet
        raise Unrunnable(f"{error.message}: {error.hint}") from error


@dataclass(frozen=True)
class Allowance:
    """What a try-out may take: ``seconds``, and MiB of memory (0: most of what is free).

    ``is_shut_in``: it reaches no file, no network and no process that it does not need. ``place``: a folder of its own
    to write below, on a disk: temporary files lie in memory on many devices.
    """

    seconds: float = 120.0
    memory_mib: float = 0.0
    is_shut_in: bool = True
    place: Path | None = None


class NoRoom(ResourceError):
    """What was tried out found too little free memory: no fault of its release, which signs no limit that low."""


def try_out(
    folder: Path, variant: str | None = None, threads: int = 0, allowed: Allowance | None = None
) -> dict[str, float]:
    """Run `check` in a child process, so that an engine that crashes, hangs or does harm takes only the child with it.

    Raises:
        Unrunnable: no engine is installed that takes the file, or the processor lacks an instruction.
        HealthError: a limit does not hold, the child crashed, or took more time, memory or disk than is allowed.
        NoRoom: it took more memory than was free.
        BundleError, UsageError, ResourceError: as `check` raises them.
    """
    from edgekit.runtime.sandbox import SCRATCH_MIB, warden

    allowed = allowed or Allowance()
    available = memory.available_mib()
    signed, free = allowed.memory_mib or math.inf, max(LEAST_MIB, FREE_SHARE * available)
    most = 0.0 if math.isinf(min(signed, free)) else min(signed, free)
    # -P: the folder one stands in must not shadow a package of the child.
    command = [sys.executable, "-P", "-m", __name__, str(folder.resolve()), "--threads", str(threads)]
    command += ["--variant", variant] if variant else []
    with warden.scratch(allowed.place) as scratch:
        if allowed.is_shut_in:
            command += ["--scratch", str(scratch), "--seconds", str(allowed.seconds), "--memory", str(most)]
        room = warden.Scratch(scratch, SCRATCH_MIB)
        environment = _environment(str(scratch))
        ended = warden.run(command, environment, seconds=allowed.seconds, memory_mib=most, scratch=room)
    peak = {"peak_rss_mib": round(ended.peak_mib, 3)} if ended.peak_mib else {}
    # Below the least that it may have in any case the system may run out, and ends it before all others.
    ran_out = ended.code == -signal.SIGKILL and not ended.why and ended.peak_mib > FREE_SHARE * available
    lack = NoRoom(f"{folder.name} needs more than the {most:.0f} MiB of memory that are free", "free some")
    if free < signed and (ended.why == "memory" or ran_out):
        raise lack
    if ended.why == "full":
        raise ResourceError(f"the disk ran full while {folder.name} was tried out", "free some, and it is tried again")
    if ended.why:
        told = {
            "time": f"did not finish its golden samples in {allowed.seconds:g} s",
            "memory": f"took more memory than the {most:.0f} MiB that it may have",
            "disk": f"wrote more than the {SCRATCH_MIB} MiB that it may",
        }
        raise HealthError(f"{folder.name} {told[ended.why]}", measured=peak)
    if ended.code < 0:
        raise _crash(folder.name, signal.Signals(-ended.code), peak)
    try:
        return _verdict(ended, peak)
    except HealthError as error:
        if free < signed and out_of_memory(
            error
        ):  # what brakes it is wider than what it may have, and comes first at times
            raise lack from error
        raise


def _environment(scratch: str) -> dict[str, str]:
    """Let engines write at home (OpenVINO's telemetry does) into the scratch; packages stay where they are."""
    own = {"TMPDIR": scratch, "HOME": scratch, "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own, "PYTHONUSERBASE": site.getuserbase()}


def _crash(name: str, how: signal.Signals, peak: Mapping[str, float]) -> HealthError:
    if how is signal.SIGILL:
        return Unrunnable(f"the processor lacks an instruction that the engine needs for {name}", measured=peak)
    return HealthError(f"the engine crashed on {name} with {how.name}", "the old model keeps serving", peak)


MOST_TOLD = 4000
Told = Annotated[str, msgspec.Meta(max_length=MOST_TOLD)]
Figure = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]{1,40}\Z")]


class _Verdict(msgspec.Struct):
    """What the child says on its last line: figures, or an error. It may be the file that speaks."""

    measured: Annotated[dict[Figure, float], msgspec.Meta(max_length=16)] = {}
    kind: Told = ""
    message: Told = ""
    hint: Told = ""
    lacks: Annotated[tuple[Told, ...], msgspec.Meta(max_length=2)] = ()


_KINDS = {kind.__name__: kind for kind in (BundleError, UsageError, ResourceError)}
_HEALTH_KINDS = {kind.__name__: kind for kind in (HealthError, Unrunnable)}


def _verdict(ended: Ended, peak: Mapping[str, float]) -> dict[str, float]:
    try:
        verdict = msgspec.json.decode(ended.stdout.strip().rpartition(b"\n")[2], type=_Verdict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        told = f"the try-out ended with exit code {ended.code}: {last or 'no message'}"
        raise HealthError(told, measured=peak) from error
    for lack in verdict.lacks:
        _warn_once(lack)
    measured = {**verdict.measured, "peak_rss_mib": max([*peak.values(), verdict.measured.get("peak_rss_mib", 0.0)])}
    if verdict.kind in _KINDS:
        raise _KINDS[verdict.kind](verdict.message, verdict.hint)
    if verdict.kind:
        raise _HEALTH_KINDS.get(verdict.kind, HealthError)(verdict.message, verdict.hint, measured)
    return measured


@functools.cache
def _warn_once(lack: str) -> None:
    log.warning("%s", lack)


def golden_arrays(folder: Path, golden: Golden, variant: Variant) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read the golden inputs, and what the variant answered to them at export, else what the model did.

    Raises:
        BundleError: a file holds no array.
    """
    outputs = variant.expected.outputs if variant.expected else golden.outputs
    inputs = {name: arrays.read(folder / path) for name, path in golden.inputs.items()}
    return inputs, {name: arrays.read(folder / path) for name, path in outputs.items()}


def _check_tensors(session: Session, inputs: dict[str, Array], wanted: dict[str, Array]) -> dict[str, float]:
    import numpy as np

    if not inputs or not wanted:
        return {}
    count = len(next(iter(inputs.values())))
    times: list[float] = []
    parts: list[dict[str, Array]] = []
    for run in range(max(count, MIN_RUNS)):
        sample = {name: array[run % count : run % count + 1] for name, array in inputs.items()}
        started = time.perf_counter()
        outputs = session.run(sample)
        times.append(time.perf_counter() - started)
        if run < count:
            parts.append(outputs)
    got = {name: np.concatenate([part[name] for part in parts]) for name in wanted}
    return {"p95_ms": 1000 * percentile(sorted(times), 95), **compare(got, wanted)}


def compare(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, float]:
    """Return ``sqnr_db`` of the worst output, and ``top1_agreement`` of the first output with two or more axes.

    Raises:
        HealthError: NaN or infinity, or another shape.
    """
    import numpy as np

    worst = EXACT_DB
    agreement: dict[str, float] = {}
    for name, want in wanted.items():
        have = got[name]
        if have.shape != want.shape:
            raise HealthError(f"output {name!r} has shape {list(have.shape)}, its golden sample {list(want.shape)}")
        if not np.isfinite(have).all():
            raise HealthError(f"output {name!r} holds NaN or infinity on a golden sample")
        worst = min(worst, sqnr_db(want, have))
        if want.ndim >= 2 and not agreement:
            flat = want.reshape(len(want), -1).argmax(1), have.reshape(len(want), -1).argmax(1)
            agreement = {"top1_agreement": float((flat[0] == flat[1]).mean())}
    return {"sqnr_db": worst, **agreement}


def sqnr_db(reference: Array, value: Array) -> float:
    """Return the signal-to-quantization-noise ratio, 10 log10(sum ref^2 / sum (ref - value)^2), at most 200 dB."""
    import numpy as np

    reference = reference.astype(np.float64)
    noise = float(np.square(reference - value).sum())
    signal_power = float(np.square(reference).sum())
    if noise == 0.0:
        return EXACT_DB
    return min(EXACT_DB, 10 * math.log10(signal_power / noise)) if signal_power else -EXACT_DB


def _check_prompts(session: TextSession, golden: Golden) -> dict[str, float]:
    if not golden.prompts:
        return {}
    greedy = Sampling(max_tokens=GOLDEN_TOKENS, temperature=0.0)
    same = 0
    times = []
    for prompt, expected in golden.prompts:
        started = time.perf_counter()
        text = "".join(piece.text for piece in session.complete(prompt, greedy))
        times.append(time.perf_counter() - started)
        same += bool(text) and (expected.startswith(text) or text.startswith(expected))
    return {"p95_ms": 1000 * percentile(sorted(times), 95), "top1_agreement": same / len(golden.prompts)}


def _hold_limits(measured: Mapping[str, float], wanted: Expected | Parity) -> None:
    limits = {"sqnr_db": wanted.min_sqnr_db, "top1_agreement": wanted.min_top1_agreement}
    for name, limit in limits.items():
        if limit is not None and name in measured and measured[name] < limit:
            figures = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            raise HealthError(
                f"{name} is {measured[name]:.4g} on this device, at least {limit:g} is wanted ({figures})",
                measured=measured,
            )


def main(arguments: Sequence[str]) -> int:
    """Be the child of `try_out`: print one line of JSON, return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="Try a bundle out.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="Be shut in, and write nowhere else.")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--memory", type=float, default=0.0)
    options = parser.parse_args(arguments)
    code, lacks = 0, tuple[str, ...]()
    try:
        if options.scratch is not None:
            lacks = _shut_in(options)
        verdict = _Verdict(measured=check(options.bundle, options.variant, options.threads), lacks=lacks)
    except EdgekitError as error:
        measured = error.measured if isinstance(error, HealthError) else {}
        verdict = _Verdict(
            measured=measured,
            kind=type(error).__name__,
            message=error.message[:MOST_TOLD],
            hint=error.hint[:MOST_TOLD],
            lacks=lacks,
        )
        code = error.exit_code
    sys.stdout.write("\n" + msgspec.json.encode(verdict).decode() + "\n")
    return code


def _shut_in(options: argparse.Namespace) -> tuple[str, ...]:
    from edgekit.runtime import sandbox

    # What engines reserve and do not touch counts as well, so that this only brakes: the parent looks at what is held.
    memory_mib = RESERVED * options.memory + RESERVED_MIB if options.memory else 0.0
    bounds = sandbox.Bounds(memory_mib, options.seconds, (options.bundle,), options.scratch)
    return sandbox.enter(bounds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
