"""Plans 16-bit floats: half the bytes, and on hardware with such units half the time. Needs no data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.compress.layers import layers
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.fold import fold
from edgekit.errors import CompressionError
from edgekit.manifest import Step
from edgekit.model import GgufFile, LlamaFolder
from edgekit.plan import halves

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.progress import Progress

LARGEST = 65504.0


class Float16(CompressionPass, frozen=True):
    """Fold batch normalization, and let weights and arithmetic be IEEE 754 half precision; the network stays float."""

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the folded model with its plan.

        Raises:
            CompressionError: planned already, a language model, or a weight that a half cannot hold.
        """
        progress("float16: weights", 0, 1)
        if isinstance(model.network, LlamaFolder | GgufFile):
            raise CompressionError(
                f"{model.name} is a language model: GGUF chooses its types at export",
                "use: edgekit export --target llama-cpp --precision F16",
            )
        if model.plan is not None:
            raise CompressionError(
                f"{model.name} is quantized already ({model.precision})", "start from the float model, or drop the pass"
            )
        folded, count = fold(model)
        for layer in layers(folded):
            largest = float(abs(layer.values).max(initial=0.0))
            if not largest <= LARGEST:
                raise CompressionError(
                    f"weight {layer.weight!r} holds {largest:g}; 16-bit floats end at {LARGEST:g}",
                    "quantize to int8 instead, whose scales fit any weight",
                )
        note = Step(name="float16", measured={"folded": count})
        return replace(folded, plan=halves(), lineage=(*model.lineage, note))


PLUGIN: type[CompressionPass] = Float16
