"""EfficientNet-Lite0 in int8: bytes, accuracy and latency beside fp32 and ONNX Runtime's own `quantize_static`.

Accuracy is top-1 on labelled photographs where a sample is at hand (``EDGEKIT_DATA`` names the zip, or it lies in
``../shared/data``), else agreement with fp32 on crops that nothing was calibrated on. The peers calibrate on the
same pictures. All four run through the same session, one thread on one core, in turns.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from _report import ROOT, Row, run

from edgekit import bundle, device_profiles, runtime, workload
from edgekit.compress import compress, recipe
from edgekit.errors import EdgekitError
from edgekit.export import export
from edgekit.model import Data, Split
from edgekit.runtime.measure import measure
from edgekit.runtime.measured import Contender, Settings

if TYPE_CHECKING:
    from edgekit.bundle import Bundle
    from edgekit.model import Model
    from edgekit.tensors import Array

SAMPLE = Path(os.environ.get("EDGEKIT_DATA") or ROOT.parent / "shared/data/imagenet_sample256_jpg.zip")
WORKLOAD = ROOT / "examples/efficientnet.py"
TARGET = "x86-64"
PEERS = {
    "quantize_static, defaults": {},
    "quantize_static, u8s8 per channel": {"per_channel": True, "activations": "QUInt8"},
}


def main(quick: bool) -> list[Row]:
    data, judged = _data(quick)
    with tempfile.TemporaryDirectory() as scratch:
        bundles = _bundles(Path(scratch), data)
        scores = {name: _scores(made.folder, judged) for name, made in bundles.items()}
        accuracy = {name: _accuracy(one, judged, scores["fp32"]) for name, one in scores.items()}
        core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        settings = Settings(seconds=2 if quick else 20, threads=1, cpu=core)
        found = dict(zip(bundles, measure([Contender(str(b.folder)) for b in bundles.values()], settings), strict=True))
    return [*_size_rows(found), *_accuracy_rows(accuracy, judged), *_latency_rows(found)]


def _data(quick: bool) -> tuple[Data, Split]:
    """Return what may steer, and the pictures that only judge."""
    if SAMPLE.is_file():
        os.environ["EDGEKIT_IMAGENET_SAMPLE"] = str(SAMPLE)
        whole = workload.load_data(f"{WORKLOAD}:sample_data")
        judged = whole.validation
    else:
        whole = workload.load_data(f"{WORKLOAD}:data")
        judged = whole.test
    assert judged is not None, "the workload has a split to judge by"
    steering = Data(whole.calibration.head(32 if quick else 512), preprocess=whole.preprocess, labels=whole.labels)
    return steering, judged.head(100) if quick else judged


def _bundles(folder: Path, data: Data) -> dict[str, Bundle]:
    model = workload.load(f"{WORKLOAD}:build", data=data)
    plain = _exported(model, folder / "fp32")
    made = {"fp32": plain, "edgekit int8": _exported(compress(model, recipe.default()), folder / "int8")}
    for name, options in PEERS.items():
        made[name] = _peer(plain, folder / name.replace(" ", "-"), data.calibration, options)
    return made


def _exported(model: Model, folder: Path) -> Bundle:
    done = export(model, [device_profiles.load(TARGET)], folder)
    if done.bundle is None:
        raise done.first_error or EdgekitError("nothing was exported")
    return done.bundle


def _peer(plain: Bundle, folder: Path, calibration: Split, options: dict[str, object]) -> Bundle:
    """Let ONNX Runtime quantize our own fp32 file, after the preparation that its manual asks for."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    variant = plain.manifest.variant(TARGET)
    prepared, written = folder.with_suffix(".prepared.onnx"), folder.with_suffix(".onnx")
    settings = {"per_channel": bool(options.get("per_channel"))}
    if "activations" in options:
        settings["activation_type"] = QuantType[str(options["activations"])]
    with contextlib.redirect_stdout(sys.stderr):
        quant_pre_process(str(plain.path(variant.main)), str(prepared))
        quantize_static(str(prepared), str(written), _Reader(variant.inputs[0].key, calibration), **settings)
    changed = msgspec.structs.replace(variant, precision="int8", files=(variant.main,))
    manifest = msgspec.structs.replace(plain.manifest, variants=(changed,))
    golden = {entry.path: plain.path(entry.path) for entry in plain.manifest.files if entry.path not in variant.files}
    return bundle.seal(folder, manifest, {variant.main: written, **golden})


class _Reader:
    """What quantize_static reads its calibration from: one picture at a time, each once."""

    def __init__(self, key: str, split: Split) -> None:
        self._feeds = ({key: image[None]} for image in next(iter(split.inputs.values())))

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def _scores(folder: Path, judged: Split) -> Array:
    with runtime.load(folder) as session:
        return np.concatenate([next(iter(session.run(batch.inputs).values())) for batch in judged.batches(16)])


def _accuracy(scores: Array, judged: Split, reference: Array) -> float:
    truth = reference.argmax(1) if judged.labels is None else judged.labels
    return 100 * float(np.mean(scores.argmax(1) == truth))


def _size_rows(found: dict) -> list[Row]:
    size = {name: one.bytes / 1e6 for name, one in found.items()}
    peers = [Row(f"size, {name}", size[name], "MB", "fp32", size["fp32"]) for name in PEERS]
    return [Row("size, edgekit int8", size["edgekit int8"], "MB", "fp32", size["fp32"], "ratio <= 0.30"), *peers]


def _accuracy_rows(accuracy: dict[str, float], judged: Split) -> list[Row]:
    what = "agreement with fp32" if judged.labels is None else "top-1"
    best = max(PEERS, key=accuracy.__getitem__)
    drop = {name: round(accuracy["fp32"] - value, 6) for name, value in accuracy.items()}
    rows = [Row(f"{what} on {len(judged)} pictures, {name}", value, "%") for name, value in accuracy.items()]
    return [
        *rows,
        Row(f"drop of {what}, edgekit int8", drop["edgekit int8"], "points", best, drop[best], "value <= peer"),
    ]


def _latency_rows(found: dict) -> list[Row]:
    plain, ours = found["fp32"], found["edgekit int8"]
    rows = [Row("latency p50, edgekit int8", ours.p50_ms, "ms", "fp32", plain.p50_ms, "ratio <= 0.65")]
    rows.append(Row("latency p99, edgekit int8", ours.p99_ms, "ms", "fp32", plain.p99_ms))
    rows += [Row(f"latency p50, {name}", found[name].p50_ms, "ms", "fp32", plain.p50_ms) for name in PEERS]
    rows.append(Row("load, edgekit int8", ours.load_ms, "ms", "fp32", plain.load_ms))
    rows.append(Row("memory after the run, edgekit int8", ours.rss_mib, "MiB", "fp32", plain.rss_mib))
    return rows


if __name__ == "__main__":
    run("EfficientNet-Lite0, int8 on this CPU, one thread", main)
