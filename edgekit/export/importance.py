"""How much each input column of a language model's matrices counts: the importance matrix of llama.cpp.

Gathered in PyTorch on the model's calibration data. Knows no tensor types and writes no file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError
from edgekit.export import llama
from edgekit.export.quiet import silence
from edgekit.model import LlamaFolder
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.export.families import Shape
    from edgekit.model import Split
    from edgekit.progress import Progress
    from edgekit.tensors import Array

WINDOWS = 64
"""At most so many windows of text: the mean of squares settles long before (128 tokens each are 8192 rows)."""

AT_ONCE = 8
"""So many windows are computed at a time."""


@dataclass(frozen=True)
class Importance:
    """The mean of x^2 of each input column, by GGUF tensor name, over ``windows`` windows of text."""

    columns: Mapping[str, Array] = field(default_factory=dict)
    windows: int = 0


def gather(folder: Path, shape: Shape, samples: Split, progress: Progress) -> Importance:
    """Run the folder's network on the samples' ``input_ids`` and average the squares of what enters each matrix.

    Padding, where ``attention_mask`` is 0, is left out. A matrix that the embedding shares is left out, too: rows of
    it are looked up as well as multiplied.

    Raises:
        ExportError: the data has no ``input_ids``.
        MissingExtra: torch or transformers is not installed.
    """
    with extra("export"):
        import torch
    if "input_ids" not in samples.inputs:
        raise ExportError(
            f"an importance matrix needs input_ids, the data has {', '.join(samples.inputs)}",
            'give a data.toml of kind = "text"',
        )
    with silence():
        network = LlamaFolder(folder).by_blocks()
    tied = getattr(network.config, "tie_word_embeddings", False)
    sums: dict[str, Any] = {}
    counted = 0
    kept: dict[str, Any] = {}

    def watch(name: str, given: Any) -> None:  # noqa: ANN401  # a tensor; torch is imported above only
        rows = given.reshape(-1, given.shape[-1])[kept["rows"]].double()
        sums[name] = sums.get(name, 0) + rows.square().sum(0)

    for module_name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and module_name != "lm_head":
            name = llama.gguf_name(f"{module_name}.weight", shape)
            module.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
    few = samples.head(WINDOWS)
    for number, sample in enumerate(few.batches(AT_ONCE)):
        progress("gather the importance matrix", number * AT_ONCE, len(few))
        tokens = torch.as_tensor(sample.inputs["input_ids"])
        mask = torch.as_tensor(sample.inputs.get("attention_mask", torch.ones_like(tokens)))
        kept["rows"] = mask.reshape(-1) != 0
        counted += int(kept["rows"].sum())
        with torch.no_grad():
            last = network.model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
        if not tied:
            watch(llama.gguf_name("lm_head.weight", shape), last)  # scores themselves would take the most memory
    return Importance({n: (s / max(1, counted)).float().numpy() for n, s in sums.items()}, len(few))
