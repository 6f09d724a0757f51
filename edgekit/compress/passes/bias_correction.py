"""Bias correction: takes out of each bias what rounding adds to the mean of its layer's outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress import rounding
from edgekit.compress.layer import Change
from edgekit.compress.layers import layers, with_parameters
from edgekit.compress.passes import CompressionPass
from edgekit.compress.walking import walk
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress
    from edgekit.tensors import Array


INHERITED = {"empirical": 1.0, "blended": 0.25, "analytic": 0.0}
"""Which share of the shift that comes in from the layers before is taken out."""


class BiasCorrection(CompressionPass, frozen=True):
    """Shift the bias of each planned layer so that its mean output comes near to what it was in float.

    ``analytic`` takes out what rounding the layer's own weight does to the mean, ``(W - rounded W) E[x]`` (Nagel et
    al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2). The paper reads
    ``E[x]`` off the batch normalization; here it is folded already, so the mean is that of ``samples`` calibration
    samples. ``empirical`` takes out besides what comes in from the layers before, rounded activations included, layer
    after layer (appendix D): more where few layers are very coarse, too much where many are. ``blended`` takes a
    quarter of that.

    All compare with the weights as they are: run the pass before those that change them (adaround, gptq).
    """

    method: Literal["blended", "empirical", "analytic"] = "blended"
    samples: Annotated[int, msgspec.Meta(ge=2)] = 128

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the model with other biases; layers that had none get one where they can hold it.

        Raises:
            CompressionError: no plan, no integers in it, no calibration data, or no network that can be walked through.
        """
        plan, samples = self._needed(model)
        shifts: list[float] = []
        skipped = [layer.weight for layer in layers(model) if not _can_shift(layer, model)]

        def visit(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> Change | None:
            if layer.weight not in plan.weights or layer.weight in skipped:
                return None
            shift = self._shift(layer, floats, planned, rounding.planned_weight(layer, plan))
            shifts.append(float(abs(shift).max()))
            return Change(offsets=shift if layer.offsets is None else layer.offsets + shift)

        changes = walk(model, samples, visit, progress, what="bias correction")
        measured: dict[str, float] = {"layers": len(changes), "largest_shift": max(shifts, default=0.0)}
        measured["skipped_layers"] = len([name for name in skipped if name in plan.weights])
        note = Step(name="bias_correction", measured=measured)
        return replace(with_parameters(model, changes), lineage=(*model.lineage, note))

    def _needed(self, model: Model) -> tuple[QuantizationPlan, Split]:
        if model.plan is None or not model.plan.weights:
            raise CompressionError(
                f"{model.name} has no plan with integer weights ({model.precision}): there is no error to correct",
                "put quantize before bias_correction in the recipe",
            )
        if model.data is None:
            raise CompressionError(f"{model.name} has no calibration data", "give --data file.py:function or data.npz")
        return model.plan, model.data.calibration.head(self.samples)

    def _shift(
        self, layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor], values: Array
    ) -> Array:
        """Return by how much the mean output of the layer fell, output by output."""
        with extra("compress"):
            import torch
        rounded, share = torch.from_numpy(values), INHERITED[self.method]
        wanted = _mean_output(layer, floats, torch.from_numpy(layer.values))
        here = _mean_output(layer, floats, rounded) if share < 1 else wanted
        all_told = _mean_output(layer, planned, rounded) if share else wanted
        shift: Array = (wanted - share * all_told - (1 - share) * here).numpy()
        return shift


def _mean_output(layer: Layer, inputs: Sequence[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """Return the mean output over samples and positions; a layer is linear, so it computes the mean input only."""
    import torch

    total = torch.stack([batch.sum(0, dtype=torch.float64) for batch in inputs]).sum(0)
    mean = (total / sum(len(batch) for batch in inputs)).float()[None]
    made = layer.compute(mean, values, None)
    channels = made.dim() - 1 if layer.kind == "linear" else 1
    return made.movedim(channels, 0).flatten(1).mean(1)


def _can_shift(layer: Layer, model: Model) -> bool:
    """Say whether a layer has a bias of its own, or can get one."""
    with extra("compress"):
        import torch
    if layer.bias is not None:
        return True
    if isinstance(model.network, OnnxNetwork):
        node = next(n for n in model.network.proto().graph.node if n.output[0] == layer.node)
        return node.op_type != "MatMul" and not (len(node.input) > 2 and node.input[2])
    if not isinstance(model.network, TorchNetwork):
        return False
    if isinstance(model.network.module, torch.fx.GraphModule):
        return True
    owner, _, _ = layer.weight.rpartition(".")
    return getattr(model.network.module.get_submodule(owner), "bias", "") is None


PLUGIN: type[CompressionPass] = BiasCorrection
