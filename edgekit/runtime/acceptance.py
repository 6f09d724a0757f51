"""Tries a bundle out on this device: its golden inputs must give its golden outputs, within the variant's limits.

`try_out` does so in a child process, because a native engine that crashes takes its process with it.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import BundleError, EdgekitError, HealthError, MissingExtra, ResourceError, UsageError, from_os
from edgekit.plugins import extra
from edgekit.runtime.backends import Sampling
from edgekit.runtime.memory import rss_mib
from edgekit.runtime.opening import load, read_manifest
from edgekit.runtime.session import Session, TextSession
from edgekit.runtime.telemetry import percentile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.manifest import Expected, Golden, Parity, Variant
    from edgekit.tensors import Array

MIN_RUNS = 20
GOLDEN_TOKENS = 8
EXACT_DB = 200.0
"""Reported where the outputs agree to the last bit: JSON has no infinity."""


def check(folder: Path, variant: str | None = None, threads: int = 0) -> dict[str, float]:
    """Load a sealed bundle's variant and compare it with its golden samples.

    Returns:
        ``load_ms``, ``p95_ms`` of single samples, ``rss_mib`` of this process, and ``sqnr_db`` and
        ``top1_agreement`` against the golden outputs (only the last of these for a language model).

    Raises:
        HealthError: a limit does not hold, or the engine fails; says the figures.
        BundleError: a golden file does not hold what the manifest says.
    """
    started = time.perf_counter()
    with load(folder, variant=variant, threads=threads) as session:
        measured = {"load_ms": 1000 * (time.perf_counter() - started)}
        golden = read_manifest(folder).golden
        if isinstance(session, Session):
            measured |= _check_tensors(session, *golden_arrays(folder, golden, session.variant))
        else:
            measured |= _check_prompts(session, golden)
        measured["rss_mib"] = rss_mib()
        _hold_limits(measured, session.variant.expected or session.variant.parity)
    return {name: round(value, 3) for name, value in measured.items()}


def try_out(folder: Path, variant: str | None = None, threads: int = 0, timeout: float = 120.0) -> dict[str, float]:
    """Run `check` in a child process, so that an engine that crashes or hangs takes only the child with it.

    Raises:
        HealthError: a limit does not hold, the child crashed, or ran longer than ``timeout`` seconds.
        BundleError, UsageError, ResourceError: as `check` raises them.
    """
    # -P: the folder one stands in must not shadow a package of the child.
    command = [sys.executable, "-P", "-m", __name__, str(folder), "--threads", str(threads)]
    command += ["--variant", variant] if variant else []
    try:
        child = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise HealthError(f"{folder.name} did not finish its golden samples in {timeout:g} s") from error
    except OSError as error:
        raise from_os(error, "starting the try-out") from error
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise HealthError(f"the engine crashed on {folder.name} with {name}", "the old model keeps serving")
    return _verdict(child.stdout, child.stderr, child.returncode)


class _Verdict(msgspec.Struct):
    """What the child says on its last line: figures, or an error."""

    measured: dict[str, float] = {}
    kind: str = ""
    message: str = ""
    hint: str = ""


_KINDS = {kind.__name__: kind for kind in (HealthError, BundleError, UsageError, ResourceError)}


def _verdict(stdout: bytes, stderr: bytes, code: int) -> dict[str, float]:
    try:
        verdict = msgspec.json.decode(stdout.strip().rpartition(b"\n")[2], type=_Verdict)
    except msgspec.DecodeError as error:
        last = stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise HealthError(f"the try-out ended with exit code {code}: {last or 'no message'}") from error
    if verdict.kind == MissingExtra.__name__:  # its hint is the way out, and only the message travels to the fleet
        raise HealthError(f"{verdict.message}: {verdict.hint}")
    if verdict.kind:
        raise _KINDS.get(verdict.kind, HealthError)(verdict.message, verdict.hint)
    return verdict.measured


def golden_arrays(folder: Path, golden: Golden, variant: Variant) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read the golden inputs, and what the variant answered to them at export, else what the model did.

    Raises:
        BundleError: a file holds no array.
    """
    outputs = variant.expected.outputs if variant.expected else golden.outputs
    inputs = {name: _read_npy(folder / path) for name, path in golden.inputs.items()}
    return inputs, {name: _read_npy(folder / path) for name, path in outputs.items()}


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
                f"{name} is {measured[name]:.4g} on this device, at least {limit:g} is wanted ({figures})"
            )


def _read_npy(path: Path) -> Array:
    with extra("device"):
        import numpy as np
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BundleError(f"{path.name} is no .npy file: {error}", "export the bundle again") from error
    return array


def main(arguments: Sequence[str]) -> int:
    """Be the child of `try_out`: print one line of JSON, return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="Try a bundle out.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    code = 0
    try:
        verdict = _Verdict(measured=check(options.bundle, options.variant, options.threads))
    except EdgekitError as error:
        verdict = _Verdict(kind=type(error).__name__, message=error.message, hint=error.hint)
        code = error.exit_code
    sys.stdout.write("\n" + msgspec.json.encode(verdict).decode() + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
