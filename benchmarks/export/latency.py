"""Latency of int8 files on this CPU, one thread, beside what each engine's own quantizer makes of the same network.

Three networks: ResNet-20 on CIFAR-10, a depthwise CNN on Fashion-MNIST, EfficientNet-Lite0 on photographs. Each is
written by edgekit for ONNX Runtime, LiteRT, OpenVINO and ExecuTorch from one plan, and by `quantize_static`,
ai-edge-quantizer, NNCF and ExecuTorch's PT2E flow, from the same float network and the same calibration pictures.
Pairs are opened by the same engine with the same options, straight, without edgekit's runtime in between. A round runs
each contender once, in an order that is shuffled anew; the ratio of medians is judged. Two files that take equally long
have a ratio that lies above 1 half of the time, so a goal holds where the lower end of its 95 % interval (bootstrap
over rounds, both files of a round together) is at most 1; the interval stands in the row.

Where the processor has no 8-bit dot product, ONNX Runtime adds u8 x s8 in 16 bits: there both sides get 7-bit weights,
edgekit's where calibration saturates, `quantize_static`'s by its ``reduce_range``. OpenVINO adds so, too, and gets both
sides' integers as floats, as edgekit's runtime opens files there. SQNR to the float network and top-1 stand beside, so
that nobody is fast by being wrong.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compress"))
import _cifar
import _peers
import litert
from _setting import Row, gap, run, sqnr, top1
from _subjects import PHOTOGRAPHS, cifar, efficientnet

from edgekit import bundle, device_profiles, workload
from edgekit.compress.passes.quantize import Quantize
from edgekit.device_profiles import machine
from edgekit.export import export
from edgekit.model import Data, Split
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.model import Model
    from edgekit.tensors import Array

    Run = Callable[[Array], Array]

ROUNDS, WARM = 300, 5
JUDGED = 200
ENGINES = {"onnx": "quantize_static", "tflite": "ai-edge-quantizer", "openvino": "NNCF", "executorch": "PT2E"}
"""Formats, each with whose file runs beside ours."""
KEPT: list[Any] = []
STATIC = {"per_channel": True, "activation_type": "QUInt8", "weight_type": "QInt8"}


@dataclass(frozen=True)
class Subject:
    """A float network with calibration, pictures that judge, and their classes."""

    name: str
    model: Model
    images: Array
    labels: Array


def main(quick: bool) -> list[Row]:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in {"ds-cnn": _ds_cnn, "resnet20": _resnet, "efficientnet-lite0": _lite0}.items():
            if quick and name != "ds-cnn":
                continue
            subject = make(quick)
            folder = Path(scratch, name)
            folder.mkdir()
            rows += [gap(name, "no data at hand")] if subject is None else _rows(subject, folder, quick)
    return rows


def _ds_cnn(quick: bool) -> Subject | None:
    if not litert.PICTURES.is_dir():
        return None
    images = litert.read("train-images-idx3-ubyte.gz", 16)
    labels = litert.read("train-labels-idx1-ubyte.gz", 8)[: litert.TRAINED].astype(np.int64)
    network = litert.trained(litert.scaled(images[: litert.TRAINED]), labels, 60 if quick else litert.STEPS)
    calibration = litert.scaled(images[litert.TRAINED : litert.TRAINED + litert.CALIBRATED])
    tested = litert.scaled(litert.read("t10k-images-idx3-ubyte.gz", 16)[:JUDGED])
    truth = litert.read("t10k-labels-idx1-ubyte.gz", 8)[:JUDGED]
    model = workload.from_module("ds-cnn", network, Data(Split({"image": calibration})))
    return Subject("ds-cnn", model, tested, truth)


def _resnet(quick: bool) -> Subject | None:
    del quick
    if not _cifar.there():
        return None
    found = cifar("resnet20").smaller(JUDGED)
    return Subject(
        "resnet20", replace(found.model(0), name="resnet20"), found.test.inputs[found.input], _labels(found.test)
    )


def _lite0(quick: bool) -> Subject | None:
    del quick
    if not PHOTOGRAPHS.is_file():
        return None
    found = efficientnet().smaller(JUDGED // 4)
    return Subject(
        "efficientnet-lite0", replace(found.model(0), name="lite0"), found.test.inputs[found.input], _labels(found.test)
    )


def _labels(split: Split) -> Array:
    assert split.labels is not None, "subjects are judged"
    return split.labels


def _rows(subject: Subject, folder: Path, quick: bool) -> list[Row]:
    rows: list[Row] = []
    runs: dict[str, Run] = {}
    for form, peer in ENGINES.items():
        for whose, write in (("edgekit", _ours), (peer, PEERS[form])):
            name = f"{form} {whose}"
            try:
                path = write(subject, form, folder / form)
                runs[name] = OPENERS[form](path)
            except ModuleNotFoundError as error:
                rows.append(gap(f"{subject.name}: {name}", f"{error.name} is not installed"))
            except RuntimeError as error:
                rows.append(gap(f"{subject.name}: {name}", str(error)[:120]))
    reference = subject.model.network.run({subject.model.inputs[0].name: subject.images})[subject.model.outputs[0].name]
    for name, call in runs.items():
        found = np.concatenate([call(one) for one in _singles(subject)])
        noise, right = sqnr(found, reference), top1(found, subject.labels)
        rows.append(Row(f"{subject.name}: {name}, SQNR (top-1 {right:.1f} %)", noise, "dB"))
    rounds = _rounds(runs, _singles(subject), 20 if quick else ROUNDS)
    return [*rows, *_judged(subject.name, rounds)]


def _singles(subject: Subject) -> list[Array]:
    return [np.ascontiguousarray(one[None]) for one in subject.images]


def _rounds(runs: dict[str, Run], pictures: list[Array], count: int) -> dict[str, Array]:
    """Time every contender once a round, in a new order each; in milliseconds."""
    order, rng = list(runs), np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(count + WARM):
        picture = pictures[number % len(pictures)]
        rng.shuffle(order)
        for name in order:
            began = time.perf_counter()
            runs[name](picture)
            found[name].append(1e3 * (time.perf_counter() - began))
    return {name: np.array(times[WARM:]) for name, times in found.items()}


def _judged(subject: str, rounds: dict[str, Array]) -> list[Row]:
    rows = []
    for form, peer in ENGINES.items():
        mine, theirs = f"{form} edgekit", f"{form} {peer}"
        if mine in rounds and theirs in rounds:
            rows += _compared(f"{subject}: {form}", rounds[mine], peer, rounds[theirs])
    ours = {name: times for name, times in rounds.items() if name.endswith(" edgekit")}
    others = {name: times for name, times in rounds.items() if name not in ours}
    if ours and others:
        mine, theirs = (min(group, key=lambda name: float(np.median(group[name]))) for group in (ours, others))
        rows += _compared(f"{subject}: the fastest of ours ({mine})", ours[mine], theirs, others[theirs])
    return rows


def _compared(what: str, mine: Array, peer: str, theirs: Array) -> list[Row]:
    """Return the medians, and the lower end of the ratio's interval, which is judged."""
    picks = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
    ratios = np.median(mine[picks], axis=1) / np.median(theirs[picks], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return [
        Row(what, float(np.median(mine)), "ms", peer, float(np.median(theirs))),
        Row(f"{what}: ratio, lower end of {low:.3f} to {high:.3f}", float(low), "", peer, goal="value <= 1.0"),
    ]


def _is_cut() -> bool:
    return not machine.describe().integer_dot_product


def _ours(subject: Subject, form: str, folder: Path) -> Path:
    """Write the file by edgekit: one plan for all formats, with 7 bits for ONNX where sums would be cut off."""
    is_safe = form == "onnx" and _is_cut()
    planned = Quantize(target="x86-64-v3" if is_safe else "").apply(subject.model, silent)
    profile = device_profiles.load("x86-64-v3") if is_safe else device_profiles.of_format(form)
    result = export(planned, [profile], folder / "ours")
    if result.first_error:
        raise RuntimeError(result.first_error.message)
    return folder / "ours" / bundle.read(folder / "ours").manifest.variants[0].main


def _float(subject: Subject, form: str, folder: Path) -> Path:
    result = export(subject.model, [device_profiles.of_format(form)], folder / "float")
    if result.first_error:
        raise RuntimeError(result.first_error.message)
    return folder / "float" / bundle.read(folder / "float").manifest.variants[0].main


def _calibration(subject: Subject) -> Array:
    assert subject.model.data is not None, "subjects come with data"
    return subject.model.data.calibration.inputs[subject.model.inputs[0].name]


def _quantize_static(subject: Subject, form: str, folder: Path) -> Path:
    job = _peers.Job(
        contender="onnxruntime",
        onnx=str(_float(subject, form, folder)),
        workload="",
        checkpoint=None,
        input=subject.model.inputs[0].name,
        calibration=str(folder / "calibration.npy"),
        judged="",
        out=str(folder / "peer.onnx"),
        options={**STATIC, "reduce_range": _is_cut()},
    )
    np.save(job.calibration, _calibration(subject))
    done = _peers.run_apart(job)
    if done.error:
        raise RuntimeError(done.error)
    return Path(job.out)


def _ai_edge_quantizer(subject: Subject, form: str, folder: Path) -> Path:
    return litert.peer_file(_float(subject, form, folder), _calibration(subject))


def _nncf(subject: Subject, form: str, folder: Path) -> Path:
    del form
    import nncf
    import openvino

    feeds = [{0: one[None]} for one in _calibration(subject)]
    plain = openvino.Core().read_model(_float(subject, "openvino", folder))
    made = nncf.quantize(plain, nncf.Dataset(feeds), subset_size=len(feeds), target_device=nncf.TargetDevice.CPU)
    openvino.save_model(made, folder / "peer.xml", compress_to_fp16=False)
    return folder / "peer.xml"


def _pt2e(subject: Subject, form: str, folder: Path) -> Path:
    del form
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    pictures = [
        torch.as_tensor(one)[None].clone(memory_format=torch.contiguous_format) for one in _calibration(subject)
    ]
    module = torch.export.export(subject.model.network.module, (pictures[0],)).module()  # type: ignore[union-attr]  # PyTorch
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for picture in pictures:
            prepared(picture)
    program = torch.export.export(convert_pt2e(prepared), (pictures[0],))
    made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path = folder / "peer.pte"
    path.write_bytes(made.buffer)
    return path


def _in_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda picture: session.run(None, {name: picture})[0]  # type: ignore[no-any-return]  # it has no types


def _in_litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    reader: Any = Interpreter(str(path), num_threads=1)
    reader.allocate_tensors()
    given, taken = reader.get_input_details()[0], reader.get_output_details()[0]
    is_last = given["shape"][-1] <= 4

    def call(picture: Array) -> Array:
        reader.set_tensor(given["index"], picture.transpose(0, 2, 3, 1) if is_last else picture)
        reader.invoke()
        return reader.get_tensor(taken["index"])  # type: ignore[no-any-return]  # it has no types

    return call


def _in_openvino(path: Path) -> Run:
    import openvino

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    if _is_cut():
        settings["LP_TRANSFORMS_MODE"] = False
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda picture: np.array(request.infer({0: picture})[0])


def _in_executorch(path: Path) -> Run:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)  # noqa: SLF001  # the only way to it
    program = Runtime.get().load_program(path.read_bytes())
    method = program.load_method("forward")
    KEPT.append(program)  # a method reads the program's bytes, and does not keep them
    return lambda picture: method.execute([torch.from_numpy(picture)])[0].numpy()


PEERS: dict[str, Callable[[Subject, str, Path], Path]] = {
    "onnx": _quantize_static,
    "tflite": _ai_edge_quantizer,
    "openvino": _nncf,
    "executorch": _pt2e,
}
OPENERS: dict[str, Callable[[Path], Run]] = {
    "onnx": _in_onnxruntime,
    "tflite": _in_litert,
    "openvino": _in_openvino,
    "executorch": _in_executorch,
}


if __name__ == "__main__":
    if importlib.util.find_spec("nncf") is None:
        print("nncf is missing: pip install -e '.[bench]'", file=sys.stderr)
    run("Latency of int8 files, one thread", main)
