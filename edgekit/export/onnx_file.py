"""Writes a float model as one clean ONNX file. Knows neither quantization nor targets.

Values keep the names that the plan knows them by where that is possible; `Graph.values` maps the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit import onnx_io
from edgekit.errors import ExportError
from edgekit.export.quiet import silence
from edgekit.export.refusal import UnsupportedOperator, called, names_in, places, refused, traced
from edgekit.model import GgufFile, LlamaFolder, Model, OnnxNetwork, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    import onnx
    import torch

BATCH = "batch"
FOLDED = 1 << 28
"""The largest constant, in bytes, that is computed beforehand where nothing refers to its parts by name."""
NEWEST = 21


@dataclass(frozen=True)
class Graph:
    """A float ONNX model, and the ONNX value that holds what each node of the traced graph makes."""

    proto: onnx.ModelProto
    values: Mapping[str, str]

    @property
    def batch(self) -> int:
        """The only batch size the graph takes, -1 for any."""
        sizes = {v.type.tensor_type.shape.dim[0].dim_value for v in self.proto.graph.input}
        return next(iter(sizes)) if len(sizes) == 1 and 0 not in sizes else -1


def float_graph(model: Model, opset: int) -> Graph:
    """Return the model as an ONNX graph with the public input and output names and a dynamic batch.

    An `OnnxNetwork` is taken as it is, with its own opset.

    Raises:
        ExportError: an operator has no ONNX form, or the wanted opset was not kept.
    """
    if isinstance(model.network, LlamaFolder | GgufFile):
        raise ExportError(f"{model.name} is a language model; ONNX holds tensor models", "use --target llama-cpp")
    if isinstance(model.network, OnnxNetwork):
        return _from_file(model.network)
    return _from_torch(model, model.network, opset)


def save(proto: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Write a file with the shape of every value, and return the names of the files.

    The same graph gives the same bytes. The weights of a large model lie beside it; they are taken out of ``proto``.
    """
    apart = onnx_io.move_apart(proto, path)
    onnx_io.infer_shapes(proto, data_prop=True)
    return (*onnx_io.save(proto, path), *apart)


def _from_file(network: OnnxNetwork) -> Graph:
    with extra("onnx"):
        pass

    proto = network.proto()
    _strip(proto)
    return Graph(proto, {name: name for node in proto.graph.node for name in node.output})


def _from_torch(model: Model, network: TorchNetwork, opset: int) -> Graph:
    graph = traced(model)
    proto, lowered = _exported(model, network, opset)
    _require_opset(proto, opset)
    _strip(proto)
    _name_batch(proto)
    return Graph(proto, _value_names(graph, lowered, network))


def located(error: ExportError, model: Model, words: Collection[str]) -> ExportError:
    """Add to an engine's refusal of ONNX operators where the network calls them.

    ``words``: names of the nodes, or their types (``DFT``).
    """
    if not isinstance(model.network, TorchNetwork):
        return UnsupportedOperator(error.message, error.hint)
    proto, _ = _exported(model, model.network, NEWEST)
    nodes = [node for node in proto.graph.node if node.name in words]
    nodes = nodes or [node for node in proto.graph.node if node.op_type in words]
    told = {prop.value for node in nodes for prop in node.metadata_props if prop.key == "pkg.torch.onnx.fx_node"}
    found = called(traced(model), names_in("\n".join(told)))
    if not found:
        return UnsupportedOperator(error.message, error.hint)
    return UnsupportedOperator(f"{error.message}; from {places(found)}", error.hint, [node.name for node in found])


def _exported(model: Model, network: TorchNetwork, opset: int) -> tuple[onnx.ModelProto, torch.export.ExportedProgram]:
    with extra("export"):
        import torch
        from onnxscript import optimizer  # torch.onnx needs onnxscript and names it badly when it is missing
    try:
        with silence():
            program = torch.onnx.export(
                traced(model),
                (),
                dynamo=True,
                opset_version=opset,
                input_names=network.input_names,
                output_names=network.output_names,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise refused(model, "ONNX", error) from error
    if program is None or program.exported_program is None:
        raise ExportError(f"{model.name} has no ONNX form: torch.onnx gave no program")
    if model.plan is None:  # torch.onnx folds constants of some kilobytes alone
        with silence():
            optimizer.fold_constants(program.model, input_size_limit=FOLDED, output_size_limit=FOLDED)
            optimizer.remove_unused_nodes(program.model)
    return program.model_proto, program.exported_program


def _require_opset(proto: onnx.ModelProto, wanted: int) -> None:
    got = next(o.version for o in proto.opset_import if not o.domain)
    # torch.onnx leaves 18 without an error where it cannot convert down to the wanted opset.
    if got != wanted:
        raise ExportError(f"opset {wanted} was asked for, torch.onnx wrote {got}", "set options.opset to 18 or more")


def _strip(proto: onnx.ModelProto) -> None:
    """Drop what names this machine or this run: stack traces, module paths, comments."""
    graph = proto.graph
    for part in (*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, graph, proto):
        del part.metadata_props[:]
        part.doc_string = ""


def _name_batch(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    symbols = {v.type.tensor_type.shape.dim[0].dim_param for v in graph.input} - {""}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = BATCH


def _value_names(
    traced: torch.export.ExportedProgram, lowered: torch.export.ExportedProgram, network: TorchNetwork
) -> dict[str, str]:
    """Map nodes of ``traced`` to ONNX values through the provenance that torch keeps while it decomposes."""
    values: dict[str, str] = {}
    for node in lowered.graph.nodes:
        for source in node.meta.get("from_node", [])[:1]:
            values[source.name] = node.name  # the last one of a decomposition holds its result
    values |= dict(zip(traced.graph_signature.user_inputs, network.input_names, strict=True))
    renamed = dict(zip(_strings(lowered.graph_signature.user_outputs), network.output_names, strict=True))
    return {name: renamed.get(value, value) for name, value in values.items()}


def _strings(names: Iterable[object]) -> list[str]:
    return [str(name) for name in names]
