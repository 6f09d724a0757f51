"""Lowers a plan into ONNX QuantizeLinear/DequantizeLinear pairs. Knows no target.

Ranges come from the plan where the file has the value; the others are measured on the calibration data.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekit.errors import ExportError, UsageError
from edgekit.export.onnx_file import Graph, float_graph, write
from edgekit.export.quiet import silence
from edgekit.export.targets import Artifact
from edgekit.manifest import Port
from edgekit.model import TorchNetwork, whole_batches
from edgekit.plan import Range
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx

    from edgekit.device_profiles import DeviceProfile
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress
    from edgekit.tensors import Array

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Scheme:
    """How one hardware class wants its integers."""

    activations: str
    symmetric: bool
    quantize_bias: bool


UNSIGNED = Scheme(activations="uint8", symmetric=False, quantize_bias=True)
"""For ONNX Runtime on CPUs: only u8 activations fuse to integer kernels on x86 (7.6 against 21.1 ms)."""

SIGNED = Scheme(activations="int8", symmetric=True, quantize_bias=False)
"""For TensorRT: it refuses zero points other than 0 and integer biases."""


def quantize(graph: Graph, model: Model, scheme: Scheme, progress: Progress) -> tuple[onnx.ModelProto, str]:
    """Return the graph with the model's plan lowered into it, and a note on where its ranges come from.

    Raises:
        ExportError: the plan is weight-only, asks for other than 8 bits, or names a weight that the graph lacks.
        UsageError: the model has no plan or no calibration data.
    """
    if model.plan is None or model.data is None:
        raise UsageError(f"{model.name} has no quantization plan", "compress it first: edgekit compress")
    _refuse(model.plan)
    prepared = _prepare(graph.proto)
    found = planned_nodes(prepared, model, model.plan)
    planned = {graph.values.get(name, name): r for name, r in model.plan.activations.items()}
    ranges = _complete(prepared, planned, whole_batches(model, model.data.calibration), progress)
    with extra("export"):
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    weight_type, activation_type = _types(scheme)
    skipped = [node.name for node in prepared.graph.node if node.op_type in _WEIGHTED and node.name not in found]
    with silence():
        quantizer = QDQQuantizer(
            prepared,
            per_channel=True,
            reduce_range=False,
            activation_qType=activation_type,
            weight_qType=weight_type,
            tensors_range=_tensors_data(ranges),
            nodes_to_quantize=[],
            nodes_to_exclude=skipped,
            op_types_to_quantize=_operators(),
            extra_options=_options(scheme, _whole_weights(prepared, found, model.plan)),
        )
        quantizer.quantize_model()
    mine = len(ranges.keys() & planned.keys())
    note = f"activation ranges: {mine} from the plan, {len(ranges) - mine} measured on the calibration data"
    return cast("onnx.ModelProto", quantizer.model.model), note


def _refuse(plan: QuantizationPlan) -> None:
    if not plan.activations:
        raise ExportError(
            "the plan is weight-only; these ONNX files hold weights and activations in 8 bits",
            "quantize activations too, or use a Core ML or LiteRT target",
        )
    for name, rule in plan.weights.items():
        if rule.bits != 8:
            raise ExportError(
                f"{name!r} wants {rule.bits}-bit weights; ONNX with quantized activations holds 8 bits",
                "set bits = 8 in the recipe",
            )


def _prepare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Infer shapes and fold constants, as ONNX Runtime's quantizer expects."""
    with extra("export"):
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process
    with tempfile.TemporaryDirectory() as scratch, silence():
        before, after = Path(scratch, "float.onnx"), Path(scratch, "prepared.onnx")
        before.write_bytes(write(proto))
        quant_pre_process(str(before), str(after), skip_symbolic_shape=True)
        return onnx.load(str(after))


def planned_nodes(proto: onnx.ModelProto, model: Model, plan: QuantizationPlan) -> dict[str, str]:
    """Return, for every node whose weight the plan names, the plan's name for it.

    A weight that the exporter renamed (as a transposed copy) is known by its values.

    Raises:
        ExportError: the plan names a weight that no node of the graph uses.
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    weighted = {n.name: n.input[1] for n in proto.graph.node if n.op_type in _WEIGHTED and len(n.input) > 1}
    found = {node: value for node, value in weighted.items() if value in plan.weights}
    lost = plan.weights.keys() - set(found.values())
    others = {node: constants[v] for node, v in weighted.items() if node not in found and v in constants}
    found |= _by_content(others, {name: tensor for name, tensor in _parameters(model).items() if name in lost})
    for name in sorted(plan.weights.keys() - set(found.values())):
        raise ExportError(f"the plan quantizes {name!r}, which no ONNX node uses", "leave it out in the recipe")
    return found


def _parameters(model: Model) -> dict[str, Array]:
    if not isinstance(model.network, TorchNetwork):
        return {}
    return {name: p.detach().numpy() for name, p in model.network.module.named_parameters()}


def _by_content(nodes: Mapping[str, onnx.TensorProto], parameters: Mapping[str, Array]) -> dict[str, str]:
    import numpy as np
    from onnx import numpy_helper

    found: dict[str, str] = {}
    for node, tensor in nodes.items():
        value = numpy_helper.to_array(tensor)
        for name, parameter in parameters.items():
            if np.array_equal(value, parameter) or np.array_equal(value, parameter.T):
                found[node] = name
    return found


def _complete(
    proto: onnx.ModelProto, planned: Mapping[str, Range], samples: tuple[Split, int], progress: Progress
) -> dict[str, Range]:
    values = _float_values(proto)
    missing = [name for name in values if name not in planned]
    found = {name: planned[name] for name in values if name in planned}
    return found | measure(proto, missing, samples, progress)


def _float_values(proto: onnx.ModelProto) -> list[str]:
    """List activations: graph inputs and what nodes make, floats only."""
    import onnx

    graph = proto.graph
    integer = {
        v.name
        for v in (*graph.value_info, *graph.input, *graph.output)
        if v.type.tensor_type.elem_type != onnx.TensorProto.FLOAT
    }
    names = [v.name for v in graph.input] + [name for node in graph.node for name in node.output if name]
    return [name for name in names if name not in integer]


def measure(
    proto: onnx.ModelProto, names: Iterable[str], samples: tuple[Split, int], progress: Progress
) -> dict[str, Range]:
    """Return the smallest and largest value that each named tensor takes on samples, so many at once."""
    import onnx
    import onnxruntime

    calibration, size = samples
    inputs = {v.name for v in proto.graph.input}
    found = {
        n: Range(float(calibration.inputs[n].min()), float(calibration.inputs[n].max())) for n in names if n in inputs
    }
    wanted = [n for n in names if n not in inputs]
    if not wanted:
        return found
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = onnxruntime.InferenceSession(write(watched), providers=["CPUExecutionProvider"])
    for number, batch in enumerate(calibration.batches(size)):
        progress("calibrate", min((number + 1) * size, len(calibration)), len(calibration))
        for name, value in zip(wanted, session.run(wanted, dict(batch.inputs)), strict=True):
            if value.dtype.kind == "f" and value.size:
                old = found.get(name, Range(float("inf"), float("-inf")))
                found[name] = Range(min(old.low, float(value.min())), max(old.high, float(value.max())))
    return found


def _tensors_data(ranges: Mapping[str, Range]) -> object:
    import numpy as np
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    data = {n: TensorData(lowest=np.float32(r.low), highest=np.float32(r.high)) for n, r in ranges.items()}
    return TensorsData(CalibrationMethod.MinMax, data)


def _types(scheme: Scheme) -> tuple[object, object]:
    from onnxruntime.quantization import QuantType

    return QuantType.QInt8, QuantType.QInt8 if scheme.activations == "int8" else QuantType.QUInt8


def _operators() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


def _whole_weights(proto: onnx.ModelProto, found: Mapping[str, str], plan: QuantizationPlan) -> list[str]:
    """List the file's weights that the plan gives one scale; a weight that was transposed has another name here."""
    return [
        n.input[1] for n in proto.graph.node if n.name in found and plan.weights[found[n.name]].granularity == "tensor"
    ]


def _options(scheme: Scheme, whole: Iterable[str]) -> dict[str, Any]:
    from onnxruntime.quantization import QuantType

    return {
        "ActivationSymmetric": scheme.symmetric,
        "WeightSymmetric": True,
        "QuantizeBias": scheme.quantize_bias,
        "TensorQuantOverrides": {name: [{"quant_type": QuantType.QInt8, "symmetric": True}] for name in whole},
    }


def write_artifact(model: Model, profile: DeviceProfile, path: Path, *, scheme: Scheme, progress: Progress) -> Artifact:
    """Write the model as ONNX, quantized if it has a plan, and describe the file."""
    opset = int(profile.options.get("opset", 20))
    graph = float_graph(model, opset)
    proto, *notes = quantize(graph, model, scheme, progress) if model.plan else (graph.proto,)
    path.write_bytes(write(proto))
    return Artifact(
        main=path.name,
        files=(path.name,),
        precision=model.precision,
        inputs=tuple(Port(name=s.name, key=s.name, dtype=s.dtype) for s in model.inputs),
        outputs=tuple(Port(name=s.name, key=s.name, dtype=s.dtype) for s in model.outputs),
        batch=graph.batch,
        notes=tuple(notes),
        requires={"onnxruntime": ">=1.20", "opset": str(max(o.version for o in proto.opset_import if not o.domain))},
    )
