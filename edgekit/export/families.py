"""Which language models GGUF is written for, and the numbers that make one: in config.json and in the file's keys.

Knows no weights and no tokens. A family is a row of a table; what differs beyond the table is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import ExportError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.tensors import Array

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_FEED_FORWARD = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_PLAIN = {**_NORMS, **_ATTENTION, **_FEED_FORWARD}
_FUSED = {
    **_NORMS,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_BETWEEN_NORMS = {
    "attn_norm": "input_layernorm",
    **_ATTENTION,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **_FEED_FORWARD,
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QKV = frozenset({"attn_q", "attn_k", "attn_v"})


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a network is to llama.cpp (``arch``), and by which class of transformers its file is computed again.

    ``parts``: a block's tensors, GGUF's name to Hugging Face's. ``interleaved``: rotation pairs neighbouring rows.
    ``norm_offset``: what is added to the weights of norms. ``biased``: parts that may have a bias. ``windows``: every
    so many layers one sees the whole text, the others a window; 0 for none.
    """

    arch: str
    model_type: str
    parts: Mapping[str, str] = field(default_factory=lambda: _PLAIN)
    interleaved: bool = False
    norm_offset: float = 0.0
    biased: frozenset[str] = frozenset()
    activation: str = "silu"
    is_always_tied: bool = False
    windows: int = 0


_LLAMA = Family(arch="llama", model_type="llama", interleaved=True, biased=frozenset({*_ATTENTION, *_FEED_FORWARD}))
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,  # llama.cpp has no other name for it: the numbers alone differ
    "Qwen2ForCausalLM": Family(arch="qwen2", model_type="qwen2", biased=_QKV),
    "Qwen3ForCausalLM": Family(
        arch="qwen3",
        model_type="qwen3",
        parts={**_PLAIN, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    ),
    "GemmaForCausalLM": Family(
        arch="gemma", model_type="gemma", norm_offset=1.0, activation="gelu_pytorch_tanh", is_always_tied=True
    ),
    "Gemma2ForCausalLM": Family(
        arch="gemma2",
        model_type="gemma2",
        parts=_BETWEEN_NORMS,
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        is_always_tied=True,
        windows=2,
    ),
    "Gemma3ForCausalLM": Family(
        arch="gemma3",
        model_type="gemma3_text",
        parts={**_BETWEEN_NORMS, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        is_always_tied=True,
        windows=6,
    ),
    "Phi3ForCausalLM": Family(arch="phi3", model_type="phi3", parts=_FUSED),
}
"""By the architecture that config.json names."""

_KNOWN_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Kinds, each with its numbers."""
_NO_SCALING = ("rope_type", "type", "rope_theta")
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""What llama.cpp and transformers take where nothing is said."""
_SAME_ACTIVATION = {"swish": "silu", "gelu": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}
"""Gemma's first configurations said gelu and meant its approximation; transformers computes them so."""
_WINDOWED = {"MistralForCausalLM", "Phi3ForCausalLM"}
"""Architectures whose ``sliding_window`` counts without ``use_sliding_window``."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How rotations are slowed for texts longer than ``original``, those that the network learned first."""

    kind: str
    factor: float
    original: int = 0
    low: float = 1.0
    high: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that make a network of a family. ``rotated``: how many entries of a head the position turns."""

    family: Family
    vocabulary: int
    context: int
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    rotated: int
    epsilon: float
    theta: float
    scaling: Scaling | None = None
    window: int = 0
    attention_cap: float = 0.0
    final_cap: float = 0.0


def read_shape(folder: Path) -> Shape:
    """Read ``config.json``.

    llama.cpp attends to all tokens in these families: a sliding window becomes the context, within which both agree.

    Raises:
        UsageError: it is missing, damaged, or lacks a number.
        ExportError: it describes an architecture, activation or rotation that is not carried.
    """
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        family = _family(config)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        heads = int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
        return Shape(
            family=family,
            vocabulary=int(config["vocab_size"]),
            context=min(int(config["max_position_embeddings"]), _window(config)),
            width=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            feed_forward=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=head_size,
            rotated=int(head_size * float(config.get("partial_rotary_factor") or 1.0)),
            epsilon=float(config.get("rms_norm_eps", 1e-6)),
            theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            scaling=_scaling(rope, int(config["max_position_embeddings"])),
            window=int(config["sliding_window"]) if family.windows else 0,
            attention_cap=float(config.get("attn_logit_softcapping") or 0.0),
            final_cap=float(config.get("final_logit_softcapping") or 0.0),
        )
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} does not describe a language model: {error!r}", "give a Hugging Face folder"
        ) from error


def _window(config: Mapping[str, Any]) -> int:
    counts = config["architectures"][0] in _WINDOWED or config.get("use_sliding_window", False)
    return int(config.get("sliding_window") or 1 << 62) if counts else 1 << 62


def _family(config: Mapping[str, Any]) -> Family:
    kind = (config.get("architectures") or ["?"])[0]
    if kind not in FAMILIES:
        raise ExportError(f"GGUF is written for {', '.join(FAMILIES)}; this is {kind}", "use llama.cpp's own converter")
    family = FAMILIES[kind]
    _refuse_others(config, family, kind)
    return family


def _refuse_others(config: Mapping[str, Any], family: Family, kind: str) -> None:
    """Refuse what llama.cpp would compute in another way than the configuration says."""
    given = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if _SAME_ACTIVATION.get(given, given) != family.activation:
        raise ExportError(f"llama.cpp's {kind} computes {family.activation}, this one {given!r}")
    if family.windows:
        _refuse_other_windows(config, family, kind)
    if family.is_always_tied and config.get("tie_word_embeddings") is False:
        raise ExportError(f"llama.cpp's {kind} has no output matrix of its own, this one does", "tie the embeddings")


def _refuse_other_windows(config: Mapping[str, Any], family: Family, kind: str) -> None:
    """Refuse what llama.cpp takes for granted of Gemma: which layers see all, how scores are scaled, the local base."""
    kinds = ["full_attention" if (n + 1) % family.windows == 0 else "sliding_attention"
             for n in range(int(config["num_hidden_layers"]))]  # fmt: skip
    if (config.get("layer_types") or kinds) != kinds:
        raise ExportError(f"llama.cpp's {kind} sees all in every layer of {family.windows}, this one in others")
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    if int(config.get("query_pre_attn_scalar", 256)) != head:
        raise ExportError(f"llama.cpp's {kind} divides scores by the root of {head}, this one of another number")
    if float(config.get("rope_local_base_freq", 10000.0)) != 10000.0:  # llama.cpp's own
        raise ExportError(f"llama.cpp's {kind} rotates windows by 10000, this one by another base")


def _scaling(rope: Mapping[str, Any], context: int) -> Scaling | None:
    """Read how rotations are scaled; llama.cpp takes the numbers of `_KNOWN_SCALINGS`, and its own for the others."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    known = _KNOWN_SCALINGS.get(kind)
    others = {key for key, value in rope.items() if value is not None and key not in {*(known or ()), *_NO_SCALING}}
    others -= {key for key, value in _YARN.items() if rope.get(key) == value}
    if known is None or others:
        what = f" with {', '.join(sorted(others))}" if known else ""
        raise ExportError(
            f"rope scaling {kind!r}{what} is not written; {', '.join(_KNOWN_SCALINGS)} are",
            "use llama.cpp's own converter",
        )
    return Scaling(
        kind=kind,
        factor=float(rope["factor"]),
        original=int(rope["original_max_position_embeddings"] if kind == "llama3" else _original(rope, context)),
        low=float(rope["low_freq_factor"]) if kind == "llama3" else 1.0,
        high=float(rope["high_freq_factor"]) if kind == "llama3" else 4.0,
    )


def _original(rope: Mapping[str, Any], context: int) -> int:
    return int(rope.get("original_max_position_embeddings") or context)


def frequency_factors(shape: Shape) -> Array | None:
    """Return what llama.cpp divides each rotation's frequency by, [rotated / 2], where Llama 3 scales them.

    Long waves by the factor, short ones not at all, those between smoothly (Llama 3.1's reference code).
    """
    import numpy as np

    scaling = shape.scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    waves = 2 * np.pi * shape.theta ** (np.arange(0, shape.rotated, 2) / shape.rotated)
    smooth = np.clip((scaling.original / waves - scaling.low) / (scaling.high - scaling.low), 0, 1)
    factors: Array = (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)
    return factors


def add_shape(writer: Any, shape: Shape) -> None:  # noqa: ANN401  # gguf's writer is untyped here
    """Add the keys by which llama.cpp builds the network."""
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.rotated)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_freq_base(shape.theta)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.attention_cap:
        writer.add_attn_logit_softcapping(shape.attention_cap)
    if shape.final_cap:
        writer.add_final_logit_softcapping(shape.final_cap)
    if shape.scaling and shape.scaling.kind != "llama3":  # that is a tensor
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType[shape.scaling.kind.upper()])
        writer.add_rope_scaling_factor(shape.scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(shape.scaling.original)


def stored_shape(reader: Any) -> Shape:  # noqa: ANN401  # gguf's reader is untyped here
    """Read those keys back from a file that edgekit wrote."""
    arch = reader.fields["general.architecture"].contents()

    def value(key: str, absent: float = 0) -> Any:  # noqa: ANN401  # an integer or a float
        field = reader.fields.get(f"{arch}.{key}")
        return absent if field is None else field.contents()

    return Shape(
        family=next(family for family in FAMILIES.values() if family.arch == arch),
        vocabulary=value("vocab_size"),
        context=value("context_length"),
        width=value("embedding_length"),
        layers=value("block_count"),
        feed_forward=value("feed_forward_length"),
        heads=value("attention.head_count"),
        kv_heads=value("attention.head_count_kv"),
        head_size=value("attention.key_length"),
        rotated=value("rope.dimension_count"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
        theta=value("rope.freq_base"),
        scaling=Scaling(
            kind=value("rope.scaling.type"),
            factor=value("rope.scaling.factor"),
            original=value("rope.scaling.original_context_length"),
        )
        if f"{arch}.rope.scaling.type" in reader.fields
        else None,
        window=value("attention.sliding_window"),
        attention_cap=value("attn_logit_softcapping"),
        final_cap=value("final_logit_softcapping"),
    )


def configuration(shape: Shape) -> dict[str, Any]:
    """Return what transformers' configuration class of the family takes for these numbers."""
    found: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "original_max_position_embeddings": shape.context,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.feed_forward,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.theta,
        "sliding_window": None,
        "pad_token_id": None,  # some classes have one beyond a small vocabulary
    }
    if shape.family.windows:
        found["sliding_window"] = shape.window
        found["query_pre_attn_scalar"] = shape.head_size
        found["attn_logit_softcapping"] = shape.attention_cap or None
        found["final_logit_softcapping"] = shape.final_cap or None
    if shape.scaling:
        found["rope_scaling"] = {
            "rope_type": shape.scaling.kind,
            "factor": shape.scaling.factor,
            "original_max_position_embeddings": shape.scaling.original,
        }
    if shape.rotated != shape.head_size:
        found["partial_rotary_factor"] = shape.rotated / shape.head_size
    return found
