"""Where these benchmarks stand: the report one folder above, the data, and how files are judged in ONNX Runtime."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _report import ROOT, Row, run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.tensors import Array

__all__ = ["HERE", "ROOT", "SHARED", "Row", "gap", "run", "scores", "sqnr", "top1"]

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("EDGEKIT_BENCH_DATA") or ROOT.parent / "shared/data")


def gap(what: str, why: str) -> Row:
    """Return the row of something that could not be measured."""
    return Row(what, None, why)


def scores(path: Path, inputs: Mapping[str, Array], batch: int = 50) -> Array:
    """Compute the first output of an ONNX file, batch by batch, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    arrays = list(inputs.values()) if len(names) == 1 else [inputs[name] for name in names]
    parts = [
        session.run(None, {name: array[start : start + batch] for name, array in zip(names, arrays, strict=True)})[0]
        for start in range(0, len(arrays[0]), batch)
    ]
    return np.concatenate(parts)


def top1(found: Array, labels: Array) -> float:
    """Return the share of right answers in percent."""
    return 100 * float(np.mean(found.argmax(1) == labels))


def sqnr(found: Array, reference: Array) -> float:
    """Return how far the noise of ``found`` lies below the signal of ``reference``, in dB."""
    noise = float(np.mean((found - reference) ** 2, dtype=np.float64))
    signal = float(np.mean(reference**2, dtype=np.float64))
    return 10 * float(np.log10(signal / noise)) if noise else float("inf")
