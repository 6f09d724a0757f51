"""Runs one variant on another instruction set: the same Python, the same engine, under QEMU's user mode.

The same int8 file may answer otherwise where the processor lacks 8-bit dot products: this is how that is seen on a
machine that has them. x86 on x86 alone; engines of other architectures do not run this way.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import EdgekitError, HealthError, UnknownName
from edgekit.manifest import Elsewhere, Variant
from edgekit.plugins import extra
from edgekit.runtime.acceptance import compare
from edgekit.runtime.backends import EngineOptions
from edgekit.runtime.opening import open_variant
from edgekit.runtime.session import Contract, Session
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.tensors import Array

EMULATORS = ("qemu-x86_64-static", "qemu-x86_64")
INSTALL = "apt-get install qemu-user-static"
TIMEOUT = 600.0


@dataclass(frozen=True)
class Isa:
    """A processor that stands for an instruction set: its name in QEMU, and what it has."""

    name: str
    model: str
    has: str


ISAS = {
    isa.name: isa
    for isa in (
        Isa("nehalem", "Nehalem", "SSE4.2, no AVX"),
        Isa("sandybridge", "SandyBridge", "AVX, no AVX2"),
        Isa("haswell", "Haswell", "AVX2 and FMA, no 8-bit dot product"),
    )
}


def isa_named(name: str) -> Isa:
    """Return an instruction set by its name, in any case.

    Raises:
        UnknownName: none has that name.
    """
    if name.lower() not in ISAS:
        raise UnknownName("instruction set", name, list(ISAS))
    return ISAS[name.lower()]


def lacking() -> str:
    """Say why nothing can be emulated on this machine, empty where it can."""
    if platform.machine() != "x86_64":
        return f"emulation runs x86 on x86, this machine is {platform.machine()}"
    return "" if _emulator() else f"QEMU's user mode is not installed: {INSTALL}"


def answers(
    folder: Path, variant: Variant, contract: Contract, *, inputs: Mapping[str, Array], isa: Isa | None = None
) -> dict[str, Array]:
    """Run a variant, whose files lie under ``folder``, sample by sample in a process of its own; ``None``: natively.

    Raises:
        HealthError: nothing can be emulated here, the engine refuses the file, or the process crashed or hung.
    """
    import numpy as np

    if isa is not None and lacking():
        raise HealthError(lacking(), "check on a machine where it is, or on the device itself")
    with tempfile.TemporaryDirectory() as scratch:
        job, given, found = (Path(scratch, name) for name in ("job.json", "inputs.npz", "outputs.npz"))
        job.write_bytes(msgspec.json.encode(_Job(str(folder.resolve()), variant, contract.inputs, contract.outputs)))
        np.savez(given, **dict(inputs))  # type: ignore[arg-type]  # NumPy's own annotation of the names
        prefix = [_emulator(), "-cpu", isa.model] if isa else []
        # the interpreter itself: a link in a virtual environment is no program to QEMU
        python = str(Path(sys.executable).resolve())
        command = [*prefix, python, "-m", __name__, str(job), str(given), str(found)]
        where = isa.name if isa else "this machine"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        try:
            child = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False, env=environment)
        except subprocess.TimeoutExpired as error:
            raise HealthError(f"{variant.main} did not finish on {where} in {TIMEOUT:g} s") from error
        if child.returncode or not found.is_file():
            told = child.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
            raise HealthError(f"{variant.main} does not run on {where}: {told or f'exit code {child.returncode}'}")
        with np.load(found, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def figures_of(isa: str, found: Mapping[str, Array], native: Mapping[str, Array]) -> Elsewhere:
    """Measure the answers of another processor against this one's, the worst output first.

    Raises:
        HealthError: NaN, infinity or another shape.
    """
    import numpy as np

    measured = compare(found, native)
    return Elsewhere(
        isa=isa,
        status="checked",
        samples=len(next(iter(native.values()))),
        sqnr_db=round(measured["sqnr_db"], 2),
        top1_agreement=measured.get("top1_agreement"),
        max_abs_error=float(f"{max(float(np.abs(found[name] - native[name]).max()) for name in native):.4g}"),
    )


def holds(figures: Elsewhere, variant: Variant) -> bool:
    """Say whether another processor's answers are as near as the variant grants a device."""
    limit = variant.expected
    if limit is None or figures.sqnr_db is None:
        return True
    same = 1.0 if figures.top1_agreement is None else figures.top1_agreement
    return figures.sqnr_db >= limit.min_sqnr_db and same >= limit.min_top1_agreement


class _Job(msgspec.Struct):
    """What the child is to run; its inputs and outputs lie beside."""

    folder: str
    variant: Variant
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def _emulator() -> str:
    return next((path for path in map(shutil.which, EMULATORS) if path), "")


def main(arguments: Sequence[str]) -> int:
    """Be the child of `answers`."""
    with extra("device"):
        import numpy as np
    job_path, given, found = map(Path, arguments)
    job = msgspec.json.decode(job_path.read_bytes(), type=_Job)
    contract = Contract(inputs=job.inputs, outputs=job.outputs)
    try:
        session = open_variant(Path(job.folder), job.variant, contract, EngineOptions(threads=1))
    except EdgekitError as error:
        sys.stderr.write(f"\n{error.message}\n")
        return error.exit_code
    if not isinstance(session, Session):
        sys.stderr.write("\nit gives text, and only tensors are compared\n")
        return 1
    with session, np.load(given, allow_pickle=False) as inputs:
        arrays = {name: inputs[name] for name in inputs.files}
        count = len(next(iter(arrays.values())))
        parts = [session.run({name: array[i : i + 1] for name, array in arrays.items()}) for i in range(count)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez(found, **joined)  # type: ignore[arg-type]  # as above
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
