"""LiteRT in static int8 on a depthwise CNN: SQNR and top-1 beside ai-edge-quantizer's own recipe and our ONNX file.

A DS-CNN of 14,000 parameters learns Fashion-MNIST in 600 steps; 128 pictures that it did not see calibrate, the test
pictures judge once. All int8 files take and give floats. The peer is ai-edge-quantizer's ``static_wi8_ai8`` on the
float file that edgekit writes, calibrated on the same pictures.
"""

from __future__ import annotations

import gzip
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compress"))
from _setting import Row, run, sqnr, top1

from edgekit import device_profiles, runtime, workload
from edgekit.compress.passes.quantize import Quantize
from edgekit.export import export
from edgekit.model import Data, Split
from edgekit.progress import silent

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.tensors import Array

PICTURES = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts them."""
TRAINED, CALIBRATED = 59_000, 128
STEPS = 600


def main(quick: bool) -> list[Row]:
    if not PICTURES.is_dir():
        return [Row("LiteRT static int8, SQNR", None, "the package dataset-fashion-mnist is not installed")]
    images, labels = read("train-images-idx3-ubyte.gz", 16), read("train-labels-idx1-ubyte.gz", 8)
    network = trained(scaled(images[:TRAINED]), labels[:TRAINED].astype(np.int64), 60 if quick else STEPS)
    calibration = scaled(images[TRAINED : TRAINED + CALIBRATED])
    model = workload.from_module("ds-cnn", network, Data(Split({"image": calibration})))
    count = 500 if quick else 10_000
    tested = scaled(read("t10k-images-idx3-ubyte.gz", 16)[:count])
    truth = read("t10k-labels-idx1-ubyte.gz", 8)[:count]
    reference = model.network.run({"image": tested})["scores"]
    planned = Quantize().apply(model, silent)
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            "LiteRT": answers(planned, "tflite", Path(scratch, "tflite"), tested),
            "ONNX": answers(planned, "onnx", Path(scratch, "onnx"), tested),
            "peer": peer(model, Path(scratch, "float"), calibration, tested),
        }
    noise = {name: sqnr(scores, reference) for name, scores in found.items() if scores is not None}
    right = {name: top1(scores, truth) for name, scores in found.items() if scores is not None}
    theirs = "ai-edge-quantizer static_wi8_ai8" if "peer" in noise else "ai-edge-quantizer is not installed"
    return [
        Row("fp32, top-1", top1(reference, truth), "%"),
        Row("LiteRT static int8, SQNR", noise["LiteRT"], "dB", goal="value >= 20"),
        Row("LiteRT static int8, SQNR", noise["LiteRT"], "dB", theirs, noise.get("peer"), "ratio >= 1.0"),
        Row("LiteRT static int8, top-1", right["LiteRT"], "%", theirs, right.get("peer")),
        Row("ONNX int8 of the same plan, SQNR", noise["ONNX"], "dB"),
        Row("ONNX int8 of the same plan, top-1", right["ONNX"], "%"),
    ]


def read(name: str, header: int) -> Array:
    """Return the bytes of an IDX file behind its header; pictures as [N, 1, 28, 28]."""
    with gzip.open(PICTURES / name) as file:
        found = np.frombuffer(file.read(), np.uint8, offset=header)
    return found.reshape(-1, 1, 28, 28) if "images" in name else found


def scaled(images: Array) -> Array:
    """Return floats, 0 to 1."""
    return images.astype(np.float32) / 255


def trained(images: Array, labels: Array, steps: int) -> nn.Module:
    """Train the network from one seed."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        *separable(16, 32, 1), *separable(32, 64, 2), *separable(64, 64, 1), *separable(64, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    order = torch.cat([torch.randperm(len(images)) for _ in range(1 + steps * 128 // len(images))])
    for chosen in order.split(128)[:steps]:
        scores = network(torch.as_tensor(images[chosen.numpy()]))
        loss = nn.functional.cross_entropy(scores, torch.as_tensor(labels[chosen.numpy()]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """Make a depthwise convolution and a pointwise one."""
    return [
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
    ]  # fmt: skip


def answers(model: Model, form: str, folder: Path, images: Array) -> Array:
    """Export for a format and return the scores of its engine."""
    result = export(model, [device_profiles.of_format(form)], folder)
    if result.first_error:
        raise result.first_error
    with runtime.load(folder, threads=1) as session:
        return session.run({"image": images})["scores"]  # type: ignore[union-attr]  # no language model


def peer(model: Model, folder: Path, calibration: Array, images: Array) -> Array | None:
    """Return the scores of ai-edge-quantizer's own recipe, None where it is not installed."""
    if importlib.util.find_spec("ai_edge_quantizer") is None:
        return None
    from ai_edge_litert.interpreter import Interpreter

    answers(model, "tflite", folder, images[:1])
    made = peer_file(next(folder.glob("**/*.tflite")), calibration)
    reader: Any = Interpreter(str(made), num_threads=1)
    reader.allocate_tensors()
    runner = reader.get_signature_runner()
    return np.concatenate([next(iter(runner(args_0=one).values())) for one in last(images)])


def peer_file(path: Path, calibration: Array) -> Path:
    """Quantize a float file by ai-edge-quantizer's own recipe; inputs and outputs stay float."""
    from ai_edge_quantizer import qtyping, quantizer, recipe

    engine = quantizer.Quantizer(str(path))
    engine.load_quantization_recipe(recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        engine.update_quantization_recipe(regex=".*", operation_name=end, algorithm_key="no_quantize")
    samples = [{"args_0": one} for one in last(calibration)]
    made = path.with_name("peer.tflite")
    engine.quantize(engine.calibrate({"serving_default": samples})).export_model(str(made), overwrite=True)
    return made


def last(images: Array) -> list[Array]:
    """Return each picture as a batch of one, channels last."""
    return [np.ascontiguousarray(one[None].transpose(0, 2, 3, 1)) for one in images]


if __name__ == "__main__":
    run("LiteRT in static int8, DS-CNN on Fashion-MNIST", main)
