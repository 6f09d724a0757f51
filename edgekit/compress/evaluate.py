"""How good and how large a model is: top-1, agreement with another, parameters, bytes. Changes nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError, InputError, UsageError
from edgekit.model import GgufFile, LlamaFolder, OnnxNetwork, TorchNetwork, run_batched, whole_batches
from edgekit.plugins import extra

if TYPE_CHECKING:
    from edgekit.model import Model, Network, Split
    from edgekit.tensors import Array


def top1(network: Network, split: Split, batch: int = 16) -> float:
    """Return the share of samples whose highest score is at their label.

    Raises:
        UsageError: the split has no labels.
        InputError: the first output holds no scores [samples, classes].
    """
    if split.labels is None:
        raise UsageError("top-1 needs labels, this split has none", "add labels, or measure the agreement")
    return float((choices(network, split, batch) == split.labels).mean())


def agreement(network: Network, reference: Network, split: Split, batch: int = 16) -> float:
    """Return the share of samples for which both networks choose the same class."""
    return float((choices(network, split, batch) == choices(reference, split, batch)).mean())


def choices(network: Network, split: Split, batch: int = 16) -> Array:
    """Return the class with the highest score for each sample, from the first output [samples, classes]."""
    scores = next(iter(run_batched(network, split, batch).values()))
    if scores.ndim != 2 or not len(scores):
        raise InputError(f"the first output has the shape {list(scores.shape)}, not [samples, classes]")
    found: Array = scores.argmax(axis=1)
    return found


def score(model: Model, reference: Model, split: Split) -> tuple[str, float]:
    """Measure a model, its plan applied: ``top1`` where there are labels, else ``agreement`` with the reference."""
    split, batch = whole_batches(model, split)
    network = planned_network(model)
    try:
        if split.labels is not None:
            return "top1", top1(network, split, batch)
        return "agreement", agreement(network, planned_network(reference), split, batch)
    except InputError as error:
        raise CompressionError(f"{model.name} cannot be judged: {error.message}", error.hint) from error


def figures(model: Model, reference: Model) -> dict[str, float]:
    """Measure what every step of a lineage tells: ``parameters``, ``bytes``, ``validation_top1`` or ``…_agreement``."""
    measured: dict[str, float] = {"parameters": parameters(model), "bytes": stored_bytes(model)}
    split = model.data.validation if model.data else None
    if model.task == "classification" and split is not None and len(split):
        kind, value = score(model, reference, split)
        measured[f"validation_{kind}"] = value
    return measured


def parameters(model: Model) -> int:
    """Count the stored numbers of a network: parameters and statistics, no counters."""
    return sum(math.prod(shape) for shape, _ in _stored(model).values())


def stored_bytes(model: Model) -> int:
    """Count the bytes of the weights as the plan stores them, scales included; 4 bytes for what it leaves float."""
    rules = model.plan.weights if model.plan else {}
    total = 0
    for name, (shape, width) in _stored(model).items():
        if name in rules:
            scales = shape[rules[name].axis] if rules[name].granularity == "channel" else 1
            total += math.ceil(math.prod(shape) * rules[name].bits / 8) + 4 * scales
        else:
            total += math.prod(shape) * width
    return total


def _stored(model: Model) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return shape and width in bytes of each stored float tensor."""
    if isinstance(model.network, LlamaFolder | GgufFile):
        return {}
    with extra("compress"):
        if isinstance(model.network, TorchNetwork):
            state = model.network.module.state_dict().items()
            return {n: (tuple(t.shape), t.element_size()) for n, t in state if t.is_floating_point()}
        return _stored_onnx(model.network)


def _stored_onnx(network: OnnxNetwork) -> dict[str, tuple[tuple[int, ...], int]]:
    import onnx

    tensors = onnx.load(network.path).graph.initializer
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}
    return {name: (array.shape, array.dtype.itemsize) for name, array in arrays.items() if array.dtype.kind == "f"}
