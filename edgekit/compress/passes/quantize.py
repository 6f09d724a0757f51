"""Int8 post-training quantization: plans the bits of every weight and the range of every activation.

The weights stay float; the exporters lower the plan.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress import graph, onnx_graph
from edgekit.compress.calibration import runner
from edgekit.compress.observers import Observer, ranges
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.fold import fold
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import GgufFile, LlamaFolder, OnnxNetwork, TorchNetwork
from edgekit.plan import QuantizationPlan, WeightRule
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from edgekit.model import Model, Split
    from edgekit.progress import Progress

Granularity = Literal["channel", "tensor"]


class Quantize(CompressionPass, frozen=True):
    """Fold batch normalization, watch the calibration data, and write a `QuantizationPlan`.

    Weights are symmetric, one scale a channel unless ``granularity`` is ``tensor``; activations get the range that
    ``observer`` chooses from the first ``samples`` calibration samples (Jacob et al. 2018; Nagel et al. 2021).
    """

    bits: Literal[8] = 8
    observer: Observer = "minmax"
    granularity: Granularity = "channel"
    samples: Annotated[int, msgspec.Meta(ge=2)] = 512

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the folded model with its plan.

        Raises:
            CompressionError: quantized already, a language model, nothing to quantize, NaN in a weight or an
                activation, fewer than two calibration samples.
        """
        samples = _calibration(model, self.samples)
        folded, count = fold(model)
        weights = _weights(folded, self.granularity)
        plan = QuantizationPlan(
            bits=self.bits,
            observer=self.observer,
            weights=weights,
            activations=ranges(runner(folded, samples), self.observer, progress),
        )
        measured: dict[str, float] = {"folded": count, "weights": len(weights), "activations": len(plan.activations)}
        measured["calibration_samples"] = len(samples)
        note = Step(name="quantize", measured=measured)
        return replace(folded, plan=plan, lineage=(*model.lineage, note))


def _calibration(model: Model, most: int) -> Split:
    if isinstance(model.network, LlamaFolder | GgufFile):
        raise CompressionError(
            f"{model.name} is a language model: GGUF chooses its types at export",
            "use: edgekit export --target llama-cpp --precision Q8_0",
        )
    if model.plan is not None:
        raise CompressionError(
            f"{model.name} is quantized already ({model.precision})", "start from the float model, or drop the pass"
        )
    if model.data is None:
        raise CompressionError(f"{model.name} has no calibration data", "give --data file.py:function or data.npz")
    samples = model.data.calibration.head(most)
    if len(samples) < 2:
        raise CompressionError(
            f"the calibration split has {len(samples)} sample(s): no range can be learned from it",
            "give at least 2, better 32 or more, that look like what the device will see",
        )
    return samples


def _weights(model: Model, granularity: Granularity) -> dict[str, WeightRule]:
    network = model.network
    axes = onnx_graph.weights(network.path) if isinstance(network, OnnxNetwork) else _torch_weights(model)
    if not axes:
        raise CompressionError(
            f"{model.name} has no weight that can be quantized",
            "quantize takes convolutions, linear layers and matmuls",
        )
    return {name: WeightRule(granularity=granularity, axis=axis) for name, axis in axes.items()}


def _torch_weights(model: Model) -> dict[str, int]:
    with extra("compress"):
        import torch
    if not isinstance(model.network, TorchNetwork):
        return {}
    for name, tensor in model.network.module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CompressionError(f"weight {name!r} holds NaN or infinity", "check the checkpoint")
    traced = trace(model).module(check_guards=False)
    return {name: graph.weight_axis(node) for node, name in graph.weighted(traced.graph)}


PLUGIN: type[CompressionPass] = Quantize
