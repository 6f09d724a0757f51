"""Between a Hugging Face Llama and GGUF: names, row order, hyperparameters, both ways. Knows no tokens.

llama.cpp rotates pairs of neighbouring rows, Hugging Face rows half a head apart: the rows of q and k are reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import ExportError, UsageError
from edgekit.export.quiet import silence
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgekit.tensors import Array

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that make a Llama."""

    vocabulary: int
    context: int
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    theta: float


def read_shape(folder: Path) -> Shape:
    """Read ``config.json``.

    Raises:
        UsageError: it is missing, damaged, or lacks a number.
        ExportError: it describes another architecture, activation or rotation than GGUF's plain Llama.
    """
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        _refuse_others(config)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        heads = int(config["num_attention_heads"])
        return Shape(
            vocabulary=int(config["vocab_size"]),
            context=int(config["max_position_embeddings"]),
            width=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            feed_forward=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
            epsilon=float(config.get("rms_norm_eps", 1e-6)),
            theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} does not describe a Llama: {error!r}", "give a Hugging Face folder") from error


def _refuse_others(config: Mapping[str, Any]) -> None:
    kind = (config.get("architectures") or ["?"])[0]
    if kind != "LlamaForCausalLM":
        raise ExportError(f"GGUF is written for LlamaForCausalLM, this is {kind}", "use llama.cpp's own converter")
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(f"llama.cpp's Llama computes silu, this one {config['hidden_act']!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling != "default":
        raise ExportError(f"rope scaling {scaling!r} is not written yet", "use llama.cpp's own converter")


def tensors(folder: Path, shape: Shape) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of the folder's safetensors files under its GGUF name, in float32, rows reordered.

    Raises:
        UsageError: there is no safetensors file, or it is damaged.
        ExportError: a tensor has no place in a Llama; names it.
    """
    with extra("export"):
        import torch
        from safetensors import SafetensorError, safe_open
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} has no .safetensors file", "pickled weights are not read: convert them first")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if not name.endswith("rotary_emb.inv_freq"):
                        yield to_gguf(name, file.get_tensor(name).to(torch.float32).numpy(), shape)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is damaged: {error}", "fetch the model again") from error


def to_gguf(name: str, array: Array, shape: Shape) -> tuple[str, Array]:
    """Return the GGUF name and the rows in llama.cpp's order.

    Raises:
        ExportError: no tensor of a Llama has that name.
    """
    with extra("export"):
        import gguf
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None or _part(found) not in {*_BLOCK, *_WHOLE}:
        raise ExportError(f"tensor {name!r} has no place in GGUF's Llama", "use llama.cpp's own converter")
    heads = _rotated_heads(found, shape)
    return found, _interleave(array, heads) if heads else array


def _rotated_heads(name: str, shape: Shape) -> int:
    if ".attn_q." in name:
        return shape.heads
    return shape.kv_heads if ".attn_k." in name else 0


def _interleave(array: Array, heads: int) -> Array:
    half = array.shape[0] // heads // 2
    return array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _halve(array: Array, heads: int) -> Array:
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def logits(path: Path, tokens: Array) -> Array:
    """Compute logits [batch, tokens, vocabulary] from a GGUF file's bytes alone, in PyTorch, weights dequantized."""
    with extra("export"), silence():
        import gguf
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    reader = gguf.GGUFReader(path)
    shape = _stored_shape(reader)
    weights = {
        name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
        if (name := _hugging_face(t.name))
    }
    for name, weight in weights.items():
        heads = shape.heads if ".q_proj." in name else shape.kv_heads if ".k_proj." in name else 0
        weights[name] = torch.from_numpy(_halve(weight.numpy(), heads)) if heads else weight
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    with silence(), torch.no_grad():
        network = LlamaForCausalLM(
            LlamaConfig(**_config(shape), attention_bias="model.layers.0.self_attn.q_proj.bias" in weights)
        )
        network.load_state_dict(weights)
        result: Array = network.eval()(torch.as_tensor(tokens)).logits.numpy()
    return result


def _part(name: str) -> str:
    """Drop block number and suffix: ``blk.3.attn_q.weight`` is ``attn_q``."""
    stem = name.rpartition(".")[0]
    return stem.split(".", 2)[2] if stem.startswith("blk.") else stem


def _hugging_face(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, part = stem.split(".", 2)
        return f"model.layers.{number}.{_BLOCK[part]}.{suffix}"
    return f"{_WHOLE[stem]}.{suffix}"


def _stored_shape(reader: Any) -> Shape:  # noqa: ANN401  # gguf's reader is untyped here
    def value(key: str) -> Any:  # noqa: ANN401  # an integer or a float
        return reader.fields[f"llama.{key}"].contents()

    return Shape(
        vocabulary=value("vocab_size"),
        context=value("context_length"),
        width=value("embedding_length"),
        layers=value("block_count"),
        feed_forward=value("feed_forward_length"),
        heads=value("attention.head_count"),
        kv_heads=value("attention.head_count_kv"),
        head_size=value("rope.dimension_count"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
        theta=value("rope.freq_base"),
    )


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.theta,
    }
