"""Core ML weights as tables and without zeros, on a depthwise CNN, beside coremltools' own compression.

The DS-CNN of `litert`, which learned Fashion-MNIST; 128 pictures that it did not see calibrate. Each package is
computed from its bytes, for no Core ML runs here, on test pictures, and compared with the float network; sizes are
those of the weight file. The peers are passes of ``coremltools.optimize.coreml`` with their defaults on the float16
package that edgekit writes, the pruned network's where zeros are left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from litert import CALIBRATED, PICTURES, STEPS, TRAINED, read, scaled, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compress"))
from _setting import Row, gap, run, sqnr, top1

from edgekit import device_profiles, workload
from edgekit.compress.passes.gptq import Gptq
from edgekit.compress.passes.palettize import Palettize
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.passes.sparsify import Sparsify
from edgekit.export import export, mil
from edgekit.export.quiet import silence
from edgekit.model import Data, Split
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.model import Model

PACKAGE = "ios/model.mlpackage"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
LINEAR = Quantize(activations="none", bits=4, weights="mse")
OURS: dict[str, Callable[[Model], Model]] = {
    "float16": lambda model: model,
    "4-bit integers, a scale a channel": lambda m: LINEAR.apply(m, silent),
    "4-bit integers by gptq": lambda m: Gptq().apply(LINEAR.apply(m, silent), silent),
    "4-bit table a layer, nearest": lambda m: Palettize(rounding="nearest").apply(m, silent),
    "4-bit table a layer": lambda m: Palettize().apply(m, silent),
    "4-bit table for 4 channels": lambda m: Palettize(group=4).apply(m, silent),
    "6-bit table a layer": lambda m: Palettize(bits=6).apply(m, silent),
}
SPARSE = Sparsify(pattern="unstructured", sparsity=0.75, epochs=0)


def main(quick: bool) -> list[Row]:
    if not PICTURES.is_dir():
        return [gap("Core ML, SQNR", "the package dataset-fashion-mnist is not installed")]
    images, labels = read("train-images-idx3-ubyte.gz", 16), read("train-labels-idx1-ubyte.gz", 8)
    network = trained(scaled(images[:TRAINED]), labels[:TRAINED].astype(np.int64), 60 if quick else STEPS)
    calibration = scaled(images[TRAINED : TRAINED + CALIBRATED])
    model = workload.from_module("ds-cnn", network, Data(Split({"image": calibration})))
    tested = scaled(read("t10k-images-idx3-ubyte.gz", 16)[: 50 if quick else 500])
    truth = read("t10k-labels-idx1-ubyte.gz", 8)[: len(tested)]
    reference = model.network.run({"image": tested})["scores"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: written(make(model), Path(scratch, str(n))) for n, (name, make) in enumerate(OURS.items())}
        folders |= theirs(folders["float16"])
        noise = {
            name: sqnr(mil.run(folder, {"image": tested})["scores"], reference) for name, folder in folders.items()
        }
        sizes = {name: (folder / WEIGHTS).stat().st_size for name, folder in folders.items()}
        found = mil.run(folders["4-bit table for 4 channels"], {"image": tested})["scores"]
        sparse = zeros(model, Path(scratch))
    beside = {"4-bit table a layer": "k-means a layer", "4-bit table for 4 channels": "k-means for 4 channels"}
    rows = [Row("fp32, top-1", top1(reference, truth), "%")]
    for name in OURS:
        peer = beside.get(name, "")
        told = f"coremltools {peer}" if peer else ""
        goals = ("value >= peer", "ratio <= 1.05") if peer else ("", "")
        rows.append(Row(f"{name}, SQNR", noise[name], "dB", told, noise.get(peer), goals[0]))
        rows.append(Row(f"{name}, weight file", sizes[name], "bytes", told, sizes.get(peer), goals[1]))
    rows.append(Row("4-bit table for 4 channels, top-1", top1(found, truth), "%"))
    return [*rows, *sparse]


def written(model: Model, folder: Path) -> Path:
    """Export for iOS 18 and return the package."""
    profile = device_profiles.of_format("coreml")
    result = export(model, [type(profile)(**{**fields(profile), "name": "ios", "options": {"ios": 18}})], folder)
    if result.first_error:
        raise result.first_error
    return folder / PACKAGE


def fields(profile: device_profiles.DeviceProfile) -> dict[str, Any]:
    return {name: getattr(profile, name) for name in profile.__struct_fields__}


def theirs(package: Path) -> dict[str, Path]:
    """Compress the float16 package by coremltools' k-means; return the packages by name."""
    with silence():
        import coremltools as ct
        import coremltools.optimize.coreml as cto
    grouped = {"granularity": "per_grouped_channel", "group_size": 4}
    found = {}
    for name, more in {"k-means a layer": {}, "k-means for 4 channels": grouped}.items():
        config = cto.OpPalettizerConfig(mode="kmeans", nbits=4, weight_threshold=0, **more)
        found[name] = saved(package, name, cto.palettize_weights, cto.OptimizationConfig(global_config=config), ct)
    return found


def saved(package: Path, name: str, compress: Callable[..., Any], config: Any, ct: Any) -> Path:  # noqa: ANN401  # coremltools is untyped
    """Apply a pass of coremltools to a package and save what comes out beside it."""
    path = package.parents[1] / f"{name.replace(' ', '-')}.mlpackage"
    with silence():
        model = ct.models.MLModel(str(package), skip_model_load=True)
        compress(model, config).save(str(path))
    return path


def zeros(model: Model, scratch: Path) -> list[Row]:
    """Leave three quarters of the weights out, at us and at the peer; only bytes count, nothing was trained."""
    with silence():
        import coremltools as ct
        import coremltools.optimize.coreml as cto
    pruned = SPARSE.apply(model, silent)
    ours = {
        "floats": pruned,
        "4-bit integers": LINEAR.apply(pruned, silent),
        "4-bit table": Palettize().apply(pruned, silent),
    }
    found = {name: written(made, scratch / f"zeros-{n}") for n, (name, made) in enumerate(ours.items())}
    sizes = {name: (folder / WEIGHTS).stat().st_size for name, folder in found.items()}
    config = cto.OptimizationConfig(
        global_config=cto.OpThresholdPrunerConfig(threshold=1e-12, minimum_sparsity_percentile=0.3, weight_threshold=0)
    )
    peer = (saved(found["floats"], "pruned", cto.prune_weights, config, ct) / WEIGHTS).stat().st_size
    return [
        Row(
            "75 % zeros left out of floats, weight file",
            sizes["floats"],
            "bytes",
            "coremltools prune_weights",
            peer,
            "ratio <= 1.01",
        ),
        Row("75 % zeros left out of 4-bit integers, weight file", sizes["4-bit integers"], "bytes"),
        Row("75 % zeros left out of 4-bit tables, weight file", sizes["4-bit table"], "bytes"),
    ]


if __name__ == "__main__":
    run("Core ML: tables and zeros, DS-CNN on Fashion-MNIST", main)
