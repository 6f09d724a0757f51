"""The same int8 file on a processor with VNNI and on one without: what saturates, and the file that does not.

Without VNNI, x86 multiplies u8 activations with s8 weights in pairs and adds them in 16 bits, which saturate. The
files that edgekit writes are run here and on an emulated Haswell (AVX2, no VNNI: QEMU's user mode, the same Python
and the same ONNX Runtime). A file with 7-bit weights must give the same digits on both; one that has them only in
layers that saturate on the calibration data must come at least as near to fp32 there as the careless one. Pictures are
the test part of the other benchmarks, few of them: the emulation takes seconds for each.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import _cifar
import numpy as np
from _setting import HERE, Row, gap, run, sqnr
from _subjects import PHOTOGRAPHS, Subject, cifar, efficientnet, write_onnx

from edgekit.compress import compress, recipe
from edgekit.errors import EdgekitError

QEMU = "qemu-x86_64-static"
CPU = "Haswell"
SCORE = """
import sys, numpy as np
sys.path[:0] = {path!r}
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
images = np.load({images!r})
for file in {files!r}:
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = [session.run(None, {{name: images[i : i + 1]}})[0] for i in range(len(images))]
    np.save(file + {suffix!r}, np.concatenate(found))
"""
SAFE, EVERYWHERE = "ISA-safe (7 bits where calibration saturates)", "7 bits everywhere"
FILES = {"fp32": "", "u8s8": "int8-u8s8.toml", SAFE: "int8-isa-safe.toml", EVERYWHERE: "int8-7bits.toml"}


def main(quick: bool) -> list[Row]:
    if shutil.which(QEMU) is None:
        return [gap("int8 without VNNI", f"{QEMU} is not installed: apt-get install qemu-user-static")]
    if not _has_vnni():
        return [gap("int8 with and without VNNI", "this processor has no VNNI itself")]
    rows: list[Row] = []
    rows += _rows(cifar("resnet20"), 8 if quick else 64) if _cifar.there() else [gap("resnet20", "no data at hand")]
    if not quick:
        rows += _rows(efficientnet(), 16) if PHOTOGRAPHS.is_file() else [gap("efficientnet-lite0", "no data at hand")]
    return rows


def _has_vnni() -> bool:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _rows(subject: Subject, count: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files, rows = _files(subject, folder)
        images = folder / "images.npy"
        chosen = np.random.default_rng(3).permutation(len(subject.test))[:count]
        np.save(images, subject.test.inputs[subject.input][chosen])
        here = _scored(files, images, folder, "")
        there = _scored(files, images, folder, CPU)
    plain = here["fp32"]
    for name in files:
        rows += _compared(f"{subject.name}, {name}, {count} pictures", here[name], there[name], plain)
    for name in (SAFE, EVERYWHERE):
        if name in files:
            beside = "u8s8", sqnr(there["u8s8"], plain), "value >= peer"
            rows.append(Row(f"{subject.name}: SQNR to fp32 on {CPU}, {name}", sqnr(there[name], plain), "dB", *beside))
    if EVERYWHERE in files:
        same = float(np.abs(here[EVERYWHERE] - there[EVERYWHERE]).max())
        what = f"{subject.name}: {EVERYWHERE}, largest difference between both"
        rows.append(Row(what, same, "", goal="value <= 1e-4"))
    return rows


def _files(subject: Subject, folder: Path) -> tuple[dict[str, Path], list[Row]]:
    files, rows = {"fp32": subject.float_file(folder)}, []
    for name, recipe_file in FILES.items():
        if not recipe_file:
            continue
        try:
            made = compress(subject.model(0), recipe.read(HERE / "recipes" / recipe_file))
            files[name] = write_onnx(made, folder / "try", folder / f"{name}.onnx")
        except EdgekitError as error:
            rows.append(Row(f"{subject.name}: {name}", None, str(error)[:100], goal="value <= 0"))
    return files, rows


def _scored(files: dict[str, Path], images: Path, folder: Path, cpu: str) -> dict[str, np.ndarray]:
    """Score every file picture by picture in a Python of its own, emulated where a processor is named."""
    suffix = f".{cpu or 'native'}.npy"
    path = [entry for entry in sys.path if entry]
    names = [str(file) for file in files.values()]
    script = folder / "score.py"
    script.write_text(SCORE.format(path=path, images=str(images), files=names, suffix=suffix), encoding="utf-8")
    emulator = [QEMU, "-cpu", cpu] if cpu else []
    python = str(Path(sys.executable).resolve())
    subprocess.run(
        [*emulator, python, str(script)], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return {name: np.load(f"{file}{suffix}") for name, file in files.items()}


def _compared(what: str, here: np.ndarray, there: np.ndarray, plain: np.ndarray) -> list[Row]:
    digests = " ".join(hashlib.sha256(np.round(scores, 4).tobytes()).hexdigest()[:8] for scores in (here, there))
    changed = int((here.argmax(1) != there.argmax(1)).sum())
    rows = [Row(f"{what}: other class on {CPU} than here (digests {digests})", changed, "pictures")]
    if here is not plain:
        rows.append(Row(f"{what}: SQNR to fp32 on {CPU}", sqnr(there, plain), "dB", "with VNNI", sqnr(here, plain)))
    return rows


if __name__ == "__main__":
    run("Int8 on processors with and without VNNI", main)
