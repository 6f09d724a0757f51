"""Networks of transformers whose blocks have weights while they compute only, so that they are never whole in memory.

Knows no file format but safetensors. A forward pass reads every weight once: give it many samples at a time.
"""

from __future__ import annotations

from collections import defaultdict
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
        network = AutoModelForCausalLM.from_config(config)
    if hasattr(network, "model") and hasattr(network.model, "rotary_emb"):
        network.model.rotary_emb = type(network.model.rotary_emb)(config)  # its numbers are computed, not stored
    return network.eval()


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
        _let_come_and_go(block, prefix, lambda own=own: fetch(own))
    return network


def _let_come_and_go(block: Any, prefix: str, fetch: Callable[[], dict[str, Any]]) -> None:  # noqa: ANN401  # untyped
    def come(block: Any, _: Any) -> None:  # noqa: ANN401  # torch is imported by functions only
        block.load_state_dict({n.removeprefix(prefix): a for n, a in fetch().items()}, assign=True)

    def go(block: Any, *_: Any) -> None:  # noqa: ANN401  # torch is imported by functions only
        block.to("meta")

    block.register_forward_pre_hook(come)
    block.register_forward_hook(go)


def of_folder(folder: Path) -> Any:  # noqa: ANN401  # transformers is untyped here
    """Open a Hugging Face folder in float32; whole where its tensors have other names than the network's.

    Raises:
        MissingExtra: torch, transformers or safetensors is not installed.
    """
    with extra("gguf"):
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForCausalLM
    network = empty(AutoConfig.from_pretrained(folder, local_files_only=True))
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    if not hasattr(network, "model") or not hasattr(network.model, "layers") or names(network) - set(places):
        whole = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return whole.eval()

    def fetch(wanted: Iterable[str]) -> dict[str, Any]:
        by_file = defaultdict(list)
        for name in wanted:
            by_file[places[name]].append(name)
        found = {}
        for path, own in by_file.items():
            with safe_open(path, framework="pt") as file:
                # Copied, or one tensor would hold the whole mapped file.
                found |= {name: file.get_tensor(name).to(torch.float32, copy=True) for name in own}
        return found

    return fill(network, fetch)
