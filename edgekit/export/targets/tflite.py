"""LiteRT flatbuffers: pictures channel-last, batch 1, inputs and outputs float or, where asked for, int8.

LiteRT's tensors do not keep the plan's names: they are known by what they hold, and measured where no node holds it.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit import grid
from edgekit.errors import ExportError, UsageError
from edgekit.export import litert_file, litert_ranges, litert_recipe, litert_weights
from edgekit.export.quiet import silence
from edgekit.export.refusal import REFUSALS, reason, refused
from edgekit.export.targets import Artifact, Exporter
from edgekit.manifest import Port
from edgekit.model import Model, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgekit.device_profiles import DeviceProfile
    from edgekit.plan import WeightRule
    from edgekit.progress import Progress
    from edgekit.tensors import Array, TensorSpec

CHANNEL_LAST = (0, 2, 3, 1)
SIGNATURE = "serving_default"


class TfliteExporter:
    """Writes one ``model.tflite``. Reads ``options.io`` (float or int8: what the file's pictures and scores are)."""

    extra = "export"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file for one hardware class.

        Raises:
            ExportError: no PyTorch network, an operator without a LiteRT form, or a plan that it cannot hold.
            UsageError: ``options.io`` is neither, or int8 without integer activations.
            MissingExtra: litert-torch or ai-edge-quantizer is not installed.
        """
        if not isinstance(model.network, TorchNetwork):
            raise ExportError(
                f"{model.name} is no PyTorch network; LiteRT is made from one", "give the Python workload"
            )
        integer_ends = _integer_ends(model, profile)
        litert_recipe.refuse(model)
        ports = tuple(_port(spec, f"args_{i}") for i, spec in enumerate(model.inputs))
        path = folder / "model.tflite"
        network = litert_recipe.on_the_grid(model, model.network)
        path.write_bytes(_convert(model, network, ports))
        notes: tuple[str, ...] = ()
        if model.plan is not None:
            before = litert_file.read(path.read_bytes())
            held = _held(model.network, model.plan.weights, before.layers)
            recipe = litert_recipe.of(
                model.plan, [held[layer.output] or layer for layer in before.layers], integer_ends=integer_ends
            )
            ranges, notes = _ranges(path, replace(model, network=network), recipe, ports=ports, progress=progress)
            path.write_bytes(_quantize(path, recipe, ranges))
            after = litert_file.read(path.read_bytes())
            litert_weights.check(held, after.layers)
            notes = (*notes, *_told(model, held, after))
        found = litert_file.read(path.read_bytes())
        outputs = tuple(Port(name=s.name, key=f"output_{i}", dtype=s.dtype) for i, s in enumerate(model.outputs))
        return Artifact(
            main=path.name,
            files=(path.name,),
            precision=model.precision,
            inputs=tuple(_as_written(port, found) for port in ports),
            outputs=tuple(_as_written(port, found) for port in outputs),
            batch=1,
            operators=found.operators,
            requires={"ai-edge-litert": ">=2.1"},
            notes=notes,
        )


def _integer_ends(model: Model, profile: DeviceProfile) -> bool:
    kind = profile.options.get("io", "float")
    if kind not in ("float", "int8"):
        raise UsageError(f"{profile.name}: options.io is {kind!r}", "use float or int8")
    if kind == "int8" and model.plan is not None and model.plan.scheme != "static":
        raise UsageError(
            f"{profile.name}: options.io is int8, and {model.name} is {model.precision}, without integer activations",
            'quantize with activations = "static", or leave options.io out',
        )
    return kind == "int8" and model.plan is not None


def _as_written(port: Port, found: litert_file.Found) -> Port:
    end = found.ends.get(port.key)
    if end is None or not end.scale:
        return port
    return msgspec.structs.replace(port, dtype=end.dtype, scale=end.scale, zero=end.zero)


def _held(
    network: TorchNetwork, rules: Mapping[str, WeightRule], layers: Sequence[litert_file.Layer]
) -> dict[str, litert_weights.Held | None]:
    stored = {n: p.detach().numpy() for n, p in network.module.named_parameters(remove_duplicate=False) if p.dim() > 1}
    grids = {n: grid.rounded(value, rules[n]) if n in rules else value for n, value in stored.items()}
    exact = {
        n: grid.with_scales(rule, grid.scales_of(stored[n], rule)) for n, rule in rules.items() if n in stored
    }  # rounding again has to find the scales of the first time
    return litert_weights.held(layers, grids, exact)


def _told(model: Model, held: Mapping[str, litert_weights.Held | None], found: litert_file.Found) -> tuple[str, ...]:
    """Say what of a plan the file does otherwise.

    Raises:
        ExportError: none of the planned weights is an integer in the file.
    """
    if found.floats and len(found.floats) == len(found.layers):
        raise ExportError(
            f"LiteRT's quantizer leaves every layer of {model.name} in float ({', '.join(sorted(set(found.floats)))})",
            "use another precision, or export to onnx",
        )
    wide = [one for one in held.values() if one and one.rule and one.rule.bits < 8]
    stored = {layer.output: layer for layer in found.layers}
    wide = [one for one in wide if one.layer.output in stored and stored[one.layer.output].dtype == "INT8"]
    depthwise = sum(one.layer.kind == "DEPTHWISE_CONV_2D" for one in wide)
    blocks = sum(one is not None and one.rule is not None and one.rule.granularity == "group" for one in held.values())
    unknown = sum(one is None for one in held.values())
    lost = (model.plan.weights.keys() if model.plan else set()) - {one.name for one in held.values() if one}
    told = {
        f"{depthwise} depthwise layers are stored in 8 bits: LiteRT has no narrower kernel for them": depthwise,
        f"{len(wide) - depthwise} weights of fewer than 8 bits are stored in 8": len(wide) - depthwise,
        f"{blocks} weights have scales a block of 8 bits of mantissa, the plan's are float32": blocks,
        f"{unknown} layers hold no weight of the model as it is: LiteRT rounds them to 8 bits by its own scales": (
            unknown
        ),
        f"{len(lost)} planned weights are not found in the file as they are: {', '.join(sorted(lost)[:3])}": lost,
        found.note(): found.note(),
    }
    return tuple(note for note, holds in told.items() if holds)


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
        from litert_converter._mlir.ir import MLIRError  # type: ignore[import-untyped]  # public nowhere, and of no class of ours
    one = model.data.calibration.head(1).inputs
    example = tuple(torch.as_tensor(_as_stored(one[p.name], p)) for p in ports)
    pictures = [i for i, port in enumerate(ports) if port.axes]
    try:
        with silence(), tempfile.TemporaryDirectory() as scratch:
            module: Any = _frozen(network.module)
            module = litert_torch.to_channel_last_io(module, args=pictures) if pictures else module
            litert_torch.convert(module, example).export(f"{scratch}/model.tflite")
            return Path(scratch, "model.tflite").read_bytes()
    except (*REFUSALS, MLIRError) as error:
        raise refused(model, "LiteRT", error) from error


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
    try:
        with silence():
            engine = quantizer.Quantizer(str(path))
            recipe.choose(engine)
    except REFUSALS as error:
        raise _unquantized(error) from error
    return engine


def _unquantized(error: BaseException) -> ExportError:
    return ExportError(
        f"LiteRT's quantizer does not take the plan: {reason(error)}",
        "leave that layer in float (keep), use another recipe, or export to onnx",
    )


def _quantize(path: Path, recipe: litert_recipe.Recipe, ranges: Mapping[str, Any]) -> bytes:
    engine = _engine(path, recipe)
    weights = {name: {"min": -most, "max": most} for name, most in recipe.largest.items()}
    try:
        with silence(), tempfile.TemporaryDirectory() as scratch:
            engine.quantize({**ranges, **weights} or None).export_model(f"{scratch}/model.tflite", overwrite=True)
            return Path(scratch, "model.tflite").read_bytes()
    except REFUSALS as error:
        raise _unquantized(error) from error


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
    engine = _engine(path, recipe)
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
