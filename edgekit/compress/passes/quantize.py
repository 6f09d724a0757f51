"""Post-training quantization: plans the bits and scales of every weight and the range of every activation.

The weights stay float; later passes may compensate them on the plan's grid, and the exporters lower it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit import device_profiles
from edgekit.compress import graph, onnx_graph
from edgekit.compress.calibration import Unmasked, runner
from edgekit.compress.clamps import ends
from edgekit.compress.layers import layers
from edgekit.compress.observers import KEPT, Observer, ranges
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.fold import fold
from edgekit.compress.saturation import may_saturate, saturations
from edgekit.compress.weight_scales import WeightObserver, scaled
from edgekit.errors import CompressionError, UnknownName
from edgekit.manifest import Step
from edgekit.model import GgufFile, LlamaFolder, OnnxNetwork, TorchNetwork
from edgekit.plan import Cover, Granularity, QuantizationPlan, Scheme, WeightRule
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Collection

    from edgekit.model import Model, Split
    from edgekit.plan import Range
    from edgekit.progress import Progress

SCHEMES: dict[str, Scheme] = {"static": "static", "dynamic": "dynamic", "none": "weight-only"}
SATURATION_SAMPLES = 16


class Quantize(CompressionPass, frozen=True):
    """Fold batch normalization, watch the calibration data, and write a `QuantizationPlan`.

    Weights are integers of ``bits``, one scale a channel, a tensor, or a ``group`` of 32 to 128 inputs; ``weights``
    chooses the scales: by the largest value, or by the least squared error. They are ``symmetric``, as integer
    arithmetic wants them; where activations stay float, they may have a zero point besides, a gain where bits are few.
    ``activations`` are 8-bit integers of the range that ``observer`` chooses from the first ``samples`` calibration
    samples (``static``), of the range at that moment (``dynamic``), or stay float (``none``); what holds the fillers of
    an attention mask stays float as well (`grid.is_masked`). ``cover`` makes integers of ``all`` activations, as
    convolutional networks want it, or of the ``inputs`` of weights, the outputs of convolutions besides: what
    transformers add up before a norm spans ranges that 8 bits do not hold (Bondarenko et al. 2021, "Understanding and
    Overcoming the Challenges of Efficient Transformer Quantization", section 3). ``keep`` names weights that stay
    float. ``target`` names a hardware class: where it adds products of integers in 16 bits, layers whose sums leave
    them on the calibration data get weights of 7 bits (`saturation`). ``percentile`` belongs to the observer of that
    name (Jacob et al. 2018; Nagel et al. 2021, "A White Paper on Neural Network Quantization").
    """

    bits: Literal[8, 7, 6, 5, 4, 3, 2] = 8
    activations: Literal["static", "dynamic", "none"] = "static"
    observer: Observer = "minmax"
    weights: WeightObserver = "minmax"
    symmetric: bool = True
    granularity: Granularity = "channel"
    group: Literal[0, 32, 64, 128] = 0
    cover: Cover = "all"
    keep: tuple[str, ...] = ()
    samples: Annotated[int, msgspec.Meta(ge=2)] = 512
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = KEPT
    target: str = ""

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the folded model with its plan.

        Raises:
            CompressionError: quantized already, a language model, nothing to quantize, NaN in a weight or an
                activation, fewer than two calibration samples, groups without a size.
            UnknownName: ``keep`` names no weight, or ``target`` no hardware class.
        """
        if (self.granularity == "group") != bool(self.group):
            raise CompressionError(
                f"granularity {self.granularity!r} with group = {self.group}",
                'groups need both: granularity = "group" and group = 32, 64 or 128',
            )
        if self.cover == "inputs" and self.activations != "static":
            raise CompressionError(
                f'cover "inputs" with activations {self.activations!r}: there are no ranges to leave out', "drop cover"
            )
        if not self.symmetric and self.activations != "none":
            raise CompressionError(
                f"weights with zero points and activations {self.activations!r}: no engine multiplies such integers",
                'set activations = "none", or symmetric = true',
            )
        profile = device_profiles.load(self.target) if self.target else None
        samples = _calibration(model, self.samples)
        folded, count = fold(model)
        rules = self._rules(folded)
        observed, masked = self._observed(folded, samples, rules, progress)
        plan = QuantizationPlan(
            bits=self.bits,
            observer=self.observer if observed else "none",
            weights=rules,
            activations=observed,
            scheme=SCHEMES[self.activations],
            cover=self.cover,
        )
        measured: dict[str, float] = {"folded": count, "weights": len(rules), "activations": len(observed)}
        measured["calibration_samples"] = len(samples)
        if masked:
            measured["masked_activations"] = masked
        planned = replace(folded, plan=plan)
        if profile is not None and may_saturate(profile) and self.bits == 8:
            planned, told = self._saved_from_saturation(planned, samples, progress)
            measured |= told
        return replace(planned, lineage=(*model.lineage, Step(name="quantize", measured=measured)))

    def _observed(
        self, model: Model, samples: Split, planned: Collection[str], progress: Progress
    ) -> tuple[dict[str, Range], int]:
        """Return the range of each activation, without those that a mask fills, and how many of these there are."""
        if self.activations != "static":
            return {}, 0
        run = Unmasked(runner(model, samples))
        found = ranges(run, self.observer, progress, self.percentile)
        known = {name: limits for name, limits in found.items() if name not in run.masked}
        if self.cover == "inputs":
            taking = [one for one in layers(model) if one.weight in planned]
            behind = ends(model)
            made = {behind.get(one.node, one.node) for one in taking if one.kind != "linear"}
            met = {one.source for one in taking} | made
            known = {name: limits for name, limits in known.items() if name in met}
        return known, len(run.masked)

    def _saved_from_saturation(
        self, model: Model, samples: Split, progress: Progress
    ) -> tuple[Model, dict[str, float]]:
        """Give 7 bits to layers whose sums leave 16; tell the share of sums of each, and the least SQNR in dB."""
        found = saturations(model, samples.head(SATURATION_SAMPLES), progress)
        cut = {one.weight: one for one in found if one.is_cut}
        told = {f"saturated {name}": one.share for name, one in cut.items()}
        told["saturating_layers"] = len(cut)
        lost = [one.sqnr_db for one in cut.values() if math.isfinite(one.sqnr_db)]
        if lost:
            told["saturation_sqnr_db"] = round(min(lost), 2)
        if model.plan is None or not cut:
            return model, told
        values = {layer.weight: layer.values for layer in layers(model) if layer.weight in cut}
        rules = dict(model.plan.weights)
        for name, weight in values.items():
            narrow = msgspec.structs.replace(rules[name], bits=7, scales=b"")
            rules[name] = scaled(weight, narrow, self.weights)
        return replace(model, plan=msgspec.structs.replace(model.plan, weights=rules)), told

    def _rules(self, model: Model) -> dict[str, WeightRule]:
        axes = _weights(model)
        for name in self.keep:
            if name not in axes:
                raise UnknownName("weight", name, axes)
        found = {layer.weight: layer.values for layer in layers(model)}
        rules = {}
        for name, axis in axes.items():
            if name not in self.keep:
                rule = WeightRule(bits=self.bits, granularity=self.granularity, axis=axis, group=self.group)
                if name in found:
                    rule = scaled(found[name], rule, self.weights, is_symmetric=self.symmetric)
                rules[name] = rule
        return rules


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


def _weights(model: Model) -> dict[str, int]:
    network = model.network
    axes = onnx_graph.weights(network) if isinstance(network, OnnxNetwork) else _torch_weights(model)
    if not axes:
        raise CompressionError(
            f"{model.name} has no weight that can be quantized",
            "quantize takes convolutions, linear layers and matmuls",
        )
    return axes


def _torch_weights(model: Model) -> dict[str, int]:
    with extra("compress"):
        import torch
    if not isinstance(model.network, TorchNetwork):
        return {}
    parameters = dict(model.network.module.named_parameters())
    for name, tensor in model.network.module.state_dict().items():
        # minus infinity in a buffer is a mask of attention
        is_sound = torch.isfinite(tensor) if name in parameters else tensor < math.inf
        if tensor.is_floating_point() and not is_sound.all():
            raise CompressionError(f"weight {name!r} holds NaN or infinity", "check the checkpoint")
    traced = trace(model).module(check_guards=False)
    return {name: graph.weight_axis(node) for node, name in graph.weighted(traced.graph)}


PLUGIN: type[CompressionPass] = Quantize
