"""Parses and builds an ONNX file with TensorRT-RTX, which needs no GPU for that: the gate before a device's TensorRT.

TensorRT for RTX is not the TensorRT of a Jetson, but it reads ONNX by the same parser and has the same rules for
integers. The engine that it builds is thrown away: engines are built on the device. Knows no plan.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError
from edgekit.export.quiet import silence
from edgekit.plugins import extra

if TYPE_CHECKING:
    from pathlib import Path

EXTRA = "tensorrt-rtx"
LARGEST = 16
"""The largest batch that the engine is built for; other sizes that are open are built for as much."""
OF_THE_MACHINE = ("cudaError", "Cuda Runtime", "CUDA driver", "CUDA initialization")
"""What TensorRT complains of where there is no GPU: nothing of the file."""


UNKNOWN = "Plugin not found"
"""What the parser says of an operator that it has not: it looks for a plugin of that name last."""


@dataclass
class _Complaints:
    """What the builder logged as errors, in its own words, first to last."""

    told: list[str] = field(default_factory=list)

    def logger(self, rtx: Any) -> Any:  # noqa: ANN401  # tensorrt_rtx has no types
        """Return a logger that writes them down."""
        complaints = self

        class Logger(rtx.ILogger):  # type: ignore[misc]  # an untyped base
            def log(self, severity: Any, message: str) -> None:  # noqa: ANN401  # TensorRT's signature
                if severity in (rtx.ILogger.Severity.ERROR, rtx.ILogger.Severity.INTERNAL_ERROR):
                    complaints.told.append(message)

        return Logger()

    def of_the_file(self) -> list[str]:
        """Return those that are not about the missing GPU."""
        return [one for one in self.told if not any(word in one for word in OF_THE_MACHINE)]


class Refused(ExportError):
    """The parser does not take ``nodes``, named as in the file."""

    def __init__(self, message: str, hint: str, nodes: tuple[str, ...]) -> None:
        super().__init__(message, hint)
        self.nodes = nodes


def is_installed() -> bool:
    """Say whether TensorRT-RTX can be asked here."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def note_of(path: Path) -> str:
    """Parse and build an ONNX file; return what came of it in one sentence, also where nobody could be asked.

    Raises:
        Refused: TensorRT-RTX does not take an operator; names the node.
        ExportError: it refuses to build the network.
    """
    if not is_installed():
        return f"not parsed here: TensorRT-RTX is not installed (pip install 'edgekit[{EXTRA}]')"
    with extra(EXTRA), silence():
        import tensorrt_rtx as rtx
    complaints = _Complaints()
    with silence():
        builder = rtx.Builder(complaints.logger(rtx))
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = rtx.OnnxParser(network, complaints.logger(rtx))
        is_parsed = parser.parse_from_file(str(path))
    if not is_parsed:
        raise Refused(
            f"TensorRT does not take {path.name}: {_refused(parser)}",
            "replace that operator, or export to onnx; options.gate = false in a profile of your own lets it pass",
            tuple(parser.get_error(number).node_name() for number in range(parser.num_errors)),
        )
    with silence():
        engine = builder.build_serialized_network(network, _settings(builder, network))
    if engine is None and (complaints.of_the_file() or not complaints.told):
        why = next(iter(complaints.of_the_file()), "it does not say why")
        raise ExportError(
            f"TensorRT builds no engine of {path.name}: {why[:300]}",
            "leave that layer in float (keep), or export to onnx; options.gate = false in a profile of your own lets it"
            " pass",
        )
    did = "parsed and built" if engine is not None else "parsed, and not built for want of a GPU,"
    return f"{did} by TensorRT-RTX {rtx.__version__}, which stands for the device's TensorRT"


def _refused(parser: Any) -> str:  # noqa: ANN401  # tensorrt_rtx has no types
    """Name the nodes that the parser refused, with its reason where it gives one."""
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    told = []
    for error in errors[:3]:
        why = [one for one in error.desc().splitlines() if not _says_nothing(one) and UNKNOWN not in one]
        told.append(f"{error.node_operator()} {error.node_name()!r} ({why[0][:200] if why else _unsaid(error.desc())})")
    return ", ".join(told) + (f" and {len(errors) - 3} more" if len(errors) > 3 else "")


def _unsaid(text: str) -> str:
    """Return the reason where no line of it is about the file: ``false`` is what the check of an operator came to."""
    return "no such operator" if text.strip() == "false" or UNKNOWN in text else text.strip()[:200]


def _says_nothing(line: str) -> bool:
    return line in ("", "false") or line.startswith("Invalid Node") or any(word in line for word in OF_THE_MACHINE)


def _settings(builder: Any, network: Any) -> Any:  # noqa: ANN401  # tensorrt_rtx has no types
    """Give every open axis a range: TensorRT builds for sizes, not for any size."""
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    for tensor in inputs:
        if -1 in tuple(tensor.shape):
            sizes = [tuple(size if axis < 0 else axis for axis in tensor.shape) for size in (1, 1, LARGEST)]
            shapes.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(shapes)
    return config
