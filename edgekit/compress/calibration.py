"""Runs a network on calibration data and shows every float value inside it, by name.

Names are those of the exported graph: the nodes of `workload.trace` or the values of the ONNX file; inputs and
outputs also appear by their public names. Knows nothing of ranges or bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from edgekit import grid, onnx_io
from edgekit.compress import onnx_graph
from edgekit.errors import CompressionError, InputError
from edgekit.model import Model, OnnxNetwork, Split, TorchNetwork, whole_batches
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from edgekit.progress import Progress
    from edgekit.tensors import Array


HUGE = 1e30
"""No network computes with such numbers, and the squares of smaller ones overflow. Far below zero lie masks."""


class Watch(Protocol):
    """Called with the name and the values of each activation, batch by batch."""

    def __call__(self, name: str, values: Array) -> None:
        """Take note of the values; they may be gone after the call."""
        ...


class Run(Protocol):
    """One go through all samples."""

    def __call__(self, watch: Watch, progress: Progress) -> None:
        """Show every value to ``watch``."""
        ...


class Unmasked:
    """A run that keeps back what takes the fillers of masks, and tells afterwards what that was."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.masked: set[str] = set()
        """Names of activations of which some batch, perhaps not the first, took a filler."""

    def __call__(self, watch: Watch, progress: Progress) -> None:
        """Show every other value to ``watch``."""

        def look(name: str, values: Array) -> None:
            if grid.is_masked(values):
                self.masked.add(name)
            else:
                watch(name, values)

        self._run(look, progress)


def runner(model: Model, samples: Split, only: Collection[str] = ()) -> Run:
    """Prepare a network so that it can be watched as often as an observer needs; ``only`` the values named, if any.

    Raises:
        CompressionError: nothing to watch in this kind of network; or, when run, a value is NaN, infinity or next to
            it. Minus infinity is what masks are made of.
        UsageError: fewer samples than the network's fixed batch.
    """
    if isinstance(model.network, TorchNetwork):
        compute = _watched_torch(model)
    elif isinstance(model.network, OnnxNetwork):
        compute = _watched_onnx(model.network, only)
    else:
        raise CompressionError(f"{model.name} cannot be calibrated: it is a folder of a language model")

    whole, size = whole_batches(model, samples)

    def run(watch: Watch, progress: Progress) -> None:
        done = 0
        for batch in whole.batches(size):
            compute(batch, _checked(_narrowed(watch, only)))
            done += len(batch)
            progress("calibrate", done, len(whole))

    return run


def _narrowed(watch: Watch, only: Collection[str]) -> Watch:
    def look(name: str, values: Array) -> None:
        if name in only:
            watch(name, values)

    return look if only else watch


def _checked(watch: Watch) -> Watch:
    import numpy as np

    def check(name: str, values: Array) -> None:
        # a sum is one reading of the values; only one that is out of all bounds has to be looked at closely
        with np.errstate(over="ignore", invalid="ignore"):
            is_doubtful = not abs(values.sum()) < HUGE
        if is_doubtful and not (values < HUGE).all():
            largest = float(values.max())
            what = f"reaches {largest:.2g}" if math.isfinite(largest) else "holds NaN or infinity"
            raise CompressionError(
                f"activation {name!r} {what} on the calibration data",
                "check the checkpoint and the scaling of the input",
            )
        watch(name, values)

    return check


class _Compute(Protocol):
    def __call__(self, batch: Split, watch: Watch) -> None: ...


def _watched_torch(model: Model) -> _Compute:
    with extra("compress"):
        import torch
    module = trace(model).module(check_guards=False)
    names = _public_names(module.graph, model)

    class Watcher(torch.fx.Interpreter):
        watch: Watch

        def run_node(self, n: torch.fx.Node) -> Any:  # noqa: ANN401  # torch's own signature: a node may give anything
            result = super().run_node(n)
            if (
                isinstance(result, torch.Tensor)
                and result.is_floating_point()
                and n.op in ("call_function", "placeholder")
            ):
                for name in names[n.name]:
                    self.watch(name, result.numpy())
            return result

    def compute(batch: Split, watch: Watch) -> None:
        watcher = Watcher(module)
        watcher.watch = watch
        with torch.no_grad():
            watcher.run(*[torch.as_tensor(batch.inputs[spec.name]) for spec in model.inputs])

    return compute


def _public_names(graph: torch.fx.Graph, model: Model) -> dict[str, list[str]]:
    names = {node.name: [node.name] for node in graph.nodes}
    for node, spec in zip(graph.find_nodes(op="placeholder"), model.inputs, strict=True):
        names[node.name] = [spec.name]
    for node, spec in zip(graph.output_node().all_input_nodes, model.outputs, strict=False):
        names[node.name].append(spec.name)
    return names


def _watched_onnx(network: OnnxNetwork, only: Collection[str]) -> _Compute:
    with extra("compress"):
        import onnx
    model = network.proto()
    everything = onnx_graph.values(model)
    # fewer outputs, more that is fused; a graph without any is none
    outputs = [name for name in everything if name in only] or everything[-1:] if only else everything
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    # optimized, a fourth faster: what is an output is computed all the same
    session = onnx_io.session(model)

    def compute(batch: Split, watch: Watch) -> None:
        inputs = dict(batch.inputs)
        _refuse_unknown(set(inputs), {i.name for i in session.get_inputs()})
        found = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        for name, values in (inputs | found).items():
            if values.dtype.kind == "f":
                watch(name, values)

    return compute


def _refuse_unknown(given: set[str], wanted: set[str]) -> None:
    if given != wanted:
        raise InputError(
            f"the data has the inputs {sorted(given)}, the network takes {sorted(wanted)}", "name the arrays alike"
        )
