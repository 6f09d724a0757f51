"""Networks of transformers whose blocks have weights while they compute only, so that they are never whole in memory.

Knows no file. A forward pass reads every weight once: give it many samples at a time.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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

    block.register_forward_pre_hook(come)
    block.register_forward_hook(go)
