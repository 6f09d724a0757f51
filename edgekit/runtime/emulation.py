"""Runs one variant on another instruction set, under QEMU.

The same int8 file may answer otherwise where the processor lacks 8-bit dot products: this is how that is seen on a
machine that has them. x86 on x86 is the same Python and the same engine in QEMU's user mode; ARM is a whole small
system (`edgekit.runtime.arm64`) with the same engines built for it.
"""

from __future__ import annotations

import io
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
from edgekit.runtime import arm64
from edgekit.runtime.acceptance import compare
from edgekit.runtime.backends import EngineOptions
from edgekit.runtime.opening import open_variant
from edgekit.runtime.session import Contract, Session
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.tensors import Array

EMULATORS = ("qemu-x86_64-static", "qemu-x86_64")
INSTALL = "apt-get install qemu-user-static"
FORMATS = ("onnx", "tflite")
"""What has an engine in the arm64 system."""
TIMEOUT = 600.0
JOB, GIVEN, FOUND = "job.json", "inputs.npz", "outputs.npz"
GUEST_FOLDER = "bundle"
"""Where the variant's files lie in the arm64 system."""


@dataclass(frozen=True)
class Isa:
    """A processor that stands for an instruction set: its name in QEMU, and what it has."""

    name: str
    model: str
    has: str
    arch: str = "x86_64"


ISAS = {
    isa.name: isa
    for isa in (
        Isa("nehalem", "Nehalem", "SSE4.2, no AVX"),
        Isa("sandybridge", "SandyBridge", "AVX, no AVX2"),
        Isa("haswell", "Haswell", "AVX2 and FMA, no 8-bit dot product"),
        Isa("cortex-a72", "cortex-a72", "NEON, no 8-bit dot product", "aarch64"),
        Isa("cortex-a76", "cortex-a76", "NEON, 8-bit dot product, fp16", "aarch64"),
        Isa("armv9", "max,pauth-impdef=on", "8-bit matrix product, bf16, SVE", "aarch64"),
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


def lacking(isa: Isa) -> str:
    """Say why an instruction set cannot be emulated on this machine, empty where it can."""
    if isa.arch == "aarch64":
        return arm64.lacking()
    if platform.machine() != "x86_64":
        return f"{isa.name} is emulated on x86, this machine is {platform.machine()}"
    return "" if _emulator() else f"QEMU's user mode is not installed: {INSTALL}"


def answers(
    folder: Path, variant: Variant, contract: Contract, *, inputs: Mapping[str, Array], isa: Isa | None = None
) -> dict[str, Array]:
    """Run a variant, whose files lie under ``folder``, sample by sample in a process of its own; ``None``: natively.

    Raises:
        HealthError: nothing can be emulated here, the engine refuses the file, or the process crashed or hung.
    """
    import numpy as np

    if isa is not None and lacking(isa):
        raise HealthError(lacking(isa), "check on a machine where it is, or on the device itself")
    packed = io.BytesIO()
    np.savez(packed, **dict(inputs))  # type: ignore[arg-type]  # NumPy's own annotation of the names
    is_arm = isa is not None and isa.arch == "aarch64"
    root = GUEST_FOLDER if is_arm else str(folder.resolve())
    has_dot_product = None if isa is None or is_arm else False
    job = msgspec.json.encode(_Job(root, variant, contract.inputs, contract.outputs, has_dot_product))
    work: dict[str, Path | bytes] = {JOB: job, GIVEN: packed.getvalue()}
    if isa is not None and is_arm:
        work |= {f"{GUEST_FOLDER}/{name}": folder / name for name in variant.files}
        found = arm64.run(__name__, work, cpu=isa.model, answer=FOUND, doing=variant.main)
    else:
        found = _in_user_mode(work, variant, isa)
    with np.load(io.BytesIO(found), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _in_user_mode(work: Mapping[str, Path | bytes], variant: Variant, isa: Isa | None) -> bytes:
    """Run the child beside its files, as another x86 or as what this machine is, and return its answers."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in work.items():
            Path(scratch, name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        prefix = [_emulator(), "-cpu", isa.model] if isa else []
        # the interpreter itself: a link in a virtual environment is no program to QEMU
        command = [*prefix, str(Path(sys.executable).resolve()), "-m", __name__]
        where = isa.name if isa else "this machine"
        path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        try:
            child = subprocess.run(
                command, capture_output=True, timeout=TIMEOUT, check=False, env=environment, cwd=scratch
            )
        except subprocess.TimeoutExpired as error:
            raise HealthError(f"{variant.main} did not finish on {where} in {TIMEOUT:g} s") from error
        found = Path(scratch, FOUND)
        if child.returncode or not found.is_file():
            told = child.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
            raise HealthError(f"{variant.main} does not run on {where}: {told or f'exit code {child.returncode}'}")
        return found.read_bytes()


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
    has_dot_product: bool | None
    """What QEMU's user mode hides: the child reads this machine's own processor."""


def _emulator() -> str:
    return next((path for path in map(shutil.which, EMULATORS) if path), "")


def main() -> int:
    """Be the child of `answers`, in the folder of its job."""
    with extra("device"):
        import numpy as np
    job = msgspec.json.decode(Path(JOB).read_bytes(), type=_Job)
    contract = Contract(inputs=job.inputs, outputs=job.outputs)
    options = EngineOptions(threads=1, has_dot_product=job.has_dot_product)
    try:
        session = open_variant(Path(job.folder), job.variant, contract, options)
    except EdgekitError as error:
        sys.stderr.write(f"\n{error.message}\n")
        return error.exit_code
    if not isinstance(session, Session):
        sys.stderr.write("\nit gives text, and only tensors are compared\n")
        return 1
    with session, np.load(GIVEN, allow_pickle=False) as inputs:
        arrays = {name: inputs[name] for name in inputs.files}
        count = len(next(iter(arrays.values())))
        parts = [session.run({name: array[i : i + 1] for name, array in arrays.items()}) for i in range(count)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez(FOUND, **joined)  # type: ignore[arg-type]  # as above
    return 0


if __name__ == "__main__":
    sys.exit(main())
