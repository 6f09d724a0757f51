"""Networks of transformers whose blocks have weights while they compute only, so that they are never whole in memory.

Knows no file. A forward pass reads every weight once: give it many samples at a time.
"""

from __future__ import annotations

import copy
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
        # the only one that caps the scores of attention, as Gemma 2 does
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if hasattr(network, "model"):
        _rotate(network.model, config)
    return network.eval()


def _rotate(body: Any, config: Any) -> None:  # noqa: ANN401  # untyped
    """Compute the numbers that no file stores: Gemma 3 has other rotations in its windows, and a scale."""
    import torch

    if hasattr(body.embed_tokens, "embed_scale"):
        body.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    if hasattr(body, "rotary_emb"):
        body.rotary_emb = type(body.rotary_emb)(config)
    if hasattr(body, "rotary_emb_local"):
        local = copy.deepcopy(config)
        local.rope_theta, local.rope_scaling = config.rope_local_base_freq, {"rope_type": "default"}
        body.rotary_emb_local = type(body.rotary_emb_local)(local)


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
