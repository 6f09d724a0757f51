"""Which convolutions and matrix products of a file ONNX Runtime computes in integers. Asks it, and changes nothing.

A pair of QuantizeLinear and DequantizeLinear is a wish: whether it becomes an integer kernel shows in the graph that
the runtime makes of the file when it loads it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import onnx_io
from edgekit.errors import ExportError
from edgekit.plugins import extra
from edgekit.runtime.backends.onnx import engine_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx

    from edgekit.export.onnx_weights import Planned

INTEGER = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention", "MatMulNBits",
})  # fmt: skip
"""What multiplies integers; MatMulNBits reads integers of 4 bits and rounds its input to 8 where the CPU has units."""
FLOAT = frozenset({
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Attention",
})  # fmt: skip
WITHOUT_KERNEL = frozenset({"ConvTranspose"})
"""What ONNX Runtime never computes in integers on a CPU."""
APART = onnx_io.LARGE // 8
"""Files from which on the optimized graph is written without its weights: those of 4 bits may become floats in it."""
_ENDINGS = ("_quantized", "_widened", "_dequantized", "_dequantized_matrix")
"""How a weight is named after its integers were stored, cast, and made floats again at load."""
_MOVES = ("DequantizeLinear", "Reshape", "Transpose", "Cast", "Mul", "Sub", "Gather", "ReorderInput")


@dataclass(frozen=True)
class Kernels:
    """How many convolutions and matrix products run as integer kernels, of how many.

    ``floats``: the planned weights, by their names in the file, whose product runs in float all the same, with the node
    and its operator.
    """

    integer: int
    total: int
    floats: tuple[tuple[str, str, str], ...] = ()

    def note(self) -> str:
        """Say it in one line."""
        return f"{self.integer} of {self.total} convolutions and matrix products run as integer kernels"


def found_in(path: Path, planned: Collection[str], *, has_signed: bool = False) -> Kernels:
    """Load a file in ONNX Runtime as a device would, and count; ``planned`` are weights by their names in the file.

    ``has_signed``: its kernels take signed activations, as on ARM; on x86 they take unsigned ones alone.

    Raises:
        ExportError: ONNX Runtime refuses the file.
        MissingExtra: onnxruntime is not installed.
    """
    graph = optimized(path, has_signed=has_signed).graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in INTEGER | FLOAT]
    floats = []
    for node in products:
        if node.op_type in FLOAT and len(node.input) > 1:
            owner = _owner(node.input[1], makers, constants, planned)
            if owner:
                floats.append((owner, node.name, node.op_type))
    return Kernels(sum(node.op_type in INTEGER for node in products), len(products), tuple(floats))


def optimized(path: Path, *, has_signed: bool = False) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime makes of a file on this machine, with all optimizations.

    Weights of large files are not in it, but for their names and shapes.
    """
    with extra("onnx"):
        import onnx
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if has_signed:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        if path.stat().st_size + sum(one.stat().st_size for one in path.parent.glob(f"{path.name}.data")) > APART:
            for key, value in (("file_name", "optimized.data"), ("min_size_in_bytes", "4096")):  # 4 bits become 32
                options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except engine_errors() as error:
            raise ExportError(
                f"ONNX Runtime {onnxruntime.__version__} refuses {path.name}: {str(error).splitlines()[0][:300]}",
                "export with --precision fp32 to see whether the plan or the network is at fault",
            ) from error
        return onnx.load(options.optimized_model_filepath, load_external_data=False)


def refuse_floats(kernels: Kernels, name: str, planned: Mapping[str, Planned]) -> None:
    """Stop where a plan of integers would be computed in float; ``planned`` are the weights by their names in the file.

    Raises:
        ExportError: a layer that has an integer kernel runs without it, or no layer has one; names the node.
    """
    lost = [one for one in kernels.floats if one[2] not in WITHOUT_KERNEL]
    lost = [one for one in lost if planned[one[0]].rule.granularity != "group"]
    if lost or (kernels.floats and not kernels.integer):
        weight, node, operator = (lost or kernels.floats)[0]
        weight = planned[weight].name
        raise ExportError(
            f"{name}: {weight!r} is planned in integers, and ONNX Runtime would compute node {node!r} ({operator}) in"
            " float",
            f"keep it float in the recipe (keep = [{weight!r}]), or quantize with activations = 'none'",
        )


def _owner(value: str, makers: dict[str, onnx.NodeProto], constants: set[str], planned: Collection[str]) -> str:
    """Return the planned weight from whose integers a value is made, empty where it is another's."""
    waiting, seen = [value], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in constants:
            owner = next((one for one in planned if name in [f"{one}{end}" for end in _ENDINGS]), "")
            if owner:
                return owner
        elif name in makers and makers[name].op_type in _MOVES:
            waiting += makers[name].input
    return ""
