"""Networks of transformers whose blocks have weights while they compute only, so that they are never whole in memory.

Knows no file but folders of safetensors. A forward pass reads every weight once: give it many samples at a time.
"""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

BLOCKS = "model.layers."


def empty(config: Any) -> Any:  # noqa: ANN401  # transformers is untyped here
    """Build the causal network of a configuration without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        how = {"attn_implementation": "eager"}  # others cap no scores
        network = AutoModelForCausalLM.from_config(config, **how)
    _compute_what_no_file_stores(network)
    return network.eval()


def _compute_what_no_file_stores(network: Any) -> None:  # noqa: ANN401  # transformers is untyped here
    """Make the numbers of rotations again, and the scale of Gemma 3's embedding."""
    import torch

    inner = getattr(network, "model", None)
    for name, module in list(inner.named_children()) if inner is not None else ():
        if name.startswith("rotary_emb"):
            setattr(inner, name, type(module)(module.config))
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(network.config.hidden_size**0.5)


def names(network: Any) -> set[str]:  # noqa: ANN401  # transformers is untyped here
    """Name the tensors that the network needs from outside; a shared matrix has the embedding's name."""
    tied = {"lm_head.weight"} if network.config.tie_word_embeddings else set()
    return set(network.state_dict()) - tied


def fill(network: Any, fetch: Callable[[Iterable[str]], dict[str, Any]]) -> Any:  # noqa: ANN401  # untyped
    """Fetch what lies outside of blocks now, and a block's weights whenever it computes."""
    wanted = names(network)
    network.load_state_dict(fetch(n for n in wanted if not n.startswith(BLOCKS)), strict=False, assign=True)
    if network.config.tie_word_embeddings:
        network.tie_weights()
    for number, block in enumerate(network.model.layers):
        prefix = f"{BLOCKS}{number}."
        own = [name for name in wanted if name.startswith(prefix)]
        _let_come_and_go(block, prefix, partial(fetch, own))
    return network


def _let_come_and_go(block: Any, prefix: str, fetch: Callable[[], dict[str, Any]]) -> None:  # noqa: ANN401  # untyped
    def come(block: Any, _: Any) -> None:  # noqa: ANN401  # torch is imported by functions only
        block.load_state_dict({n.removeprefix(prefix): a for n, a in fetch().items()}, assign=True)

    def go(block: Any, *_: Any) -> None:  # noqa: ANN401  # torch is imported by functions only
        block.to("meta")
        trim()

    block.register_forward_pre_hook(come)
    block.register_forward_hook(go)


@cache
def _trimmer() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def trim() -> None:
    """Let glibc return what was freed: it keeps blocks up to 32 MiB, and their sizes fit the next ones badly."""
    if called := _trimmer():
        called(0)


def of_folder(folder: Path) -> Any:  # noqa: ANN401  # transformers is untyped here
    """Open a Hugging Face folder's network in float32; None where its files hold other names than the network has.

    Raises:
        MissingExtra: torch, transformers or safetensors is not installed.
    """
    with extra("export"):
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig
    network = empty(AutoConfig.from_pretrained(folder, local_files_only=True))
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    if not hasattr(network, "model") or not hasattr(network.model, "layers") or names(network) - set(places):
        return None

    def fetch(wanted: Iterable[str]) -> dict[str, Any]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in wanted:
            by_file[places[name]].append(name)
        found: dict[str, Any] = {}
        for path, own in by_file.items():
            with safe_open(path, framework="pt") as file:
                # Copied, or one tensor would hold the whole mapped file.
                found |= {name: file.get_tensor(name).to(torch.float32, copy=True) for name in own}
        return found

    return fill(network, fetch)
