"""Which language models GGUF is written for, and the numbers that make one: in config.json and in the file's keys.

Knows no weights and no tokens. A family is a row of a table; what differs beyond the table is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import ExportError, UsageError
from edgekit.export import rotation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_FEED_FORWARD = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_PLAIN = {**_NORMS, **_ATTENTION, **_FEED_FORWARD}
_SANDWICHED = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    **_ATTENTION,
    **_FEED_FORWARD,
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {
    **_NORMS,
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_SCALINGS = frozenset({"default", "linear", "dynamic", "yarn"})
"""What llama.cpp computes in every family that rotates as Llama does."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a network is to llama.cpp (``arch``), and by which class of transformers its file is computed again.

    ``parts``: a block's tensors, GGUF's name to Hugging Face's. ``interleaved``: rotation pairs neighbouring rows.
    ``norm_offset``: what is added to the weights of norms. ``biased``: parts that may have a bias. ``scalings``: of
    rotation, in transformers' words. ``whole_every``: every so-manieth block attends to all tokens, the others to a
    window of them; 0: all do. ``by_width``: a network of so many blocks scales scores by the width over the number of
    heads, others by a head's size: llama.cpp knows the largest Gemmas by that. ``caps_attention``: always or never.
    """

    arch: str
    model_type: str
    parts: Mapping[str, str] = field(default_factory=lambda: _PLAIN)
    interleaved: bool = False
    norm_offset: float = 0.0
    biased: frozenset[str] = frozenset()
    activation: str = "silu"
    is_always_tied: bool = False
    scalings: frozenset[str] = _SCALINGS
    whole_every: int = 0
    by_width: int = 0
    caps_attention: bool = False


_LLAMA = Family(
    arch="llama",
    model_type="llama",
    interleaved=True,
    biased=frozenset({*_ATTENTION, *_FEED_FORWARD}),
    scalings=_SCALINGS | {"llama3"},
)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,  # llama.cpp has no other name for it: the numbers alone differ
    "Qwen2ForCausalLM": Family(arch="qwen2", model_type="qwen2", biased=_QKV),
    "Qwen3ForCausalLM": Family(arch="qwen3", model_type="qwen3", parts={**_PLAIN, **_HEAD_NORMS}),
    "GemmaForCausalLM": Family(
        arch="gemma", model_type="gemma", norm_offset=1.0, activation="gelu_pytorch_tanh", is_always_tied=True
    ),
    "Gemma2ForCausalLM": Family(
        arch="gemma2",
        model_type="gemma2",
        parts=_SANDWICHED,
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        is_always_tied=True,
        whole_every=2,
        by_width=46,
        caps_attention=True,
    ),
    "Gemma3ForCausalLM": Family(
        arch="gemma3",
        model_type="gemma3_text",
        parts={**_SANDWICHED, **_HEAD_NORMS},
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        is_always_tied=True,
        whole_every=6,
        by_width=62,
    ),
    "Phi3ForCausalLM": Family(
        arch="phi3", model_type="phi3", parts=_FUSED, scalings=frozenset({"default", "longrope"})
    ),
}
"""By the architecture that config.json names."""

_SAME_ACTIVATION = {"swish": "silu", "gelu": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}
"""Gemma's first configurations said gelu and meant its approximation; transformers computes them so."""
_WINDOWED = {"MistralForCausalLM", "Phi3ForCausalLM"}
"""Architectures whose ``sliding_window`` counts without ``use_sliding_window``."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that make a network of a family. ``rotated``: how many entries of a head the position turns.

    ``window``: how many tokens a block with a window sees, with a base ``window_theta`` of its own where that is not 0.
    Scores of attention and of tokens stay below ``attention_cap`` and ``final_cap``; 0 for any.
    """

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
    scaling: rotation.Scaling = field(default_factory=rotation.Scaling)
    window: int = 0
    window_theta: float = 0.0
    attention_cap: float = 0.0
    final_cap: float = 0.0

    @property
    def query_scale(self) -> float:
        """Return the number whose root llama.cpp divides the scores of attention by."""
        return float(self.width // self.heads if self.layers == self.family.by_width else self.head_size)

    @property
    def has_window(self) -> tuple[bool, ...]:
        """Say of each block whether it sees a window only."""
        every = self.family.whole_every
        return tuple(bool(every and (number + 1) % every) for number in range(self.layers))


def read_shape(folder: Path) -> Shape:
    """Read ``config.json``.

    llama.cpp knows windows of Gemma 2 and 3 alone. In other families it attends to all tokens: a sliding window becomes
    the context, within which both agree.

    Raises:
        UsageError: it is missing, damaged, or lacks a number.
        ExportError: it describes an architecture, activation or rotation that is not carried.
    """
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        shape = _plain(_family(config), config)
        return _windowed(shape, config) if shape.family.whole_every else shape
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} does not describe a language model: {error!r}", "give a Hugging Face folder"
        ) from error


def _plain(family: Family, config: Mapping[str, Any]) -> Shape:
    """Read what every family has."""
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = rotation.of_config(config)
    part = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    rotated = int(head_size * float(part))
    theta = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
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
        rotated=rotated,
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        theta=theta,
        scaling=rotation.read(config, family.scalings, rotated, theta),
    )


def _windowed(plain: Shape, config: Mapping[str, Any]) -> Shape:
    """Add what Gemma 2 and 3 have beyond it."""
    in_windows = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = float(config.get("rope_local_base_freq") or in_windows.get("rope_theta") or 0.0)
    shape = replace(
        plain,
        window=int(config["sliding_window"]),
        window_theta=theta,
        attention_cap=float(config.get("attn_logit_softcapping") or 0.0),
        final_cap=float(config.get("final_logit_softcapping") or 0.0),
    )
    _refuse_other_attention(shape, config, rotation.kind_of(in_windows))
    return shape


def _refuse_other_attention(shape: Shape, config: Mapping[str, Any], scaling: str) -> None:
    """Refuse what llama.cpp has as a constant of the family and the configuration sets otherwise."""
    kind, family = config["architectures"][0], shape.family
    kinds = [("full_attention", "sliding_attention")[is_window] for is_window in shape.has_window]
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or family.whole_every
    if (config.get("layer_types") or kinds) != kinds or every != family.whole_every:
        raise ExportError(f"llama.cpp's {kind} sees all tokens in every {family.whole_every}. block, this one does not")
    scale = float(config.get("query_pre_attn_scalar", 256))
    if scale != shape.query_scale:
        raise ExportError(f"llama.cpp's {kind} has query_pre_attn_scalar {shape.query_scale:g}, this one {scale:g}")
    if config.get("use_bidirectional_attention"):
        raise ExportError(f"llama.cpp's {kind} looks back only, this one has use_bidirectional_attention")
    if scaling != "default":
        raise ExportError(f"llama.cpp's {kind} does not scale the rotation in windows, this one does: {scaling!r}")
    if bool(shape.attention_cap) != family.caps_attention:
        does = "caps" if family.caps_attention else "does not cap"
        raise ExportError(f"llama.cpp's {kind} {does} attention scores; attn_logit_softcapping is "
                          f"{config.get('attn_logit_softcapping')}")  # fmt: skip


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
    if family.is_always_tied and config.get("tie_word_embeddings") is False:
        raise ExportError(f"llama.cpp's {kind} has no output matrix of its own, this one does", "tie the embeddings")


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
    rotation.add(writer, shape.scaling)
    if shape.window:
        writer.add_sliding_window(shape.window)
        writer.add_sliding_window_pattern(shape.family.whole_every)
    if shape.window_theta:
        writer.add_rope_freq_base_swa(shape.window_theta)
    if shape.attention_cap:
        writer.add_attn_logit_softcapping(shape.attention_cap)
    if shape.final_cap:
        writer.add_final_logit_softcapping(shape.final_cap)


def stored_shape(reader: Any) -> Shape:  # noqa: ANN401  # gguf's reader is untyped here
    """Read those keys back from a file that edgekit wrote."""
    arch = reader.fields["general.architecture"].contents()

    def value(key: str, default: Any = None) -> Any:  # noqa: ANN401  # a number or a word
        found = reader.fields.get(f"{arch}.{key}") if default is not None else reader.fields[f"{arch}.{key}"]
        return found.contents() if found else default

    def numbers(name: str) -> tuple[float, ...]:
        return next((tuple(map(float, tensor.data)) for tensor in reader.tensors if tensor.name == name), ())

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
        scaling=rotation.stored(value, numbers),
        window=value("attention.sliding_window", 0),
        window_theta=value("rope.freq_base_swa", 0.0),
        attention_cap=value("attn_logit_softcapping", 0.0),
        final_cap=value("final_logit_softcapping", 0.0),
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
    if shape.rotated != shape.head_size:
        found["partial_rotary_factor"] = shape.rotated / shape.head_size
    if shape.window:
        found |= {
            "sliding_window": shape.window,
            "layer_types": [("full_attention", "sliding_attention")[is_window] for is_window in shape.has_window],
            "query_pre_attn_scalar": shape.query_scale,
            "attn_logit_softcapping": shape.attention_cap or None,
            "final_logit_softcapping": shape.final_cap or None,
        }
    if shape.window_theta:
        found["rope_local_base_freq"] = shape.window_theta
    return found | rotation.configuration(shape.scaling)
