"""Measures what narrowing a part of a language model costs: the KL of its words, and how it falls with wider types.

The network is computed by blocks, and a matrix is rounded while its module computes: neither the network
nor the words of all the text are ever whole in memory. Chooses no type and writes no file.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgekit.blockwise import BLOCKS
from edgekit.export import blocks, llama
from edgekit.export.quiet import silence
from edgekit.model import LlamaFolder
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgekit.export.families import Shape
    from edgekit.model import Split
    from edgekit.tensors import Array

WINDOWS, TOKENS = 8, 64
"""At most so many windows of text, and tokens of each, are computed once a group."""
ROWS = 128
"""So many rows of a matrix tell how its error shrinks with wider types: they are quantized with every one."""
AT_ONCE = 1 << 20
"""So many numbers of a matrix are rounded at a time."""


class Narrowing:
    """The float network of a Hugging Face folder, and its words on some text: what narrow matrices are compared with.

    ``types``: names of GGUF types, from the smallest; ``columns``: importance by GGUF tensor name.
    """

    def __init__(
        self, folder: Path, shape: Shape, samples: Split, *, types: Sequence[str], columns: Mapping[str, Array]
    ) -> None:
        with extra("export"):
            import torch
        with silence():
            self._network = LlamaFolder(folder).by_blocks()
        self._types, self._columns = types, columns
        few = samples.head(WINDOWS).inputs
        self._tokens = torch.as_tensor(few["input_ids"][:, :TOKENS])
        mask = few.get("attention_mask")
        self._mask = torch.ones_like(self._tokens) if mask is None else torch.as_tensor(mask[:, :TOKENS])
        self.tensors = {  # a shared matrix comes once
            llama.gguf_name(name, shape): (name, tuple(parameter.shape))
            for name, parameter in self._network.named_parameters()
        }
        self._float = self._last_states()

    def cost(self, names: Sequence[str]) -> dict[str, float]:
        """Round these tensors, by GGUF names, to the smallest type; return the KL of every type in nats.

        That of wider types follows from the error of some rows, weighted by the importance of their columns. All are
        rounded without a search for the best scale, which takes ten times as long; how much a search helps shows in
        the errors.
        """
        group = _Group(self._network, {self.tensors[n][0]: self._columns.get(n) for n in names}, self._types)
        with group.rounded():
            states = self._last_states()
        total, count = 0.0, 0
        for theirs, ours, mask in zip(self._float, states, self._mask.bool(), strict=True):
            want = self._log_words(theirs[mask])
            with group.rounded():
                found = self._log_words(ours[mask])
            total += float((want.exp() * (want - found)).sum(-1).double().sum())
            count += int(mask.sum())
        lost = max(0.0, total / max(1, count))
        return {kind: lost * share for kind, share in group.shares().items()}

    def _last_states(self) -> Any:  # noqa: ANN401  # a tensor; torch is imported by functions only
        """Compute all windows up to the output matrix: [windows, tokens, width], 1 % of the words."""
        import torch

        with torch.no_grad():
            return self._network.model(self._tokens, attention_mask=self._mask, use_cache=False).last_hidden_state

    def _log_words(self, states: Any) -> Any:  # noqa: ANN401  # tensors; torch is imported by functions only
        import torch

        with torch.no_grad():
            scores = self._network.lm_head(states)
            if cap := getattr(self._network.config, "final_logit_softcapping", None):
                scores = cap * torch.tanh(scores / cap)
            return torch.log_softmax(scores, -1)


class _Group:
    """Matrices, by transformers' names, that are rounded whenever their modules compute; adds up their errors."""

    def __init__(self, network: Any, own: Mapping[str, Array | None], types: Sequence[str]) -> None:  # noqa: ANN401  # transformers is untyped here
        self._network, self._own, self._types = network, own, types
        self._errors: dict[str, float] = defaultdict(float)
        self._unsearched = 0.0
        self._kept: dict[str, Any] = {}

    def shares(self) -> dict[str, float]:
        """Return the error of each type over that of the smallest as it was rounded."""
        return {kind: self._errors[kind] / self._unsearched if self._unsearched else 0.0 for kind in self._types}

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Let the modules compute with rounded matrices."""
        hooks: list[Any] = []
        for name in self._own:
            for module in self._users(name):
                hooks += self._watch(module, name)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _users(self, name: str) -> list[Any]:
        """Return the module of that matrix, and the output where it shares the embedding."""
        own = self._network.get_submodule(name.rpartition(".")[0])
        head = self._network.lm_head
        return [own, head] if head is not own and head.weight is own.weight else [own]

    def _watch(self, module: Any, name: str) -> tuple[Any, Any]:  # noqa: ANN401  # torch is imported by functions only
        before: list[Any] = []

        def narrow(module: Any, _: Any) -> None:  # noqa: ANN401  # torch's
            before.append(module.weight.data)  # behind the block's own hook, so that it is there
            module.weight.data = self._narrow(name, module.weight)

        def widen(module: Any, *_: Any) -> None:  # noqa: ANN401  # torch's
            module.weight.data = before.pop()

        return module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)

    def _narrow(self, name: str, weight: Any) -> Any:  # noqa: ANN401  # tensors
        import numpy as np
        import torch

        if name in self._kept:
            return self._kept[name]
        array = weight.detach().numpy()
        rounded = np.empty_like(array)
        rows = max(1, AT_ONCE // array.shape[1])
        for start in range(0, len(array), rows):
            rounded[start : start + rows] = _rounded(array[start : start + rows], self._types[0], None)
        self._add(self._own[name], array, rounded)
        result = torch.from_numpy(rounded)
        if not name.startswith(BLOCKS):
            self._kept[name] = result
        return result

    def _add(self, weighted: Array | None, array: Array, rounded: Array) -> None:
        import numpy as np

        step = max(1, len(array) // ROWS)
        some = array[::step][:ROWS].copy()
        scale = (1.0 if weighted is None else weighted) * np.float32(len(array) / len(some))
        self._unsearched += float((scale * (rounded[::step][:ROWS] - some) ** 2).sum())
        for kind in self._types:
            self._errors[kind] += float((scale * (_rounded(some, kind, weighted) - some) ** 2).sum())


def _rounded(array: Array, kind: str, weighted: Array | None) -> Array:
    import gguf

    found: Array = gguf.quants.dequantize(blocks.quantize(array, kind, weighted), gguf.GGMLQuantizationType[kind])
    return found
