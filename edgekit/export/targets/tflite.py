"""LiteRT flatbuffers: pictures channel-last, batch 1, a plan as static int8 with float inputs and outputs.

LiteRT's tensors do not keep the plan's names, so ranges are measured on the calibration data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError, UsageError
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
    from edgekit.plan import QuantizationPlan
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
            ExportError: no PyTorch network, an operator without a LiteRT form, or weights of other than 8 bits.
            MissingExtra: litert-torch or ai-edge-quantizer is not installed.
        """
        del profile
        if not isinstance(model.network, TorchNetwork):
            raise ExportError(
                f"{model.name} is no PyTorch network; LiteRT is made from one", "give the Python workload"
            )
        ports = tuple(_port(spec, f"args_{i}") for i, spec in enumerate(model.inputs))
        path = folder / "model.tflite"
        path.write_bytes(_convert(model, model.network, ports))
        if model.plan:
            path.write_bytes(_quantize(path, model, ports, progress))
        outputs = (Port(name=s.name, key=f"output_{i}", dtype=s.dtype) for i, s in enumerate(model.outputs))
        return Artifact(
            main=path.name,
            files=(path.name,),
            precision=model.precision,
            inputs=ports,
            outputs=tuple(outputs),
            batch=1,
            requires={"ai-edge-litert": ">=2.1"},
            notes=_notes(model.plan),
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


def _quantize(path: Path, model: Model, ports: Sequence[Port], progress: Progress) -> bytes:
    if model.plan is None or model.data is None:
        raise UsageError(f"{model.name} has no quantization plan", "compress it first: edgekit compress")
    _refuse_bits(model.plan)
    with extra("export"), silence():
        from ai_edge_quantizer import quantizer
    with silence():
        engine = quantizer.Quantizer(str(path))
        _choose_recipe(engine, model.plan)
    ranges: dict[str, Any] = {}
    if model.plan.activations:
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


def _refuse_bits(plan: QuantizationPlan) -> None:
    for name, rule in plan.weights.items():
        if rule.bits != 8:
            raise ExportError(f"{name!r} wants {rule.bits}-bit weights; this exporter writes 8", "set bits = 8")


def _choose_recipe(engine: Any, plan: QuantizationPlan) -> None:  # noqa: ANN401  # the quantizer is untyped
    from ai_edge_quantizer import qtyping, recipe

    if not plan.activations:
        engine.load_quantization_recipe(recipe.weight_only_wi8_afp32())
        return
    engine.load_quantization_recipe(recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        engine.update_quantization_recipe(regex=".*", operation_name=end, algorithm_key="no_quantize")


def _notes(plan: QuantizationPlan | None) -> tuple[str, ...]:
    if plan is None:
        return ()
    whole = [name for name, rule in plan.weights.items() if rule.granularity == "tensor"]
    notes = ["activation ranges are LiteRT's own min-max over the calibration data"]
    return (*notes, f"{len(whole)} weights are per channel here, per tensor in the plan") if whole else tuple(notes)


PLUGIN: Exporter = TfliteExporter()
