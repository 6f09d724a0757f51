"""LiteRT flatbuffers: pictures channel-last, batch 1, a plan with float inputs and outputs.

LiteRT's tensors do not keep the plan's names, so ranges are measured on the calibration data.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError, UsageError
from edgekit.export import litert_recipe
from edgekit.export.quiet import silence
from edgekit.export.refusal import REFUSALS, reason
from edgekit.export.targets import Artifact, Exporter
from edgekit.manifest import Port
from edgekit.model import Model, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        path.write_bytes(_convert(model, litert_recipe.on_the_grid(model, model.network), ports))
        notes = litert_recipe.notes(model)
        if recipe is not None:
            try:
                content = _quantize(path, model, recipe, ports=ports, progress=progress)
            except (ValueError, RuntimeError):  # what the quantizer raises where it cannot recover a scale
                content = _quantize(path, model, replace(recipe, shows_scales=True), ports=ports, progress=progress)
                notes = (
                    *notes,
                    "LiteRT could not be shown the plan's scales: weights are rounded again, to its own",
                )
            path.write_bytes(content)
        outputs = (Port(name=s.name, key=f"output_{i}", dtype=s.dtype) for i, s in enumerate(model.outputs))
        return Artifact(
            main=path.name,
            files=(path.name,),
            precision=model.precision,
            inputs=ports,
            outputs=tuple(outputs),
            batch=1,
            requires={"ai-edge-litert": ">=2.1"},
            notes=notes,
        )


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


def _quantize(
    path: Path, model: Model, recipe: litert_recipe.Recipe, *, ports: Sequence[Port], progress: Progress
) -> bytes:
    if model.plan is None or model.data is None:
        raise UsageError(f"{model.name} has no quantization plan", "compress it first: edgekit compress")
    with extra("export"), silence():
        from ai_edge_quantizer import quantizer
    with silence():
        engine = quantizer.Quantizer(str(path))
        recipe.choose(engine, recover=not recipe.shows_scales)
    ranges: dict[str, Any] = {}
    if model.plan.scheme == "static":
        samples = model.data.calibration
        for number, sample in enumerate(samples.batches(1)):
            progress("calibrate LiteRT", number + 1, len(samples))
            named = {p.key: _as_stored(sample.inputs[p.name], p) for p in ports}
            with silence():
                found = engine.calibrate({SIGNATURE: [named]}, num_threads=1)
            ranges = _wider(ranges, found)
    with silence(), tempfile.TemporaryDirectory() as scratch:
        engine.quantize(ranges or None).export_model(f"{scratch}/model.tflite", overwrite=True)
        return Path(scratch, "model.tflite").read_bytes()


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
