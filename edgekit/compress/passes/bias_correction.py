"""Bias correction: takes out of each bias what rounding adds to the mean of its layer's outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.compress import rounding
from edgekit.compress.calibration import runner
from edgekit.compress.layer import Change
from edgekit.compress.layers import layers, with_parameters
from edgekit.compress.passes import CompressionPass
from edgekit.compress.walking import walk
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import OnnxNetwork, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgekit.compress.layer import Layer
    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress
    from edgekit.tensors import Array


INHERITED = {"empirical": 1.0, "blended": 0.25}
"""Which share of the shift that comes in from the layers before is taken out; `analytic` knows of none."""


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
        found = {layer.weight: layer for layer in reversed(layers(model)) if layer.weight in plan.weights}
        skipped = {name for name, layer in found.items() if not _can_shift(layer, model)}
        wanted = {name: layer for name, layer in found.items() if name not in skipped}
        if self.method == "analytic":
            shifts = _analytic(wanted, _means(model, samples, wanted, progress), plan)
        else:
            shifts = self._walked(model, samples, set(wanted), progress)
        changes = {name: _shifted(found[name], shift) for name, shift in shifts.items()}
        measured: dict[str, float] = {"layers": len(changes)}
        measured["largest_shift"] = max((float(abs(shift).max()) for shift in shifts.values()), default=0.0)
        measured["skipped_layers"] = len(found) - len(changes)
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

    def _walked(self, model: Model, samples: Split, wanted: set[str], progress: Progress) -> dict[str, Array]:
        """Return by how much each mean fell, the layers before corrected already."""
        plan, share = model.plan, INHERITED[self.method]
        shifts: dict[str, Array] = {}

        def visit(layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> Change | None:
            if layer.weight not in wanted:
                return None
            rounded, clean = rounding.planned_weight(layer, plan), _mean(floats)
            here, all_told = layer.mean_output(clean, rounded), layer.mean_output(_mean(planned), rounded)
            shift = layer.mean_output(clean, layer.values) - share * all_told - (1 - share) * here
            shifts[layer.weight] = shift
            return _shifted(layer, shift)

        walk(model, samples, visit, progress, what="bias correction")
        return shifts


def _analytic(wanted: Mapping[str, Layer], means: Mapping[str, Array], plan: QuantizationPlan) -> dict[str, Array]:
    """Return by how much the mean output of each layer fell, from the mean of its inputs alone."""
    known = {name: layer for name, layer in wanted.items() if layer.source in means}
    return {
        name: layer.mean_output(means[layer.source], layer.values - rounding.planned_weight(layer, plan))
        for name, layer in known.items()
    }


def _means(model: Model, samples: Split, wanted: Mapping[str, Layer], progress: Progress) -> dict[str, Array]:
    """Return the mean over the samples of what each layer takes, position by position."""
    import numpy as np

    sources = {layer.source for layer in wanted.values()}
    totals: dict[str, Array] = {}
    counts: Counter[str] = Counter()

    def watch(name: str, values: Array) -> None:
        totals[name] = totals.get(name, 0.0) + values.sum(0).astype(np.float64)
        counts[name] += len(values)

    if sources:
        runner(model, samples, sources)(watch, progress)
    return {name: total / counts[name] for name, total in totals.items()}


def _mean(batches: Sequence[torch.Tensor]) -> Array:
    """Return the mean over the samples of all batches. Sums of one batch are float32, of the batches float64."""
    total: Array = sum(batch.sum(0).double() for batch in batches).numpy()  # type: ignore[union-attr]  # not empty
    return total / sum(len(batch) for batch in batches)


def _shifted(layer: Layer, shift: Array) -> Change:
    import numpy as np

    return Change(offsets=((0.0 if layer.offsets is None else layer.offsets) + shift).astype(np.float32))


def _can_shift(layer: Layer, model: Model) -> bool:
    """Say whether a layer has a bias of its own, or can get one."""
    if layer.bias is not None:
        return True
    if isinstance(model.network, OnnxNetwork):
        node = next(n for n in model.network.proto().graph.node if n.output[0] == layer.node)
        return node.op_type != "MatMul" and not (len(node.input) > 2 and node.input[2])
    if not isinstance(model.network, TorchNetwork):
        return False
    with extra("compress"):
        import torch
    if isinstance(model.network.module, torch.fx.GraphModule):
        return True
    owner, _, _ = layer.weight.rpartition(".")
    return getattr(model.network.module.get_submodule(owner), "bias", "") is None


PLUGIN: type[CompressionPass] = BiasCorrection
