"""LiteRT flatbuffers: pictures channel-last, batch 1, a plan with float inputs and outputs.

LiteRT's tensors do not keep the plan's names: they are known by what they hold, and measured where no node holds it.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError, UsageError
from edgekit.export import litert_file, litert_ranges, litert_recipe
from edgekit.export.quiet import silence
from edgekit.export.refusal import REFUSALS, reason
from edgekit.export.targets import Artifact, Exporter
from edgekit.manifest import Port
from edgekit.model import Model, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgekit.device_profiles import DeviceProfile
    from edgekit.progress import Progress
    from edgekit.tensors import Array, TensorSpec

CHANNEL_LAST = (0, 2, 3, 1)
SIGNATURE = "serving_default"


class TfliteExporter:
    """Writes one ``model.tflite``. Reads no option."""

    extra = "export"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file for one hardware class.

        Raises:
            ExportError: no PyTorch network, an operator without a LiteRT form, or a plan that it cannot hold.
            MissingExtra: litert-torch or ai-edge-quantizer is not installed.
        """
        del profile
        if not isinstance(model.network, TorchNetwork):
            raise ExportError(
                f"{model.name} is no PyTorch network; LiteRT is made from one", "give the Python workload"
            )
        ports = tuple(_port(spec, f"args_{i}") for i, spec in enumerate(model.inputs))
        path = folder / "model.tflite"
        recipe = litert_recipe.of(model)
        network = litert_recipe.on_the_grid(model, model.network)
        path.write_bytes(_convert(model, network, ports))
        notes = litert_recipe.notes(model)
        if recipe is not None:
            ranges, told = _ranges(path, replace(model, network=network), recipe, ports=ports, progress=progress)
            notes = (*notes, *told)
            try:
                content = _quantize(path, recipe, ranges)
            except (ValueError, RuntimeError):  # what the quantizer raises where it cannot recover a scale
                content = _quantize(path, replace(recipe, shows_scales=True), ranges)
                notes = (
                    *notes,
                    "LiteRT could not be shown the plan's scales: weights are rounded again, to its own",
                )
            path.write_bytes(content)
        found = litert_file.read(path.read_bytes())
        notes = (*notes, *_told(model, recipe, found))
        outputs = (Port(name=s.name, key=f"output_{i}", dtype=s.dtype) for i, s in enumerate(model.outputs))
        return Artifact(
            main=path.name,
            files=(path.name,),
            precision=model.precision,
            inputs=ports,
            outputs=tuple(outputs),
            batch=1,
            operators=found.operators,
            requires={"ai-edge-litert": ">=2.1"},
            notes=notes,
        )


def _told(model: Model, recipe: litert_recipe.Recipe | None, found: litert_file.Found) -> tuple[str, ...]:
    """Say what of a plan the file does otherwise, and stop where nothing of it is left."""
    if recipe is None:
        return ()
    if found.floats and not found.integer:
        raise ExportError(
            f"LiteRT's quantizer leaves every layer of {model.name} in float ({', '.join(sorted(set(found.floats)))})",
            "use another precision, or export to onnx",
        )
    depthwise = found.operators["DEPTHWISE_CONV_2D"] if recipe.bits < 8 else 0
    wide = f"{depthwise} depthwise layers of {recipe.bits} bits are stored in 8: LiteRT has no narrower kernel for them"
    return tuple(note for note in (found.note(), wide if depthwise else "") if note)


def _port(spec: TensorSpec, key: str) -> Port:
    axes = CHANNEL_LAST if len(spec.shape) == 4 and spec.dtype == "float32" else ()
    dtype = "int32" if spec.dtype == "int64" else spec.dtype  # the converter narrows what it is asked for
    return Port(name=spec.name, key=key, dtype=dtype, axes=axes)


def _as_stored(array: Array, port: Port) -> Array:
    import numpy as np

    turned = array.transpose(port.axes) if port.axes else array
    return np.ascontiguousarray(turned, port.dtype)


def _convert(model: Model, network: TorchNetwork, ports: Sequence[Port]) -> bytes:
    if model.data is None:
        raise UsageError(f"{model.name} has no data", "give --data file.py:function or data.npz")
    with extra("export"), silence():
        import litert_torch
        import torch
    one = model.data.calibration.head(1).inputs
    example = tuple(torch.as_tensor(_as_stored(one[p.name], p)) for p in ports)
    pictures = [i for i, port in enumerate(ports) if port.axes]
    try:
        with silence(), tempfile.TemporaryDirectory() as scratch:
            module: Any = _frozen(network.module)
            module = litert_torch.to_channel_last_io(module, args=pictures) if pictures else module
            litert_torch.convert(module, example).export(f"{scratch}/model.tflite")
            return Path(scratch, "model.tflite").read_bytes()
    except REFUSALS as error:
        raise ExportError(
            f"{model.name} has no LiteRT form: {reason(error)}", "replace that operator, or use another target"
        ) from error


def _frozen(module: torch.nn.Module) -> torch.nn.Module:
    """Wrap a module that is in eval mode; litert-torch calls train(), which graphs loaded from disk refuse."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: torch.Tensor) -> Any:  # noqa: ANN401  # whatever the model gives
            return self.inner(*inputs)

        def train(self, mode: bool = True) -> Model:  # noqa: ARG002  # torch's signature
            return self

    return Model()


def _engine(path: Path, recipe: litert_recipe.Recipe) -> Any:  # noqa: ANN401  # the quantizer is untyped
    with extra("export"), silence():
        from ai_edge_quantizer import quantizer
    with silence():
        engine = quantizer.Quantizer(str(path))
        recipe.choose(engine, recover=not recipe.shows_scales)
    return engine


def _quantize(path: Path, recipe: litert_recipe.Recipe, ranges: Mapping[str, Any]) -> bytes:
    engine = _engine(path, recipe)
    with silence(), tempfile.TemporaryDirectory() as scratch:
        engine.quantize(dict(ranges) or None).export_model(f"{scratch}/model.tflite", overwrite=True)
        return Path(scratch, "model.tflite").read_bytes()


def _ranges(
    path: Path, model: Model, recipe: litert_recipe.Recipe, *, ports: Sequence[Port], progress: Progress
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the quantizer's statistics by tensor, and a note: the plan's range, else the extremes of all samples.

    One sample is enough to learn the tensors' names where the plan has them all.
    """
    import numpy as np

    if model.data is None or recipe.scheme != "static":
        return {}, ()
    samples = model.data.calibration
    engine = _engine(path, replace(recipe, shows_scales=True))  # weights do not matter here
    first = samples.head(1).inputs
    planned = litert_ranges.carried(path, model, {p.key: _as_stored(first[p.name], p) for p in ports})
    ranges: dict[str, Any] = {}
    for number, sample in enumerate(samples.batches(1)):
        progress("calibrate LiteRT", number + 1, len(samples))
        stored = {p.key: _as_stored(sample.inputs[p.name], p) for p in ports}
        with silence():
            found = engine.calibrate({SIGNATURE: [stored]}, num_threads=1)
        ranges = _wider(ranges, found)
        if ranges.keys() <= planned.keys():
            break
    mine = ranges.keys() & planned.keys()
    for name in mine:
        for end, value in (("min", planned[name].low), ("max", planned[name].high)):
            ranges[name][end] = np.full_like(ranges[name][end], value)
    return ranges, (f"activation ranges: {len(mine)} from the plan, {len(ranges) - len(mine)} measured on the data",)


def _wider(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Join the ranges of two samples.

    The quantizer's own calibration keeps a moving average (weight 0.05 a sample), which cuts off what few samples
    show: EfficientNet-Lite0 reached 12 dB with it.
    """
    import numpy as np

    joined = {**other, **one}
    for name in one.keys() & other.keys():
        joined[name] = {
            "min": np.minimum(one[name]["min"], other[name]["min"]),
            "max": np.maximum(one[name]["max"], other[name]["max"]),
        }
    return joined


PLUGIN: Exporter = TfliteExporter()
